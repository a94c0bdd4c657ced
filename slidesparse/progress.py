"""Progress of everything that lasts: bars with ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

PLAIN_INTERVAL_S = 5.0
"""A log file gets a line this often, and one at the end."""


class Bar(Protocol):
    """One running count."""

    def advance(self, count: float = 1, note: str = "") -> None:
        """`count` more units are done; `note` says what is being done now."""


class _RichBar:
    def __init__(self, progress: RichProgress, title: str, total: float) -> None:
        self._progress = progress
        self._task = progress.add_task(title, total=total, note="")

    def advance(self, count: float = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=count, note=note)


class _PlainBar:
    def __init__(self, title: str, total: float) -> None:
        self._title, self._total, self._done = title, total, 0.0
        self._start = self._said = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: float = 1, note: str = "") -> None:
        with self._lock:  # stages advance it from several threads
            self._done += count
            now = time.monotonic()
            if now - self._said >= PLAIN_INTERVAL_S or self._done >= self._total:
                self._said = now
                left = (now - self._start) / max(self._done, 1e-9) * (self._total - self._done)
                share = self._done / self._total if self._total else 1.0
                print(f"  {self._title}: {share:4.0%}, {left:.0f} s left {note}".rstrip(), file=sys.stderr, flush=True)


class _SilentBar:
    def advance(self, count: float = 1, note: str = "") -> None:
        """Say nothing."""


@contextmanager
def track(title: str, total: float, quiet: bool = False) -> Iterator[Bar]:
    """A bar over `total` units, gone when the block ends. On stderr, so that stdout stays for results."""
    if quiet:
        yield _SilentBar()
        return
    if not sys.stderr.isatty():
        yield _PlainBar(title, total)
        return
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True), transient=True) as progress:
        yield _RichBar(progress, title, total)
