"""2:4 GEMM on the CPU: the compressed values and indices are multiplied as such.

    out[m, n] = sum_w sum_j values[n, 2w + j] * x[m, 4w + lane(n, w, j)]        layout: kernels/compress.py

Half of the lifted operand's positions are never touched, as in hardware; no algorithm expands the weight. One
source serves both types: bytes go through a table of 256 numbers whose
type (int32 or float32) is also the type of the sum.
"""

from __future__ import annotations

import numba
import numpy as np
import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.backend import Activations, Algorithm, Backend, Weight
from slidesparse.kernels.compress import Compressed, compress
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.e4m3 import as_bytes, decode_table
from slidesparse.machine import Machine
from slidesparse.pattern import KEPT, WINDOW

AXPY = Algorithm(0, "axpy", "weight-major: each kept value times a row of the transposed activations, all tokens")
AXPY_16 = Algorithm(1, "axpy_t16", "as axpy, in tiles of 16 tokens")
AXPY_64 = Algorithm(2, "axpy_t64", "as axpy, in tiles of 64 tokens")
DOT = Algorithm(3, "dot", "token-major: gathers the activations of each kept value")
TILES = {AXPY_16.name: 16, AXPY_64.name: 64}
"""Tokens whose sums one pass keeps in registers or in the first-level cache."""


class CpuSparse(Backend):
    """Reference backend of the sparse path; its `Weight.data` is a `Compressed`."""

    name = "cpu_sparse"
    sparse = True
    emulation = True
    device = "cpu"
    activations: Activations = CpuActivations()

    def require(self, machine: Machine, dtype: DType) -> None:
        """Runs everywhere, 8-bit types only."""
        if not dtype.quantised:
            raise UnsupportedHere(f"backend {self.name} has no {dtype.value}: it emulates the 8-bit types")

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        return AXPY, *(tiled for tiled in (AXPY_16, AXPY_64) if m > TILES[tiled.name]), DOT

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        packed = compress(codes, layer)
        return Weight(codes.shape[0], codes.shape[1], dtype, packed, packed.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        packed: Compressed = weight.data
        values, indices = as_bytes(packed.values), packed.indices.numpy()
        table = decode_table(weight.dtype)
        if algorithm.name == DOT.name:
            _dot(table.take(as_bytes(x)), values, indices, table, out.numpy())
            return out
        decoded = table.take(as_bytes(x.view(torch.uint8).T))
        if algorithm.name == AXPY.name:
            _axpy(decoded, values, indices, table, out.numpy())
        else:
            _axpy_tiled(decoded, values, indices, table, TILES[algorithm.name], out.numpy())
        return out

    def accumulation_error(self, dtype: DType, terms: int) -> tuple[float, str]:
        """Only kept positions are added."""
        return super().accumulation_error(dtype, terms * KEPT // WINDOW)

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        return f"cpu_sparse {algorithm.name} (2:4 compressed; {algorithm.config})"


@numba.njit(parallel=True, cache=True, nogil=True)
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


@numba.njit(parallel=True, cache=True, nogil=True)
def _axpy_tiled(xt, values, indices, table, tile, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """As `_axpy`, but the sums of a tile of tokens stay close while all windows pass."""
    m = xt.shape[1]
    for n in numba.prange(values.shape[0]):
        sums = np.empty(tile, table.dtype)
        for start in range(0, m, tile):
            size = min(tile, m - start)
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


@numba.njit(parallel=True, cache=True, nogil=True)
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
