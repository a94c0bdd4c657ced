"""Overlap of disk and compute: inputs are read ahead, layers are computed side by side, shards written behind.

Every queue is bounded by bytes, so memory stays small whatever the model's size. Parallelism is by Python
threads over layers, with kernels that release the interpreter lock and use one thread each: OpenMP teams
would burn the cores that the writers need while they wait for each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from types import TracebackType
from typing import Self, TypeVar

import torch

WRITERS = 2
"""While one shard waits for the disk to confirm it, the next is copied to the disk's queue."""
WRITE_BYTES = 512 * 2**20
"""Shards waiting to be written; one that is larger than this waits alone."""
MOST_WORKERS = 16
COMPUTE_BYTES = 1024 * 2**20
"""Inputs of layers waiting to be computed."""

Item = TypeVar("Item")
Loaded = TypeVar("Loaded")


class Background:
    """A context that runs jobs in threads. Leaving it waits for all; the first error is raised.

    After an error, or when the block is left by one, jobs not yet begun are dropped: shards are written whole
    or not at all, and the next run makes those that are missing.
    """

    def __init__(self, workers: int, room_bytes: int, prepare_thread: Callable[[], None] | None = None) -> None:
        self._pool = ThreadPoolExecutor(workers, initializer=prepare_thread)
        self._room_bytes = room_bytes
        self._changed = threading.Condition()
        self._held = 0
        self._error: BaseException | None = None

    def put(self, nbytes: int, job: Callable[[], object]) -> None:
        """Queue a job that holds `nbytes` of memory; waits for room. Raises the first error of earlier jobs."""
        with self._changed:
            self._changed.wait_for(lambda: self._error or not self._held or self._held + nbytes <= self._room_bytes)
            self._raise_error()
            self._held += nbytes
        self._pool.submit(self._run, nbytes, job)

    def _run(self, nbytes: int, job: Callable[[], object]) -> None:
        try:
            if self._error is None:
                job()
        except BaseException as error:
            with self._changed:
                self._error = self._error or error
        finally:
            with self._changed:
                self._held -= nbytes
                self._changed.notify_all()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            self._pool.shutdown(wait=True, cancel_futures=kind is not None)
        except BaseException as interrupt:  # Ctrl-C while waiting: jobs that run are finished, no other begins
            self._error = self._error or interrupt
            self._pool.shutdown(wait=True, cancel_futures=True)
            raise
        if kind is None:
            self._raise_error()


def write_behind() -> Background:
    """Threads for jobs that write a shard each."""
    return Background(WRITERS, WRITE_BYTES)


@contextmanager
def side_by_side() -> Iterator[Background]:
    """Threads for jobs that compute, one a core; torch is left with one thread inside them."""
    threads = torch.get_num_threads()
    workers = min(len(os.sched_getaffinity(0)), MOST_WORKERS)
    try:
        with Background(workers, COMPUTE_BYTES, partial(torch.set_num_threads, 1)) as background:
            yield background
    finally:
        torch.set_num_threads(threads)  # also the default of threads that are started later


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
