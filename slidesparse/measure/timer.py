"""The timer behind every number: warm-up, samples until the stopping rule is met, and which rule it was.

A measurement stops when the 95 % interval of its median is narrow enough (`interval`), at `max_samples`
(`sample cap`), or after `cap_s` (`time cap`), but never with fewer than two samples, which have no interval.
The interval is looked at after every sample up to 32, then at growing distance: looking often and stopping at the
first narrow one makes it slightly too optimistic, looking rarely wastes time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slidesparse.config import Stopping
from slidesparse.measure import statistics
from slidesparse.measure.statistics import Interval

Stop = Literal["interval", "time cap", "sample cap"]
EVERY_SAMPLE = 32
"""Up to this count the interval is looked at after every sample."""
FINALISTS = 4
"""Where there are more candidates than this, a quick look picks so many to be measured."""
STEADY_WINDOWS = 10
"""Windows of warm-up after which a machine that does not settle is measured all the same; its spread shows it."""
SHORTEST_S = 1e-9
"""A clock that shows no time at all has not seen the call; logarithms need more than 0."""


Call = Callable[[], object]


class Clock(Protocol):
    """Times calls, on the host (`WallClock`) or on a GPU (`cuda_clock.CudaClock`)."""

    batch: int
    """Rounds that are handed over at once, so that a device never waits for the host."""

    def now(self) -> float:
        """Seconds on a monotonic scale, for warm-up and caps."""

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Call:
        """One call to time, which stands for `calls`: the same work on different buffers, beyond the caches.

        `brief`: for a quick look, each once.
        """

    def times(self, calls: Sequence[Call]) -> list[float]:
        """Seconds that each of these prepared calls takes, run one after the other."""


class WallClock:
    """`perf_counter_ns`: for code that has finished when it returns."""

    batch = 1

    def now(self) -> float:
        return time.perf_counter_ns() * 1e-9

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Call:
        return calls[0]

    def times(self, calls: Sequence[Call]) -> list[float]:
        seconds = []
        for call in calls:
            start = time.perf_counter_ns()
            call()
            seconds.append((time.perf_counter_ns() - start) * 1e-9)
        return seconds


@dataclass(frozen=True)
class Samples:
    """What was measured: seconds a sample, and why it ended."""

    values: tuple[float, ...]
    stop: Stop
    warmup_s: float
    measure_s: float

    @property
    def interval(self) -> Interval:
        return statistics.median_interval(self.values)

    @property
    def p20(self) -> float:
        return statistics.percentile(self.values, 20)

    @property
    def p80(self) -> float:
        return statistics.percentile(self.values, 80)

    def columns(self, factor: float) -> dict[str, Any]:
        """The statistics columns of a timed row, in seconds times `factor`."""
        interval = self.interval.scaled(factor)
        return {
            "samples": len(self.values),
            "p20": self.p20 * factor,
            "p80": self.p80 * factor,
            "ci_low": interval.low,
            "ci_high": interval.high,
            "ci_rel": interval.rel,
            "stop": self.stop,
        }


def measure(call: Call, stopping: Stopping, clock: Clock) -> Samples:
    """Time one prepared call until the stopping rule is met."""
    return measure_together([call], stopping, clock, 0)[0]


def measure_together(
    calls: Sequence[Call],
    stopping: Stopping,
    clock: Clock,
    seed: int,
    warm_up: Sequence[Call] | None = None,
    before: Callable[[], object] | None = None,
) -> list[Samples]:
    """Time prepared calls side by side, in random order in each round, so that drift hits all alike.

    Sample i of each belongs to round i: `ratio` pairs them. Stops by `interval` when the medians of the last call and
    of the fastest other one, and their ratio, are narrow enough. `cap_s` is for all together.

    Args:
        warm_up: shorter calls that warm up, a round at a time; the calls themselves if None.
        before: called between warm-up and the first sample.
    """
    order = random.Random(seed)
    values: list[list[float]] = [[] for _ in calls]

    def rounds(of: Sequence[Call] = calls, count: int = clock.batch) -> float:
        places = [order.sample(range(len(of)), len(of)) for _ in range(count)]
        flat = [place for round_ in places for place in round_]
        for place, seconds in zip(flat, clock.times([of[place] for place in flat]), strict=True):
            values[place].append(max(seconds, SHORTEST_S))
        return sum(own[-1] for own in values)

    warmup_s = _warm_up(rounds if warm_up is None else lambda: rounds(warm_up, 1), stopping, clock)
    for own in values:
        own.clear()
    if before is not None:
        before()
    start = clock.now()

    def narrow() -> bool:
        *others, last = values
        widths = [statistics.median_interval(last).rel]
        if others:
            best = min(others, key=lambda own: statistics.percentile(own, 50))
            widths += [statistics.median_interval(best).rel, statistics.paired_ratio(last, best).rel]
        return max(widths) <= stopping.ci_rel

    stop: Stop | None = None
    while stop is None:
        rounds()
        stop = _stop(len(values[0]), clock.now() - start, stopping, narrow)
    seconds = clock.now() - start
    return [Samples(tuple(own), stop, warmup_s, seconds) for own in values]


def ratio(numerator: Samples, denominator: Samples) -> Interval:
    """Median of the round-by-round ratios of two calls that were measured together."""
    return statistics.paired_ratio(numerator.values, denominator.values)


def leading(candidates: Sequence[Sequence[Call]], clock: Clock, count: int = FINALISTS, rounds: int = 3) -> list[int]:
    """Places of the candidates worth measuring: all of a few, else those that lead a quick look of some rounds."""
    if len(candidates) <= count:
        return list(range(len(candidates)))
    prepared = [clock.prepare(calls, brief=True) for calls in candidates]
    taken = [clock.times(prepared) for _ in range(rounds + 1)][1:]
    seconds = [statistics.percentile(column, 50) for column in zip(*taken, strict=True)]
    return sorted(range(len(candidates)), key=seconds.__getitem__)[:count]


def _warm_up(sample: Callable[[], float], stopping: Stopping, clock: Clock) -> float:
    """At least one sample, thrown away: code is loaded, caches have settled, and so has the clock rate.

    With `steady_rel` it goes on, in windows of `warmup_s`, until the medians of two windows that follow each other
    agree: a GPU that has rested runs faster than it can go on running (H200: up to 20 % for 100 ms).
    """
    start = clock.now()
    before = 0.0
    for _ in range(STEADY_WINDOWS):
        opened = clock.now()
        window = [sample()]
        while clock.now() - opened < stopping.warmup_s:
            window.append(sample())
        median = statistics.percentile(window, 50)
        if stopping.steady_rel is None or abs(median - before) <= stopping.steady_rel * median:
            break
        before = median
    return clock.now() - start


def _stop(count: int, seconds: float, stopping: Stopping, narrow: Callable[[], bool]) -> Stop | None:
    if count < 2:
        return None
    due = count <= EVERY_SAMPLE or count % (count.bit_length() * 2) == 0
    last = count >= stopping.max_samples or seconds >= stopping.cap_s
    if count >= stopping.min_samples and (due or last) and narrow():
        return "interval"
    if count >= stopping.max_samples:
        return "sample cap"
    return "time cap" if seconds >= stopping.cap_s else None
