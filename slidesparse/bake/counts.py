"""Hits and misses of Triton's cache in a run, all of its processes together.

While a run lasts, a variable of the environment names a file, and every process of the run that calls `follow` adds a
line to it whenever Triton has looked into its cache.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VARIABLE = "SLIDESPARSE_TRITON_LOG"
OURS = "slidesparse."


@dataclass(frozen=True)
class Counts:
    """Kernels looked for in the cache, each counted once a process."""

    hits: int = 0
    misses: int = 0
    others_hits: int = 0
    others_misses: int = 0
    """Kernels of other packages: of the engine, of torch.compile."""
    compiled: tuple[str, ...] = ()
    """Which of ours were not there."""

    def __str__(self) -> str:
        text = f"triton cache: {self.hits} hits, {self.misses} misses"
        if self.compiled:
            text += f" ({', '.join(f'{count} x {name}' for name, count in sorted(Counter(self.compiled).items()))})"
        if self.others_hits or self.others_misses:
            text += f"; of other packages {self.others_hits} hits, {self.others_misses} misses"
        return text

    @property
    def empty(self) -> bool:
        return not (self.hits or self.misses or self.others_hits or self.others_misses)


@contextmanager
def counting(log: Path, here: bool) -> Iterator[Callable[[], Counts]]:
    """Count as long as the block lasts. Gives a function that says how many there were so far.

    Args:
        log: a file that is made when there is something to count, and removed in the end.
        here: whether this process launches kernels itself. Triton is imported then.
    """
    os.environ[VARIABLE] = str(log.absolute())
    try:
        if here:
            follow()
        yield lambda: read(log)
    finally:
        del os.environ[VARIABLE]
        log.unlink(missing_ok=True)


def follow() -> None:
    """From now on this process counts, for the run that started it; without a run, or without Triton, nothing happens.

    A listener that is there already goes on listening.
    """
    if VARIABLE not in os.environ:
        return
    try:
        import triton
    except ImportError:
        return
    before = triton.knobs.compilation.listener
    if not isinstance(before, _Listener):
        triton.knobs.compilation.listener = _Listener(before)


def read(log: Path) -> Counts:
    """What the file says."""
    try:
        lines = [line.split(" ") for line in log.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return Counts()
    ours = Counter(result for result, name in lines if name.startswith(OURS))
    others = Counter(result for result, name in lines if not name.startswith(OURS))
    missed = tuple(name for result, name in lines if result == "miss" and name.startswith(OURS))
    return Counts(ours["hit"], ours["miss"], others["hit"], others["miss"], missed)


class _Listener:
    """What Triton calls after each look into its cache."""

    def __init__(self, before: Callable[..., None] | None) -> None:
        self._before = before

    def __call__(self, **event: Any) -> None:
        if self._before is not None:
            self._before(**event)
        log = os.environ.get(VARIABLE)
        if log is None:  # the run is over
            return
        source = event["src"]
        module = getattr(getattr(source, "fn", None), "__module__", None) or "unknown"
        name = f"{module}.{source.name}".replace(" ", "_")
        # One write to the end of a file is not torn by other processes.
        with open(log, "a", encoding="utf-8") as stream:
            stream.write(f"{'hit' if event['cache_hit'] else 'miss'} {name}\n")
