"""The compressed form of a 2:4 weight: the two kept values of every window, and where they stood.

Layout, for a lifted weight [N, K'] with K' a multiple of 32, windows of 4 columns:
    values  8-bit [N, K'/2]   value 2w + j is kept value j of window w, in column order
    indices uint8 [N, K'/8]   window w fills 4 bits: bits 0-1 the lane of value 0, bits 2-3 the lane of value 1;
                              even windows the low half of a byte, odd ones the high half
A window with fewer than 2 non-zeros is filled up with zeros in its lowest free lanes, so the two lanes always
differ and ascend, as NVIDIA's sparse tensor cores require.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import torch

from slidesparse.errors import CheckpointError
from slidesparse.pattern import K_ALIGNMENT, KEPT, WINDOW


@dataclass(frozen=True)
class Compressed:
    """A 2:4 weight [N, K'] of `dtype` in compressed form."""

    values: torch.Tensor
    """[N, K'/2], int8 or float8_e4m3fn."""
    indices: torch.Tensor
    """uint8 [N, K'/8]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K')."""
        return self.values.shape[0], self.values.shape[1] * WINDOW // KEPT

    @property
    def nbytes(self) -> int:
        return self.values.numel() + self.indices.numel()


def compress(lifted: torch.Tensor, layer: str) -> Compressed:
    """Compress a lifted weight, int8 or float8_e4m3fn [N, K'].

    Raises:
        CheckpointError: K' is not a multiple of 32, or a window holds more than 2 non-zeros (names the
            layer, row and columns).
    """
    n, k = lifted.shape
    if k % K_ALIGNMENT:
        raise CheckpointError(
            f"{layer}: {k} columns; a compressed weight needs a multiple of {K_ALIGNMENT}: lift it first"
        )
    source = lifted.contiguous().view(torch.int8).numpy()
    values = np.zeros((n, k // WINDOW * KEPT), dtype=np.int8)
    indices = np.zeros((n, k // (2 * WINDOW)), dtype=np.uint8)
    bad = np.full(n, -1, dtype=np.int64)
    _compress(source, values, indices, bad)
    rows = np.flatnonzero(bad >= 0)
    if rows.size:
        row, first = int(rows[0]), int(bad[rows[0]]) * WINDOW
        raise CheckpointError(
            f"{layer}: row {row}, columns {first} to {first + WINDOW - 1} of the lifted weight: more than {KEPT} "
            f"non-zeros, so it is not 2:4; lift the weight again"
        )
    return Compressed(torch.from_numpy(values).view(lifted.dtype), torch.from_numpy(indices))


def decompress(weight: Compressed) -> torch.Tensor:
    """The inverse of `compress`: -> [N, K'] of the values' type."""
    n, k = weight.shape
    out = np.zeros((n, k), dtype=np.int8)
    _decompress(weight.values.view(torch.int8).numpy(), weight.indices.numpy(), out)
    return torch.from_numpy(out).view(weight.values.dtype)


@numba.njit(parallel=True, cache=True, nogil=True)
def _compress(source, values, indices, bad):  # type: ignore[no-untyped-def] # pragma: no cover
    """-0 of e4m3 (byte -128, which INT8 never holds) counts as zero, as it does in the lift."""
    n, k = source.shape
    for row in numba.prange(n):
        for w in range(k // 4):
            first, second, count = -1, -1, 0
            for lane in range(4):
                value = source[row, 4 * w + lane]
                if value != 0 and value != -128:
                    if count == 0:
                        first = lane
                    else:
                        second = lane
                    count += 1
            if count > 2:
                bad[row] = w
                break
            if count < 2:  # fill up with the lowest free lanes
                filler = 0 if first != 0 else 1
                if count == 0:
                    first, second = 0, 1
                elif filler < first:
                    first, second = filler, first
                else:
                    second = filler
            for j in range(2):
                value = source[row, 4 * w + (first if j == 0 else second)]
                values[row, 2 * w + j] = 0 if value == -128 else value
            indices[row, w // 2] |= np.uint8((first | (second << 2)) << (4 * (w % 2)))


@numba.njit(parallel=True, cache=True, nogil=True)
def _decompress(values, indices, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """values int8 [N, K'/2], indices uint8 [N, K'/8] -> out int8 [N, K'], zeroed by the caller."""
    for row in numba.prange(values.shape[0]):
        for w in range(values.shape[1] // 2):
            lanes = indices[row, w // 2] >> (4 * (w % 2))
            out[row, 4 * w + (lanes & 3)] = values[row, 2 * w]
            out[row, 4 * w + ((lanes >> 2) & 3)] = values[row, 2 * w + 1]
