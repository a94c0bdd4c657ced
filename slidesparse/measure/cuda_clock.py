"""GPU time: CUDA graphs between CUDA events, so that neither Python nor the launch of a kernel is part of a sample."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch

from slidesparse.measure.timer import Call

SAMPLE_S = 300e-6
"""A sample repeats its calls until it lasts about this long: events resolve half a microsecond."""
MOST_LAUNCHES = 2000
MOST_SETS = 1024
"""Reached by sets below 0.1 MB on an L2 of 50 MB: smaller than any that a plan times."""
HEAD_START_CYCLES = 60_000
"""The device idles this long (about 40 us) before each batch, so that the host has handed all of it over by then."""


class Pool:
    """Memory that graphs share, for as long as one of them lives. Use `current`.

    Each graph on its own would keep what it allocates: hundreds of candidates fill any GPU. They replay one at a time,
    and what one leaves in there no other reads.
    """

    _latest: ClassVar[weakref.ref[Pool] | None] = None

    def __init__(self) -> None:
        self.handle = torch.cuda.graph_pool_handle()

    @classmethod
    def current(cls) -> Pool:
        """The pool of the graphs that live, or a new one."""
        # NOTES: torch refuses a capture into a pool whose graphs are all gone (internal assert, "use_count > 0"). The
        # memory of such a pool goes to no capture again until the cache is emptied, which a capture itself cannot do.
        pool = cls._latest() if cls._latest is not None else None
        if pool is None:
            free, total = torch.cuda.mem_get_info()
            if free < total // 2:
                torch.cuda.empty_cache()
            pool = cls()
            cls._latest = weakref.ref(pool)
        return pool


@dataclass(frozen=True)
class Graph:
    """Captured launches; calling it replays them. A graph knows addresses only: `calls` keeps the buffers alive."""

    graph: Any
    launches: int
    calls: tuple[Call, ...]
    pool: Pool

    def __call__(self) -> None:
        self.graph.replay()


class CudaClock:
    """Times calls that launch kernels on the current device.

    `prepare` captures them in a CUDA graph, over and over until a sample is long enough; `times` gives seconds a call.
    Calls must be safe to capture: no allocation outside torch's allocator, no synchronisation.
    """

    batch = 4

    def now(self) -> float:
        return time.perf_counter_ns() * 1e-9

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Graph:
        calls[0]()  # plans, compiled kernels
        once = _capture(calls, 1)
        if brief:
            return once
        seconds = self.times([once, once])[1] * once.launches
        repeats = min(int(SAMPLE_S / max(seconds, 1e-7)), MOST_LAUNCHES // len(calls))
        return once if repeats <= 1 else _capture(calls, repeats)

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Seconds of one launch of each. Raises ValueError for calls that `prepare` has not made."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        torch.cuda._sleep(HEAD_START_CYCLES)
        events[0].record()
        for call, end in zip(calls, events[1:], strict=True):
            call()
            end.record()
        events[-1].synchronize()
        seconds = []
        for call, start, end in zip(calls, events, events[1:], strict=False):
            if not isinstance(call, Graph):
                raise ValueError("only prepared calls can be timed on a GPU")
            seconds.append(start.elapsed_time(end) * 1e-3 / call.launches)
        return seconds


@lru_cache(maxsize=1)
def _capture_stream() -> torch.cuda.Stream:
    """One for all: torch hands memory of a pool only to the stream that it was first allocated on."""
    return torch.cuda.Stream()


def _capture(calls: Sequence[Call], repeats: int) -> Graph:
    # NOTES: not `torch.cuda.graph`: it collects garbage and empties the allocator's cache each time, tens of
    # milliseconds for each of thousands of candidates.
    stream, pool = _capture_stream(), Pool.current()
    stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        graph.capture_begin(pool.handle)
        try:
            for _ in range(repeats):
                # Outputs live until the round is over: memory freed earlier would be handed to the next call, and
                # found in the cache.
                kept = [call() for call in calls]
            del kept
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return Graph(graph, repeats * len(calls), tuple(calls), pool)


def sets_beyond_l2(bytes_per_set: int) -> int:
    """How many sets of buffers to take turns with, so that none is still in the L2 cache when its turn comes again."""
    l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return max(1, min(MOST_SETS, -(-2 * l2 // max(bytes_per_set, 1))))
