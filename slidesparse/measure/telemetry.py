"""Clocks, power, temperature, throttling and memory while something is measured; -1 where it cannot be known."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from types import ModuleType, TracebackType
from typing import Any, Protocol, TypeVar

import psutil

from slidesparse.machine import Machine
from slidesparse.rows import UNMEASURED

PERIOD_S = 0.2
"""A measurement that lasts is sampled this often by a thread; a short one at its start and end."""
THROTTLE_REASONS = {
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x20: "thermal (software)",
    0x40: "thermal (hardware)",
    0x80: "power brake",
}
"""NVML clocks-event bits that mean slower than asked for (nvml.h, nvmlClocksEventReason*); idle is not one."""

HARD_THROTTLE = 0x8 | 0x20 | 0x40 | 0x80
"""All but the power cap."""
COOL_DOWN_S = 5.0
TELEMETRY_PERIOD_S = 0.05
"""Of a thread beside a kernel measurement: a few looks in its fraction of a second, none long enough to hold it up."""
T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """One look at the device."""

    clock_mhz: float = UNMEASURED
    power_w: float = UNMEASURED
    temperature_c: float = UNMEASURED
    throttle: int = 0
    """Bits of `THROTTLE_REASONS`."""


class Probe(Protocol):
    """Reads one device."""

    def read(self) -> Sample:
        """Never raises; what cannot be read is -1."""


class CpuProbe:
    """Mean frequency of the cores, where the system tells it."""

    def read(self) -> Sample:
        try:
            frequency = psutil.cpu_freq()
        except (OSError, NotImplementedError):
            frequency = None
        return Sample(clock_mhz=float(frequency.current) if frequency and frequency.current else UNMEASURED)


class NoProbe:
    """Of a device that cannot be asked."""

    def read(self) -> Sample:
        return Sample()


class GpuProbe:
    """The GPU that torch uses, by NVML."""

    def __init__(self, nvml: ModuleType | Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle

    def read(self) -> Sample:
        nvml, handle = self._nvml, self._handle
        throttle = self._try(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        power = self._try(nvml.nvmlDeviceGetPowerUsage, handle)
        return Sample(
            self._try(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            power / 1000 if power >= 0 else UNMEASURED,
            self._try(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
            int(throttle) if throttle >= 0 else 0,
        )

    def _try(self, question: Any, *arguments: Any) -> float:
        try:
            return float(question(*arguments))
        except self._nvml.NVMLError:
            return UNMEASURED


def probe(machine: Machine) -> Probe:
    """The probe of the device that is measured: torch's GPU 0, or the CPU; one that knows nothing where the driver does
    not answer (a container without NVML, a part of a GPU)."""
    if machine.gpu is None:
        return CpuProbe()
    import pynvml
    import torch

    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(0).uuid}"
        return GpuProbe(pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid.encode()))
    except pynvml.NVMLError:
        return NoProbe()


@dataclass
class Telemetry:
    """Watches a device while its block runs.

    >>> with Telemetry(probe(machine)) as telemetry: ...
    >>> row = Row(**telemetry.columns())
    """

    device: Probe
    period_s: float | None = None
    """Sample in a thread this often; None: at start and end only."""
    peak_rss_mib: float = UNMEASURED
    """Largest resident memory of this process that a sample saw."""
    _samples: list[Sample] = field(default_factory=list)
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Telemetry:
        self._take()
        if self.period_s is not None:
            self._thread = threading.Thread(target=self._watch, args=(self.period_s,), daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._take()

    def columns(self) -> dict[str, Any]:
        """The columns of a timed row: median clock and power, highest temperature, every throttle reason seen."""
        return {
            "clock_mhz": _known(median, [sample.clock_mhz for sample in self._samples]),
            "power_w": _known(median, [sample.power_w for sample in self._samples]),
            "temperature_c": _known(max, [sample.temperature_c for sample in self._samples]),
            "throttle": ", ".join(name for bit, name in THROTTLE_REASONS.items() if self.bits & bit),
        }

    @property
    def bits(self) -> int:
        """Every throttle reason that a sample saw."""
        bits = 0
        for sample in self._samples:
            bits |= sample.throttle
        return bits

    def _watch(self, period_s: float) -> None:
        while not self._stop.wait(period_s):
            self._take()

    def _take(self) -> None:
        self._samples.append(self.device.read())
        self.peak_rss_mib = max(self.peak_rss_mib, psutil.Process().memory_info().rss / 2**20)


def measured_unthrottled(
    device: Probe, measure: Callable[[], T], period_s: float | None = None
) -> tuple[T, dict[str, Any]]:
    """What `measure` gives, and the telemetry columns while it ran.

    The rule for throttled samples: a power cap is how a GPU normally limits itself under load, so such samples count
    and the row names it. Anything hotter or harder (`HARD_THROTTLE`) is waited out and measured again, once; if it
    comes back, the row keeps the mark.
    """
    for attempt in range(2):
        with Telemetry(device, period_s) as watch:
            result = measure()
        if attempt or not watch.bits & HARD_THROTTLE:
            break
        time.sleep(COOL_DOWN_S)
    return result, watch.columns()


def _known(summary: Any, values: list[float]) -> float:
    known = [value for value in values if value >= 0]
    return round(float(summary(known)), 2) if known else UNMEASURED
