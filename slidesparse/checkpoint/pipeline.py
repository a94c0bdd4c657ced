"""Overlap of disk and compute: inputs are read ahead by one thread, shards are written behind by others.

Both are bounded, so memory stays small whatever the model's size.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Self, TypeVar

WRITERS = 2
"""While one shard waits for the disk to confirm it, the next is copied to the disk's queue."""
QUEUED_BYTES = 512 * 2**20
"""Shards waiting to be written; one that is larger than this waits alone."""

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class WriteBehind:
    """A context that runs write jobs in threads. Leaving it waits for all; the first error is raised.

    After an error, or when the block is left by one, jobs not yet begun are dropped: shards are written whole
    or not at all, and the next run makes those that are missing.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(WRITERS, thread_name_prefix="write")
        self._room = threading.Condition()
        self._queued = 0
        self._error: BaseException | None = None

    def put(self, nbytes: int, job: Callable[[], object]) -> None:
        """Queue a job that holds `nbytes` of memory; waits for room. Raises the first error of earlier jobs."""
        with self._room:
            self._room.wait_for(lambda: self._error or not self._queued or self._queued + nbytes <= QUEUED_BYTES)
            self._raise_error()
            self._queued += nbytes
        self._pool.submit(self._run, nbytes, job)

    def _run(self, nbytes: int, job: Callable[[], object]) -> None:
        try:
            if self._error is None:
                job()
        except BaseException as error:
            with self._room:
                self._error = self._error or error
        finally:
            with self._room:
                self._queued -= nbytes
                self._room.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        if kind is None:
            self._raise_error()


def read_ahead(items: Iterable[Item], load: Callable[[Item], Loaded]) -> Iterator[tuple[Item, Loaded]]:
    """Yield each item with what `load` gives for it, loading the next one meanwhile. Errors of `load` are raised."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        waiting: tuple[Item, Future[Loaded]] | None = None
        for item in items:
            future = pool.submit(load, item)
            if waiting is not None:
                yield waiting[0], waiting[1].result()
            waiting = item, future
        if waiting is not None:
            yield waiting[0], waiting[1].result()
