"""Lift weights and activations from K to K' columns, on the CPU. `pattern.py` holds the formulas.

Codes are moved, never computed with, so every 8-bit type is handled as bytes (int8 [N, K]). In an FP8
weight, negative zero (0x80) counts as zero and is lifted to +0. Kernels treat four lanes as one little-endian
32-bit word, as every machine of this project stores it.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt

from slidesparse.errors import CheckpointError
from slidesparse.pattern import KEPT, OVERFULL, WINDOW, Sparsity

Codes = npt.NDArray[np.int8]
NEGATIVE_ZERO = np.int8(-128)
"""Byte of e4m3's -0. As an INT8 code it does not occur: quantisation is symmetric (-127 to 127)."""

_NIBBLE_MASKS = np.array(
    [sum(0xFF << 8 * lane for lane in range(WINDOW) if bits >> lane & 1) for bits in range(16)], np.uint32
)
"""Bytes of a window that 4 lane bits keep."""


def lift_weight(codes: Codes, sparsity: Sparsity, layer: str, first_row: int = 0) -> Codes:
    """Lift weight codes: int8 (or e4m3 bytes) [N, K] -> [N, K'], 2:4, same product with lifted activations.

    `layer`, and `first_row` (of the layer, where `codes` are some of its rows), are for the error alone.

    Raises:
        CheckpointError: a group has more than L - 2 non-zeros (names layer, row and columns).
    """
    n, k = codes.shape
    lifted = np.zeros((n, sparsity.lifted_k(k)), dtype=np.int8)
    if sparsity.l is None:
        _lift_pairs(codes, lifted)
        return lifted
    overfull = np.full(n, -1, dtype=np.int32)
    _lift_groups(codes, (0,) * sparsity.l, sparsity.lift_table(), _NIBBLE_MASKS, lifted, overfull)
    rows = np.flatnonzero(overfull >= 0)
    if rows.size:
        row, first = int(rows[0]), int(overfull[rows[0]]) * sparsity.l
        group = codes[row, first : first + sparsity.l]
        count = int(np.count_nonzero((group != 0) & (group != NEGATIVE_ZERO)))
        raise CheckpointError(
            f"{layer}: row {first_row + row}, columns {first} to {first + sparsity.l - 1}: {count} non-zeros, "
            f"but {sparsity} allows {sparsity.l - sparsity.z}; convert the model to {sparsity} first"
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
    out = np.empty((lifted.shape[0], k), dtype=np.int8)
    if sparsity.l is None:
        _unlift_pairs(lifted, out)
    else:
        _unlift_groups(lifted, (0,) * sparsity.l, out)
    return out


def count_not_2_4(lifted: Codes) -> int:
    """Windows of 4 columns that hold more than 2 non-zeros; 0 for every valid lifted weight."""
    return int(_count_not_2_4(lifted))


@numba.njit(cache=True, nogil=True)
def _lift_groups(codes, lanes, table, nibbles, lifted, overfull):  # type: ignore[no-untyped-def] # pragma: no cover
    """`lanes` is a tuple of L entries: its length belongs to its type, so each L gets unrolled code of its own."""
    for row in range(codes.shape[0]):
        overfull[row] = _lift_row(codes[row], lanes, table, nibbles, lifted[row].view(np.uint32))


@numba.njit
def _lift_row(codes, lanes, table, nibbles, windows):  # type: ignore[no-untyped-def] # pragma: no cover
    """One table look-up a group instead of first fit; the table is tested whole. Columns move in pairs: window
    w of a group holds pairs w and w + 1, and its 4 bits in the table's entry say which lanes it keeps.

    Returns the first group that holds too many non-zeros, or -1.
    """
    length = len(lanes)
    pairs, per_group = length // 2, length // 2 - 1
    groups = (codes.size + length - 1) // length
    row = np.zeros(groups * length, dtype=np.int8)
    for c in range(codes.size):
        row[c] = 0 if codes[c] == NEGATIVE_ZERO else codes[c]
    values = row.view(np.uint16)
    full = np.empty(values.size, dtype=np.uint8)  # bit 0: even column of the pair is not zero, bit 1: odd one
    for p in range(values.size):
        full[p] = (np.uint8(row[2 * p] != 0)) | (np.uint8(row[2 * p + 1] != 0) << np.uint8(1))
    for group in range(groups):
        mask = np.uint32(0)
        for p in range(pairs):
            mask |= np.uint32(full[group * pairs + p]) << np.uint32(2 * p)
        keep = table[mask]
        if keep == OVERFULL:
            return group
        for w in range(per_group):
            pair = group * pairs + w
            both = np.uint32(values[pair]) | (np.uint32(values[pair + 1]) << np.uint32(16))
            windows[group * per_group + w] = both & nibbles[(keep >> np.uint32(WINDOW * w)) & np.uint32(15)]
    return -1


@numba.njit(cache=True, nogil=True)
def _lift_pairs(codes, lifted):  # type: ignore[no-untyped-def] # pragma: no cover
    """2:inf: window w keeps columns 2w and 2w + 1 in its lanes 0 and 1."""
    n, k = codes.shape
    for row in range(n):
        for column in range(k):
            value = codes[row, column]
            if value != NEGATIVE_ZERO:
                lifted[row, WINDOW * (column // 2) + column % 2] = value


@numba.njit(cache=True, nogil=True)
def _unlift_groups(lifted, lanes, out):  # type: ignore[no-untyped-def] # pragma: no cover
    for row in range(out.shape[0]):
        _unlift_row(lifted[row].view(np.uint32), lanes, out[row])


@numba.njit
def _unlift_row(windows, lanes, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """Pair p of a group collects lanes 2, 3 of window p - 1 and lanes 0, 1 of window p."""
    pairs, per_group = len(lanes) // 2, len(lanes) // 2 - 1
    groups = (out.size + len(lanes) - 1) // len(lanes)
    collected = np.empty(groups * pairs, dtype=np.uint16)
    for group in range(groups):
        first, target = group * per_group, group * pairs
        collected[target] = np.uint16(windows[first] & np.uint32(0xFFFF))
        for p in range(1, per_group):
            left, right = windows[first + p - 1] >> np.uint32(16), windows[first + p] & np.uint32(0xFFFF)
            collected[target + p] = np.uint16(left | right)
        collected[target + per_group] = np.uint16(windows[first + per_group - 1] >> np.uint32(16))
    values = collected.view(np.int8)
    for c in range(out.size):
        out[c] = values[c]


@numba.njit(cache=True, nogil=True)
def _unlift_pairs(lifted, out):  # type: ignore[no-untyped-def] # pragma: no cover
    """The inverse of `_lift_pairs`; lanes 2 and 3, which it leaves empty, count too."""
    n, k = out.shape
    for row in range(n):
        for column in range(k):
            lane = WINDOW * (column // 2) + column % 2
            out[row, column] = lifted[row, lane] | (lifted[row, lane - 2] if column >= 2 else np.int8(0))


@numba.njit(cache=True, nogil=True)
def _count_not_2_4(lifted):  # type: ignore[no-untyped-def] # pragma: no cover
    bad = 0
    for row in range(lifted.shape[0]):
        bad += _bad_windows(lifted[row].view(np.uint32))
    return bad


@numba.njit
def _bad_windows(windows):  # type: ignore[no-untyped-def] # pragma: no cover
    """The top bit of every byte says whether the byte is not zero; a multiplication adds up the four."""
    low, top = np.uint32(0x7F7F7F7F), np.uint32(0x80808080)
    bad = 0
    for w in range(windows.size):
        full = (((windows[w] & low) + low) | windows[w]) & top
        count = (((full >> np.uint32(7)) * np.uint32(0x01010101)) >> np.uint32(24)) & np.uint32(0xFF)
        bad += count > np.uint32(KEPT)
    return bad
