"""Lift weights and activations from K to K' columns, on the CPU. `pattern.py` holds the formulas.

Codes are moved, never computed with, so every 8-bit type is handled as bytes (int8 [N, K]). In an FP8
weight, negative zero (0x80) counts as zero and is lifted to +0.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from slidesparse.errors import CheckpointError
from slidesparse.pattern import OVERFULL, WINDOW, Sparsity

Codes = npt.NDArray[np.int8]
NEGATIVE_ZERO = np.int8(-128)
"""Byte of e4m3's -0. As an INT8 code it does not occur: quantisation is symmetric (-127 to 127)."""


def lift_weight(codes: Codes, sparsity: Sparsity, layer: str) -> Codes:
    """Lift weight codes: int8 (or e4m3 bytes) [N, K] -> [N, K'], 2:4, same product with lifted activations.

    Raises:
        CheckpointError: a group has more than L - 2 non-zeros (names layer, row and columns).
    """
    n, k = codes.shape
    lifted = np.zeros((n, sparsity.lifted_k(k)), dtype=np.int8)
    if sparsity.l is None:
        _lift_pairs(codes, lifted)
        return lifted
    overfull = np.full(n, -1, dtype=np.int32)
    _lift_groups(codes, sparsity.l, sparsity.windows_per_group(k), sparsity.lift_table(), lifted, overfull)
    rows = np.flatnonzero(overfull >= 0)
    if rows.size:
        row, first = int(rows[0]), int(overfull[rows[0]]) * sparsity.l
        group = codes[row, first : first + sparsity.l]
        count = int(np.count_nonzero((group != 0) & (group != NEGATIVE_ZERO)))
        raise CheckpointError(
            f"{layer}: row {row}, columns {first} to {first + sparsity.l - 1}: {count} non-zeros, but {sparsity} "
            f"allows {sparsity.l - sparsity.z}; convert the model to {sparsity} first"
        )
    return lifted


def lift_activation(x: npt.NDArray[np.generic], sparsity: Sparsity) -> npt.NDArray[np.generic]:
    """Lift activations of any type: [M, K] -> [M, K'], values duplicated along the column map, 0 as padding."""
    columns = sparsity.column_map(x.shape[1])
    lifted = x[:, np.maximum(columns, 0)]
    lifted[:, columns < 0] = 0
    return lifted


def unlift_weight(lifted: Codes, k: int, sparsity: Sparsity) -> Codes:
    """The inverse of `lift_weight`: [N, K'] -> [N, K]. Every non-zero stands in exactly one lifted column."""
    out = np.zeros((lifted.shape[0], k), dtype=np.int8)
    columns = sparsity.column_map(k)
    for window in range(0, len(columns), WINDOW):
        for c in range(window, window + WINDOW):
            if columns[c] >= 0:
                out[:, columns[c]] |= lifted[:, c]
    return out


def count_not_2_4(lifted: Codes) -> int:
    """Windows of 4 columns that hold more than 2 non-zeros; 0 for every valid lifted weight."""
    return int(_count_not_2_4(lifted))


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _lift_groups(codes, length, windows, table, lifted, overfull):  # type: ignore[no-untyped-def] # pragma: no cover
    """One table look-up a group instead of first fit: 3 times as fast, and the table is tested whole."""
    n, k = codes.shape
    groups = (k + length - 1) // length
    width = WINDOW * windows
    for row in numba.prange(n):
        source, target = codes[row], lifted[row]
        for group in range(groups):
            first = group * length
            mask = 0
            for j in range(min(length, k - first)):
                value = source[first + j]
                if value != 0 and value != NEGATIVE_ZERO:
                    mask |= 1 << j
            keep = table[mask]
            if keep == OVERFULL:
                overfull[row] = group
                break
            for window in range(windows):
                for lane in range(WINDOW):
                    if keep >> (WINDOW * window + lane) & 1:
                        target[group * width + WINDOW * window + lane] = source[first + 2 * window + lane]


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _lift_pairs(codes, lifted):  # type: ignore[no-untyped-def] # pragma: no cover
    """2:inf: window w keeps columns 2w and 2w + 1 in its lanes 0 and 1."""
    n, k = codes.shape
    for row in numba.prange(n):
        for column in range(k):
            value = codes[row, column]
            if value != NEGATIVE_ZERO:
                lifted[row, WINDOW * (column // 2) + column % 2] = value


@numba.njit(parallel=True, cache=True, nogil=True)  # type: ignore[untyped-decorator]
def _count_not_2_4(lifted):  # type: ignore[no-untyped-def] # pragma: no cover
    bad = 0
    for row in numba.prange(lifted.shape[0]):
        for c in range(0, lifted.shape[1], WINDOW):
            count = 0
            for lane in range(WINDOW):
                count += lifted[row, c + lane] != 0
            bad += count > 2
    return bad
