"""Z:L sparsity: windows, column map, K' and bounds. The only place where these formulas live.

Source: SlideSparse, arXiv 2603.05232. Z:L means at least Z zeros in every L consecutive K positions.
A group of L columns is covered by L/2 - 1 windows of 4 columns at stride 2; every non-zero is
assigned to the first window that covers it and still has fewer than 2 (left to right, first fit).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from math import ceil

import numpy as np
import numpy.typing as npt

WINDOW = 4
"""Columns of one 2:4 window, the unit of NVIDIA's sparse tensor cores."""
STRIDE = 2
"""Distance of two neighbouring windows of a group."""
KEPT = 2
"""Non-zeros that a window may hold."""
K_ALIGNMENT = 32
"""Sparse GEMM libraries want K' to be a multiple of this."""
OVERFULL = np.uint32(0xFFFF_FFFF)
"""Lift-table entry of a group with more than L - 2 non-zeros. No valid entry has all 32 bits set."""


def align(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value`."""
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class Sparsity:
    """One pattern Z:L; `l` None stands for `2:inf`, dense weights through the sparse path."""

    l: int | None  # noqa: E741 - the field's own name for it

    z = 2

    def __post_init__(self) -> None:
        if self.l is not None and (self.l % 2 or not 4 <= self.l <= 16):
            raise ValueError(f"sparsity 2:{self.l}: L must be even, 4 to 16, or inf")

    @classmethod
    def parse(cls, text: str) -> Sparsity:
        """`2:8`, `2_8` or `2:inf`. Raises ValueError naming what is allowed."""
        match = re.fullmatch(r"(\d+)[:_](\d+|inf)", text.strip())
        if match is None:
            raise ValueError(f"sparsity {text!r}: write Z:L, for example 2:8, or 2:inf")
        if match[1] != "2":
            raise ValueError(f"sparsity {text!r}: Z must be 2 (allowed: 2:4, 2:6, ... 2:16, 2:inf)")
        return cls(None if match[2] == "inf" else int(match[2]))

    def __str__(self) -> str:
        return f"2:{'inf' if self.l is None else self.l}"

    @property
    def slug(self) -> str:
        """`2_8`: the form used in file and folder names."""
        return str(self).replace(":", "_")

    # -- sizes -----------------------------------------------------------------------------------

    def group_columns(self, k: int) -> int:
        """Columns of one window group: L, or the whole (even-padded) row for 2:inf."""
        return align(k, 2) if self.l is None else self.l

    def groups(self, k: int) -> int:
        """Window groups of a row of K columns; the last may be padded."""
        return ceil(k / self.group_columns(k))

    def windows_per_group(self, k: int) -> int:
        """L/2 - 1, or K/2 for 2:inf (the last window reaches past the row and is padded)."""
        return ceil(k / 2) if self.l is None else self.l // 2 - 1

    def lifted_k(self, k: int) -> int:
        """K' = align(ceil(K/L) * 4 * (L/2 - 1), 32); for 2:inf align(2K, 32)."""
        return align(self.groups(k) * WINDOW * self.windows_per_group(k), K_ALIGNMENT)

    # -- bounds ----------------------------------------------------------------------------------

    @property
    def expansion(self) -> float:
        """K'/K without padding: 2 - 4/L."""
        return 2.0 if self.l is None else 2 - 4 / self.l

    @property
    def speedup_bound(self) -> float:
        """Sparse hardware does K'/2 work: at most L/(L-2) times as fast as dense."""
        return 1.0 if self.l is None else self.l / (self.l - 2)

    def weight_bytes(self, n: int, k: int) -> int:
        """Bytes of a compressed 8-bit [N, K'] weight: kept values K'/2 and 2-bit indices K'/8 a row."""
        lifted = self.lifted_k(k)
        return n * (lifted // 2 + lifted // 8)

    # -- maps ------------------------------------------------------------------------------------

    def column_map(self, k: int) -> npt.NDArray[np.int32]:
        """Input column of each lifted column, int32 [K']; -1 where the lifted column is padding.

        Lifted column c of group g, window w, lane i reads input column g*L + 2*w + i.
        """
        windows = self.windows_per_group(k)
        group = np.arange(self.groups(k))[:, None, None] * self.group_columns(k)
        window = np.arange(windows)[None, :, None] * STRIDE
        lane = np.arange(WINDOW)[None, None, :]
        columns = (group + window + lane).reshape(-1)
        out = np.full(self.lifted_k(k), -1, dtype=np.int32)
        out[: columns.size] = np.where(columns < k, columns, -1)
        return out

    def lift_table(self) -> npt.NDArray[np.uint32]:
        """First-fit window assignment of every possible group, uint32 [2**L].

        Index: bit j set where group column j is non-zero. Value: bit 4*w + i set where window w
        keeps lane i; OVERFULL where the group has more than L - 2 non-zeros. Raises ValueError
        for 2:inf, which has no finite table (its windows keep lanes 0 and 1).
        """
        if self.l is None:
            raise ValueError("2:inf has no lift table: window w keeps columns 2w and 2w + 1")
        return _lift_table(self.l)


def first_fit(nonzero: list[int], length: int) -> list[tuple[int, int]]:
    """Assign each non-zero column of a group of `length` columns to (window, lane).

    Raises ValueError when the group holds more than L - 2 non-zeros. The error names no layer:
    the caller knows it.
    """
    if len(nonzero) > length - Sparsity.z:
        raise ValueError(f"{len(nonzero)} non-zeros in a group of {length}, at most {length - Sparsity.z} fit")
    free = [KEPT] * (length // 2 - 1)
    placed = []
    for column in sorted(nonzero):
        for window in range(max(0, (column - WINDOW + STRIDE) // STRIDE), min(column // STRIDE, len(free) - 1) + 1):
            if free[window]:
                free[window] -= 1
                placed.append((window, column - window * STRIDE))
                break
        else:  # pragma: no cover - the paper proves that first fit always succeeds
            raise AssertionError(f"first fit failed on {nonzero} of {length}")
    return placed


@lru_cache(maxsize=8)
def _lift_table(length: int) -> npt.NDArray[np.uint32]:
    table = np.full(1 << length, OVERFULL, dtype=np.uint32)
    for mask in range(1 << length):
        if mask.bit_count() <= length - Sparsity.z:
            nonzero = [j for j in range(length) if mask >> j & 1]
            table[mask] = sum(1 << (WINDOW * window + lane) for window, lane in first_fit(nonzero, length))
    table.setflags(write=False)
    return table
