"""2:4 GEMM on the CPU: the compressed values and indices are multiplied as such.

    out[m, n] = sum_w sum_j values[n, 2w + j] * x[m, 4w + lane(n, w, j)]        layout: kernels/compress.py

Half of the lifted operand's positions are never touched, as in hardware. Only the algorithm that says so in its
name expands tiles of the weight. One source serves both types: bytes go through a table of 256 numbers whose
type (int32 or float32) is also the type of the sum.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels.backend import Activations, Algorithm, Backend, Weight
from slidesparse.kernels.compress import Compressed, compress, decompress_rows
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.cpu_dense import CpuDense
from slidesparse.kernels.e4m3 import as_bytes, decode_table
from slidesparse.machine import Machine

EXPANDED_ELEMENTS = 1 << 21
"""`expand_tiles` expands about this many weights at a time."""
TOKEN_TILE = 64
"""Tokens whose sums one pass of `axpy_t64` keeps in registers or in the first-level cache."""

AXPY = Algorithm(0, "axpy", "weight-major: each kept value times a row of the transposed activations, all tokens")
AXPY_TILED = Algorithm(1, "axpy_t64", "as axpy, in tiles of 64 tokens")
DOT = Algorithm(2, "dot", "token-major: gathers the activations of each kept value")
EXPAND = Algorithm(3, "expand_tiles", "expands tiles of the weight to dense and multiplies those")


class CpuSparse(Backend):
    """Reference backend of the sparse path; its `Weight.data` is a `Compressed`."""

    name = "cpu_sparse"
    sparse = True
    emulation = True
    activations: Activations = CpuActivations()

    def __init__(self) -> None:
        self._dense = CpuDense()

    def require(self, machine: Machine, dtype: DType) -> None:
        """Runs everywhere."""

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        return (AXPY, AXPY_TILED, DOT, EXPAND) if m > TOKEN_TILE else (AXPY, DOT, EXPAND)

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        packed = compress(codes, layer)
        return Weight(codes.shape[0], codes.shape[1], dtype, packed, packed.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        packed: Compressed = weight.data
        values, indices = as_bytes(packed.values), packed.indices.numpy()
        if algorithm.name == EXPAND.name:
            self._expand_tiles(x, weight, values, indices, out)
            return out
        table = decode_table(weight.dtype)
        kernel = {AXPY.name: _axpy, AXPY_TILED.name: _axpy_tiled, DOT.name: _dot}[algorithm.name]
        decoded = table.take(as_bytes(x) if algorithm.name == DOT.name else as_bytes(x.view(torch.uint8).T))
        kernel(decoded, values, indices, table, out.numpy())
        return out

    def _expand_tiles(
        self,
        x: torch.Tensor,
        weight: Weight,
        values: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        indices: np.ndarray[tuple[int, ...], np.dtype[np.uint8]],
        out: torch.Tensor,
    ) -> None:
        rows = max(1, EXPANDED_ELEMENTS // weight.k)
        for first in range(0, weight.n, rows):
            part = slice(first, min(first + rows, weight.n))
            tile = np.zeros((part.stop - part.start, weight.k), dtype=np.int8)
            decompress_rows(values[part].view(np.int8), indices[part], tile)
            dense = self._dense.pack(torch.from_numpy(tile).view(weight.dtype.torch), weight.dtype, "")
            target = torch.empty(x.shape[0], dense.n, dtype=out.dtype)
            algorithm = self._dense.algorithms(weight.dtype, x.shape[0], dense.n, weight.k)[0]
            out[:, part] = self._dense.gemm(x, dense, algorithm, target)

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        return f"cpu_sparse {algorithm.name} (2:4 compressed; {algorithm.config})"


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _axpy(xt, values, indices, table, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """xt [K', M] decoded; a kept value multiplies one contiguous row of it."""
    m = xt.shape[1]
    for n in numba.prange(values.shape[0]):
        sums = np.zeros(m, table.dtype)
        for w in range(values.shape[1] // 2):
            lanes = indices[n, w // 2] >> (4 * (w % 2))
            a, b = table[values[n, 2 * w]], table[values[n, 2 * w + 1]]
            first, second = xt[4 * w + (lanes & 3)], xt[4 * w + ((lanes >> 2) & 3)]
            for i in range(m):
                sums[i] += a * first[i] + b * second[i]
        out[:, n] = sums


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _axpy_tiled(xt, values, indices, table, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """As `_axpy`, but the sums of a tile of tokens stay close while all windows pass."""
    m = xt.shape[1]
    for n in numba.prange(values.shape[0]):
        sums = np.empty(TOKEN_TILE, table.dtype)
        for start in range(0, m, TOKEN_TILE):
            size = min(TOKEN_TILE, m - start)
            sums[:] = 0
            for w in range(values.shape[1] // 2):
                lanes = indices[n, w // 2] >> (4 * (w % 2))
                a, b = table[values[n, 2 * w]], table[values[n, 2 * w + 1]]
                first = xt[4 * w + (lanes & 3), start : start + size]
                second = xt[4 * w + ((lanes >> 2) & 3), start : start + size]
                for i in range(size):
                    sums[i] += a * first[i] + b * second[i]
            for i in range(size):
                out[start + i, n] = sums[i]


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _dot(x, values, indices, table, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """x [M, K'] decoded; the row's values and columns are unpacked once and used for every token."""
    kept = values.shape[1]
    for n in numba.prange(values.shape[0]):
        columns = np.empty(kept, np.int32)
        weights = np.empty(kept, table.dtype)
        for w in range(kept // 2):
            lanes = indices[n, w // 2] >> (4 * (w % 2))
            columns[2 * w] = 4 * w + (lanes & 3)
            columns[2 * w + 1] = 4 * w + ((lanes >> 2) & 3)
            weights[2 * w], weights[2 * w + 1] = table[values[n, 2 * w]], table[values[n, 2 * w + 1]]
        for i in range(x.shape[0]):
            total = weights[0] * x[i, columns[0]]
            for j in range(1, kept):
                total += weights[j] * x[i, columns[j]]
            out[i, n] = total
