"""Prune weight codes to Z:L: at least Z = 2 zeros in every group of L columns.

Order of removal inside a group: codes that are zero already, then the smallest original BF16 magnitude
(or a seeded random order); ties take the lowest column. In a partial last group the columns past K count
as zeros. 2:inf removes nothing.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Literal

import numba
import numpy as np
import numpy.typing as npt

from slidesparse.checkpoint.lift import NEGATIVE_ZERO, Codes
from slidesparse.pattern import Sparsity

Bf16Bits = npt.NDArray[np.uint16]
Method = Literal["magnitude", "random"]
_LANE_BITS = 4
"""A group has at most 16 columns; the lane in the low bits of a key makes all keys of a group differ."""


@dataclass(frozen=True)
class Pruned:
    """What pruning did to one weight."""

    codes: Codes
    """[N, K], int8 or e4m3 bytes."""
    natural_zeros: int
    removed: int
    """Non-zero codes that were set to zero."""
    energy: float
    """Sum of squares of the original weights whose code was not zero."""
    energy_removed: float
    """Part of it that was removed."""
    groups: int
    groups_unpruned: int
    """Groups that had Z zeros of their own."""


def prune(codes: Codes, weight: Bf16Bits, sparsity: Sparsity, method: Method, seed: int, layer: str) -> Pruned:
    """Prune codes (int8 or e4m3 bytes [N, K]) by the BF16 weights that they come from (bits, [N, K]).

    `seed` and `layer` matter to the method `random` only: equal ones give equal masks.
    """
    n, k = codes.shape
    salt = np.uint64(0)
    if method == "random":
        salt = np.uint64(int.from_bytes(hashlib.sha256(f"{seed} {layer} {sparsity}".encode()).digest()[:8], "little"))
    out = np.empty_like(codes)
    counts = np.zeros((n, 3), dtype=np.int64)
    energies = np.zeros((n, 2), dtype=np.float64)
    lanes = (0,) * (sparsity.l or 0)
    _prune(codes, weight, lanes, method == "random", salt, out, counts, energies)
    zeros, removed, unpruned = (int(value) for value in counts.sum(axis=0))
    groups = n * sparsity.groups(k)
    energy, energy_removed = (float(value) for value in energies.sum(axis=0))
    return Pruned(out, zeros, removed, energy, energy_removed, groups, groups if sparsity.l is None else unpruned)


@numba.njit(inline="always")
def _mixed(value):  # type: ignore[no-untyped-def] # pragma: no cover
    """64 bits in, 64 well-mixed bits out (splitmix64, Steele et al. 2014)."""
    value += np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


@numba.njit(cache=True, nogil=True)
def _prune(codes, weight, lanes, random, salt, out, counts, energies):  # type: ignore[no-untyped-def] # pragma: no cover
    """`lanes` is a tuple of L entries (none for 2:inf): a tuple's length belongs to its type, so every L gets
    machine code of its own, and loops over a group are unrolled. That is 4 times as fast as with L a number."""
    for row in range(codes.shape[0]):
        start = salt + np.uint64(row) * np.uint64(codes.shape[1])
        _prune_row(codes[row], weight[row], lanes, random, start, out[row], counts[row], energies[row])


@numba.njit
def _prune_row(codes, bits, lanes, random, start, out, counts, energies):  # type: ignore[no-untyped-def] # pragma: no cover
    """A key for every column (0 for zero codes, else growing with magnitude), the two smallest keys of every
    group, zeros where they point. Bits & 0x7FFF of a BF16 value grow with its magnitude.

    Loops are split so that LLVM turns each into vector instructions, and a group that needs no pruning has
    its natural zeros overwritten with zero: a branch there costs more than all the rest.
    """
    k = codes.size
    length = len(lanes)
    padded = k if length == 0 else (k + length - 1) // length * length
    magnitudes = np.zeros(padded, dtype=np.uint32)
    for c in range(k):
        zero = codes[c] == 0 or codes[c] == NEGATIVE_ZERO
        magnitude = (np.uint32(bits[c]) & np.uint32(0x7FFF)) << np.uint32(16)
        # A non-zero code of a zero weight (none, if both belong together) still ranks above zero codes.
        magnitudes[c] = np.uint32(0) if zero else max(magnitude, np.uint32(1))
    values = magnitudes.view(np.float32)
    counts[0], energies[0] = _sums(magnitudes[:k], values[:k])
    if length == 0:
        for c in range(k):
            out[c] = codes[c]
        return
    keys = np.empty(padded, dtype=np.uint32)
    if random:
        for c in range(padded):
            drawn = np.uint32(_mixed(start + np.uint64(c)) >> np.uint64(37)) + np.uint32(1)  # 27 bits
            keys[c] = np.uint32(0) if magnitudes[c] == 0 else drawn << np.uint32(_LANE_BITS)
    else:
        for c in range(padded):
            above_zero = np.uint32(magnitudes[c] != 0) << np.uint32(_LANE_BITS)
            keys[c] = (magnitudes[c] >> np.uint32(16 - _LANE_BITS)) + above_zero
    pruned = np.zeros(padded, dtype=np.int8)
    for c in range(k):
        pruned[c] = codes[c]
    counts[1], counts[2], energies[1] = _remove(keys, values, lanes, pruned)
    for c in range(k):
        out[c] = pruned[c]


@numba.njit(fastmath={"reassoc"})
def _sums(magnitudes, values):  # type: ignore[no-untyped-def] # pragma: no cover
    zeros, energy = 0, 0.0
    for c in range(magnitudes.size):
        zeros += magnitudes[c] == 0
        energy += np.float64(values[c]) * np.float64(values[c])
    return zeros, energy


@numba.njit
def _remove(keys, values, lanes, pruned):  # type: ignore[no-untyped-def] # pragma: no cover
    """Zero the two columns of every group with the smallest keys; count and weigh what that removed."""
    length = len(lanes)
    groups = keys.size // length
    least = np.empty(groups, dtype=np.uint32)
    second = np.empty(groups, dtype=np.uint32)
    for g in range(groups):
        low, high = np.uint32(0xFFFFFFFF), np.uint32(0xFFFFFFFF)
        for lane in range(length):
            key = keys[g * length + lane] | np.uint32(lane)
            high = min(high, max(low, key))
            low = min(low, key)
        least[g] = low
        second[g] = high
    lane_mask = np.uint32((1 << _LANE_BITS) - 1)
    removed, unpruned, lost = 0, 0, 0.0
    for g in range(groups):
        removed += (least[g] > lane_mask) + (second[g] > lane_mask)
        unpruned += second[g] <= lane_mask
    for g in range(groups):
        one = g * length + np.int64(least[g] & lane_mask)
        two = g * length + np.int64(second[g] & lane_mask)
        pruned[one] = 0
        pruned[two] = 0
        lost += np.float64(values[one]) * np.float64(values[one]) + np.float64(values[two]) * np.float64(values[two])
    return removed, unpruned, lost
