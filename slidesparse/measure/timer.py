"""The timer behind every number: warm-up, samples until the stopping rule is met, and which rule it was.

A measurement stops when the 95 % interval of its median is narrow enough (`interval`), at `max_samples`
(`sample cap`), or after `cap_s` (`time cap`), but never with fewer than two samples, which have no interval.
The interval is looked at after every sample up to 32, then at growing distance: looking often and stopping at the
first narrow one makes it slightly too optimistic, looking rarely wastes time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from slidesparse.config import Stopping
from slidesparse.measure import statistics
from slidesparse.measure.statistics import Interval

Stop = Literal["interval", "time cap", "sample cap"]
EVERY_SAMPLE = 32
"""Up to this count the interval is looked at after every sample."""
SHORTEST_S = 1e-9
"""A clock that shows no time at all has not seen the call; logarithms need more than 0."""


class Clock(Protocol):
    """Times one call. A CUDA-event clock implements the same two methods."""

    def now(self) -> float:
        """Seconds on a monotonic scale, for warm-up and caps."""

    def time(self, call: Callable[[], object]) -> float:
        """Seconds that one call takes."""


class WallClock:
    """`perf_counter_ns`: for code that has finished when it returns."""

    def now(self) -> float:
        return time.perf_counter_ns() * 1e-9

    def time(self, call: Callable[[], object]) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) * 1e-9


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


@dataclass(frozen=True)
class Pairs:
    """Two calls timed side by side."""

    first: Samples
    second: Samples
    ratio: Interval
    """Median of first / second."""


def measure(call: Callable[[], object], stopping: Stopping, clock: Clock) -> Samples:
    """Time a call until the stopping rule is met."""
    return collect(lambda: clock.time(call), stopping, clock)


def collect(sample: Callable[[], float], stopping: Stopping, clock: Clock) -> Samples:
    """As `measure`, for a `sample` that times itself and returns seconds."""
    warmup_s = _warm_up(sample, stopping, clock)
    values: list[float] = []
    start = clock.now()

    def narrow() -> bool:
        return statistics.median_interval(values).rel <= stopping.ci_rel

    stop: Stop | None = None
    while stop is None:
        values.append(max(sample(), SHORTEST_S))
        stop = _stop(len(values), clock.now() - start, stopping, narrow)
    return Samples(tuple(values), stop, warmup_s, clock.now() - start)


def measure_pairs(
    first: Callable[[], object], second: Callable[[], object], stopping: Stopping, clock: Clock, seed: int
) -> Pairs:
    """Time two calls alternately, in random order within each pair, so that drift hits both alike.

    Stops by `interval` when both the second call's median and the ratio are narrow enough. `cap_s` is for both.
    """
    order = random.Random(seed)
    ones: list[float] = []
    twos: list[float] = []

    def pair() -> float:
        if order.random() < 0.5:
            one, two = clock.time(first), clock.time(second)
        else:
            two, one = clock.time(second), clock.time(first)
        ones.append(max(one, SHORTEST_S))
        twos.append(max(two, SHORTEST_S))
        return one + two

    warmup_s = _warm_up(pair, stopping, clock)
    ones.clear()
    twos.clear()
    start = clock.now()

    def narrow() -> bool:
        own, ratio = statistics.median_interval(twos), statistics.paired_ratio(ones, twos)
        return max(own.rel, ratio.rel) <= stopping.ci_rel

    stop: Stop | None = None
    while stop is None:
        pair()
        stop = _stop(len(ones), clock.now() - start, stopping, narrow)
    seconds = clock.now() - start
    a, b = (Samples(tuple(values), stop, warmup_s, seconds) for values in (ones, twos))
    return Pairs(a, b, statistics.paired_ratio(ones, twos))


def _warm_up(sample: Callable[[], object], stopping: Stopping, clock: Clock) -> float:
    """At least one sample, thrown away: code is loaded, caches and clocks have settled."""
    start = clock.now()
    sample()
    while clock.now() - start < stopping.warmup_s:
        sample()
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
