"""Rows on their way into one table: what is done already, and writes that are grouped by time.

A table is rewritten whole with every append (that is what makes it atomic), so hundreds of cells of a few
milliseconds are written in groups. A run that is killed loses what it measured in the last second, no more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import TracebackType

from slidesparse import records
from slidesparse.errors import SlideSparseError
from slidesparse.rows import Row

FLUSH_S = 1.0


def reason_of(error: BaseException) -> str:
    """One line for the `reason` column."""
    text = " ".join(str(error).split())
    return text if isinstance(error, SlideSparseError) else f"{type(error).__name__}: {text}"


class RowBook:
    """Use as a context: on leaving, whatever the reason, rows still in hand are written.

    `before` is called before each write: for what must be on disk when a row says that its cell is done.
    """

    def __init__(self, path: Path, header: Iterable[str] = (), before: Callable[[], None] | None = None) -> None:
        self._path, self._header, self._before = path, list(header), before
        self._finished: dict[tuple[str, ...], dict[tuple[object, ...], str]] = {}
        """By the names of a key, which every cell of a table shares."""
        self._pending: list[Row] = []
        self._flushed = time.monotonic()

    def done(self, key: dict[str, object], fingerprint: str) -> bool:
        """Was the cell finished, under the same conditions, when this was first asked? Raises RecordError."""
        names = tuple(key)
        if names not in self._finished:
            self._finished[names] = records.finished(records.read(self._path), names)
        return self._finished[names].get(tuple(key.values())) == fingerprint

    def add(self, *rows: Row) -> None:
        """Take rows; write them if the last write is a second ago. Raises DiskError, RecordError."""
        self._pending.extend(rows)
        if time.monotonic() - self._flushed >= FLUSH_S:
            self.flush()

    def flush(self) -> None:
        """Write now. Raises DiskError, RecordError."""
        rows, self._pending = self._pending, []
        if rows:
            if self._before is not None:
                self._before()
            records.append(self._path, rows, self._header)
        self._flushed = time.monotonic()

    def __enter__(self) -> RowBook:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.flush()
