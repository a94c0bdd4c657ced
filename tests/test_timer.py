"""Statistics, the stopping rule on a clock that tests control, telemetry with a driver that tests play."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest

from slidesparse.config import Stopping
from slidesparse.machine import Gpu, detect
from slidesparse.measure import statistics
from slidesparse.measure.statistics import Interval
from slidesparse.measure.telemetry import CpuProbe, GpuProbe, Sample, Telemetry, probe
from slidesparse.measure.timer import Call, WallClock, leading, measure, measure_together, ratio


class FakeClock:
    """Time passes only inside calls: each takes the next of the given durations."""

    def __init__(self, durations: Iterator[float]) -> None:
        self._durations, self._now = durations, 0.0
        self.calls = 0

    def now(self) -> float:
        return self._now

    batch = 1

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Call:
        return calls[0]

    def times(self, calls: Sequence[Call]) -> list[float]:
        return [self.time(call) for call in calls]

    def time(self, call: Call) -> float:
        call()
        self.calls += 1
        seconds = next(self._durations)
        self._now += seconds
        return seconds


def rule(**changes: float) -> Stopping:
    values = {"warmup_s": 0.0, "min_samples": 5, "max_samples": 50, "ci_rel": 0.05, "cap_s": 100.0}
    return Stopping.model_validate(values | changes)


def noisy(seed: int = 0) -> Iterator[float]:
    rng = np.random.default_rng(seed)
    while True:
        yield float(np.exp(rng.normal(0, 1)))


# -- statistics ----------------------------------------------------------------------------------------


def test_order_statistic_interval_is_the_textbook_one() -> None:
    """n = 10: X(2) to X(9) covers the median with 97.9 %, X(3) to X(8) with only 89.1 %."""
    interval = statistics.median_interval([float(value) for value in (3, 1, 2, 10, 9, 8, 7, 6, 5, 4)])
    assert interval == Interval(5.5, 2.0, 9.0)
    six = statistics.median_interval([1.0, 2, 3, 4, 5, 6])
    assert (six.low, six.high) == (1.0, 6.0)


@pytest.mark.parametrize("count", [3, 5, 6, 20])
def test_intervals_cover_the_true_median_as_often_as_they_say(count: int) -> None:
    rng = np.random.default_rng(count)
    runs = 600
    inside = 0
    for _ in range(runs):
        interval = statistics.median_interval(np.exp(rng.normal(2, 0.3, count)).tolist())
        inside += interval.low <= np.exp(2) <= interval.high
    assert inside / runs >= 0.93, "95 %, less three standard errors of this simulation"


def test_one_sample_has_no_interval() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        statistics.median_interval([1.0])


def test_rates_turn_the_interval_round() -> None:
    rate = Interval(2.0, 1.0, 4.0).rate(8.0)
    assert (rate.median, rate.low, rate.high) == (4.0, 2.0, 8.0)


def test_paired_ratio_cancels_what_both_share() -> None:
    drift = np.linspace(1, 10, 40)
    ratio = statistics.paired_ratio((2 * drift).tolist(), drift.tolist())
    assert (ratio.median, ratio.low, ratio.high) == pytest.approx((2.0, 2.0, 2.0))
    with pytest.raises(ValueError, match="not pairs"):
        statistics.paired_ratio([1.0], [1.0, 2.0])


def test_unpaired_ratio_covers_the_truth() -> None:
    rng = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        a, b = (statistics.median_interval(np.exp(rng.normal(mu, 0.2, 15)).tolist()) for mu in (1.0, 0.0))
        ratio = statistics.unpaired_ratio(a, b)
        inside += ratio.low <= np.e <= ratio.high
    assert inside / 400 >= 0.93


# -- stopping rule -------------------------------------------------------------------------------------


def test_steady_samples_stop_by_interval_at_the_minimum() -> None:
    samples = measure(lambda: None, rule(), FakeClock(cycle([1.0])))
    assert (samples.stop, len(samples.values)) == ("interval", 5)
    assert samples.interval == Interval(1.0, 1.0, 1.0)


def test_noise_stops_at_the_sample_cap() -> None:
    samples = measure(lambda: None, rule(cap_s=1e9), FakeClock(noisy()))
    assert (samples.stop, len(samples.values)) == ("sample cap", 50)


def test_noise_stops_at_the_time_cap() -> None:
    clock = FakeClock(noisy())
    samples = measure(lambda: None, rule(cap_s=10.0), clock)
    assert samples.stop == "time cap"
    assert sum(samples.values[:-1]) < 10.0 <= sum(samples.values)


def test_a_slow_call_still_gets_two_samples() -> None:
    """One sample has no interval; the row must not claim one."""
    samples = measure(lambda: None, rule(cap_s=1.0, min_samples=3), FakeClock(cycle([60.0, 90.0])))
    assert (samples.stop, len(samples.values)) == ("time cap", 2)
    assert samples.interval.rel > 0.1


def test_warm_up_is_thrown_away() -> None:
    clock = FakeClock(iter([50.0] + [1.0] * 100))
    samples = measure(lambda: None, rule(warmup_s=52.0), clock)
    assert samples.warmup_s == 52.0
    assert 50.0 not in samples.values
    clock = FakeClock(iter([50.0] + [1.0] * 100))
    assert 50.0 not in measure(lambda: None, rule(warmup_s=0.0), clock).values, "even without warm-up time"


def test_other_calls_may_warm_up_a_round_at_a_time() -> None:
    log: list[str] = []
    clock = FakeClock(cycle([1.0]))
    clock.batch = 4
    calls, short = [lambda: log.append("call")], [lambda: log.append("short")]
    timed = measure_together(calls, rule(warmup_s=2.5), clock, 0, warm_up=short, before=lambda: log.append("begin"))
    assert log == ["short"] * 3 + ["begin"] + ["call"] * 8
    assert len(timed[0].values) == 8, "whole batches only"


def test_calls_measured_together_take_turns_in_random_order_and_repeatably() -> None:
    def run(seed: int) -> str:
        order: list[str] = []
        calls = [lambda name=name: order.append(name) for name in "abc"]  # type: ignore[misc]
        timed = measure_together(calls, rule(min_samples=20), FakeClock(cycle([1.0])), seed)
        assert [len(samples.values) for samples in timed] == [20, 20, 20]
        assert sorted(order[:3]) == sorted(order[-3:]) == ["a", "b", "c"]
        return "".join(order)

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len({run(1)[place : place + 3] for place in range(0, 60, 3)}) > 3


def test_a_batch_of_rounds_is_handed_over_at_once_and_still_paired() -> None:
    clock = FakeClock(cycle([1.0]))
    clock.batch = 4
    handed: list[int] = []
    times = clock.times
    clock.times = lambda calls: (handed.append(len(calls)), times(calls))[1]  # type: ignore[method-assign]
    first, second = measure_together([lambda: None, lambda: None], rule(min_samples=6), clock, 0)
    assert len(first.values) == len(second.values) == 8, "whole batches"
    assert handed == [8, 8, 8], "one batch of warm-up, two of samples"


class SpeedsDiffer(FakeClock):
    """Each call takes what it returns, times the drift of the clock."""

    def __init__(self, drift: float = 0.0) -> None:
        super().__init__(iter(()))
        self.drift = drift

    def time(self, call: Call) -> float:
        self.calls += 1
        seconds = float(call()) * (1 + self._now * self.drift)  # type: ignore[arg-type]
        self._now += seconds
        return seconds


@pytest.mark.parametrize("order", [1, -1])
def test_the_ratio_decides_whichever_of_the_two_is_faster(order: int) -> None:
    """A sparse GEMM slower than its dense twin, which is timed last: steady dense samples alone prove nothing."""
    spread = noisy()
    calls = [lambda: next(spread), lambda: 1e-3]
    timed = measure_together(calls[::order], rule(), SpeedsDiffer(), 0)
    assert [samples.stop for samples in timed] == ["sample cap"] * 2


def test_drift_that_ruins_the_medians_leaves_the_paired_ratio() -> None:
    """A machine that slows down several times over while measuring: what was throttled in published tables."""
    first, second = measure_together(
        [lambda: 2.0, lambda: 1.0], rule(max_samples=21, min_samples=21), SpeedsDiffer(1 / 60), 0
    )
    assert first.values[-1] > 2 * first.values[0]
    assert ratio(first, second).median == pytest.approx(2.0, rel=0.05)


def test_a_quick_look_finds_the_leaders_of_many_and_spares_a_few_the_look() -> None:
    clock = SpeedsDiffer()
    costs = [5.0, 1.0, 3.0, 2.0, 4.0, 6.0]
    candidates = [[lambda cost=cost: cost] for cost in costs]  # type: ignore[misc]
    assert leading(candidates, clock, count=3) == [1, 3, 2]
    clock.calls = 0
    assert leading(candidates[:3], clock, count=3) == [0, 1, 2]
    assert clock.calls == 0


def test_warm_up_goes_on_until_the_speed_is_steady() -> None:
    """Windows of 2 s: fast, slowing, steady. Without the rule the fast ones would be measured."""
    durations = [0.5] * 4 + [0.8] * 3 + [1.0] * 100
    samples = measure(lambda: None, rule(warmup_s=2.0, steady_rel=0.01), FakeClock(iter(durations)))
    assert set(samples.values) == {1.0}
    hasty = measure(lambda: None, rule(warmup_s=2.0), FakeClock(iter(durations)))
    assert 0.8 in hasty.values


def test_a_machine_that_never_settles_is_measured_all_the_same() -> None:
    clock = FakeClock(1.5**n for n in range(60))
    assert measure(lambda: None, rule(steady_rel=0.01, max_samples=10, cap_s=1e30), clock).stop == "sample cap"


def test_columns_are_in_the_unit_asked_for() -> None:
    columns = measure(lambda: None, rule(), FakeClock(cycle([0.002]))).columns(1e6)
    assert columns["ci_low"] == columns["p20"] == pytest.approx(2000.0)
    assert columns["ci_rel"] == 0
    assert (columns["samples"], columns["stop"]) == (5, "interval")


def test_the_wall_clock_sees_time() -> None:
    long, short = WallClock().times([lambda: sum(range(200_000)), lambda: None])
    assert long > short > 0


# -- telemetry -----------------------------------------------------------------------------------------


class FakeNvmlError(Exception):
    pass


def fake_nvml(power_fails: bool) -> SimpleNamespace:
    def power(handle: object) -> int:
        if power_fails:
            raise FakeNvmlError
        return 350_500

    return SimpleNamespace(
        NVMLError=FakeNvmlError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1755,
        nvmlDeviceGetTemperature=lambda handle, kind: 61,
        nvmlDeviceGetPowerUsage=power,
        nvmlDeviceGetCurrentClocksThrottleReasons=lambda handle: 0x1 | 0x4 | 0x40,
    )


def test_gpu_telemetry_names_throttle_reasons() -> None:
    with Telemetry(GpuProbe(fake_nvml(False), object())) as watch:
        pass
    assert watch.columns() == {
        "clock_mhz": 1755.0,
        "power_w": 350.5,
        "temperature_c": 61.0,
        "throttle": "power cap, thermal (hardware)",
    }


def test_what_the_driver_does_not_tell_is_minus_one() -> None:
    assert GpuProbe(fake_nvml(True), object()).read().power_w == -1


def test_a_gpu_without_nvml_is_measured_without_telemetry(monkeypatch: pytest.MonkeyPatch) -> None:
    nvml = fake_nvml(False)

    def no_library() -> None:
        raise FakeNvmlError

    nvml.nvmlInit = no_library
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    gpu = Gpu("GB10", (12, 1), 1 << 37, "580")
    with Telemetry(probe(replace(detect(), gpu=gpu))) as watch:
        pass
    assert watch.columns() == {"clock_mhz": -1, "power_w": -1, "temperature_c": -1, "throttle": ""}


def test_a_long_block_is_sampled_throughout() -> None:
    class Probe:
        reads = 0

        def read(self) -> Sample:
            self.reads += 1
            return Sample(clock_mhz=1000.0 + self.reads)

    probe = Probe()
    with Telemetry(probe, period_s=0.002) as watch:
        time.sleep(0.1)
    assert probe.reads > 3
    assert watch.peak_rss_mib > 1
    reads = probe.reads
    time.sleep(0.02)
    assert probe.reads == reads, "the thread has ended"


def test_cpu_telemetry_knows_clock_or_minus_one() -> None:
    sample = CpuProbe().read()
    assert sample.clock_mhz == -1 or sample.clock_mhz > 100
    assert (sample.power_w, sample.temperature_c, sample.throttle) == (-1, -1, 0)
