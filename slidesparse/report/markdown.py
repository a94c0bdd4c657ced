"""Numbers and tables as GitHub markdown, aligned so that the source can be read too."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

MISSING = "–"
"""Where a number is not there. Never -1, never nan."""


def known(value: object) -> bool:
    """Is this a measured figure? -1, blanks and NaN are not."""
    return isinstance(value, int | float) and math.isfinite(value) and value >= 0


def significant(value: float, digits: int = 4) -> str:
    """`digits` significant digits, thousands separated, no exponent: 12345.6 -> 12,346; 0.012345 -> 0.01235."""
    if not known(value):
        return MISSING
    if value == 0:
        return "0"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{min(decimals, 9)}f}"


def integer(value: float) -> str:
    """12345.0 -> 12,345."""
    return f"{round(value):,}" if known(value) else MISSING


def fixed(value: float, decimals: int) -> str:
    """A known figure with `decimals` decimals."""
    return f"{value:,.{decimals}f}" if known(value) else MISSING


def seconds(value: float) -> str:
    """A duration to the millisecond below 1 s, and no finer than 0.1 s from 10 s on."""
    return fixed(value, 3 if value < 1 else 2 if value < 10 else 1 if value < 1000 else 0)


def percent(value: float, digits: int = 3) -> str:
    """A share: 0.01234 -> 1.23 %."""
    return f"{significant(value * 100, digits)} %" if known(value) else MISSING


def size(value: float) -> str:
    """Bytes in MiB or GiB."""
    if not known(value):
        return MISSING
    return f"{significant(value / 2**30, 3)} GiB" if value >= 2**30 else f"{significant(value / 2**20, 3)} MiB"


def text(value: object) -> str:
    """Free text in a cell or a sentence: one line, no markup of its own. (Tables take care of `|` themselves.)"""
    line = " ".join(str(value).split())
    return re.sub(r"[\\*`<>\[\]~$]|(?<!\w)_|_(?!\w)", r"\\\g<0>", line)


def code(value: object) -> str:
    """A name or path in code type; backticks cannot be quoted there, so they become quotes."""
    line = " ".join(str(value).split()).replace("`", "'")
    return f"`{line}`" if line else MISSING


def once(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Say the first cell once, not on every line of its group."""
    first = [row[0] for row in rows]
    return [["" if i and first[i - 1] == row[0] else row[0], *row[1:]] for i, row in enumerate(rows)]


@dataclass(frozen=True)
class Table:
    """A table ready to print. `left`: columns aligned left (from the first); the others are numbers."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    def __bool__(self) -> bool:
        return bool(self.rows)

    def __str__(self) -> str:
        grid = [[cell.replace("|", "\\|") or " " for cell in row] for row in (self.head, *self.rows)]
        if any(len(row) != len(self.head) for row in grid):
            raise ValueError(f"a row of the table {list(self.head)} has another number of cells")
        widths = [max(3, *(_width(row[column]) for row in grid)) for column in range(len(self.head))]
        lines = []
        for row in grid:
            cells = [self._pad(cell, widths[column], column) for column, cell in enumerate(row)]
            lines.append(f"| {' | '.join(cells)} |")
        rule = [("-" * w if column < self.left else "-" * (w - 1) + ":") for column, w in enumerate(widths)]
        return "\n".join([lines[0], f"| {' | '.join(rule)} |", *lines[1:]])

    def _pad(self, cell: str, width: int, column: int) -> str:
        space = " " * (width - _width(cell))
        return cell + space if column < self.left else space + cell


def _width(cell: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in cell)
