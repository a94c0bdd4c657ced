"""What this machine can do at most: the copy bandwidth of its memory, the rate at which its tensor cores multiply.

Every rate is that of the best of a few forms, each checked first, under steady power: a GPU that has rested runs faster
than it can go on running (H200: up to 20 % for 100 ms), and a bound must hold for a kernel that runs all day.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere, VerificationError
from slidesparse.kernels import peak_operands, verify
from slidesparse.kernels.peak_library import Form, Loads, PeakLibrary
from slidesparse.measure.statistics import percentile
from slidesparse.measure.timer import Call, Clock, Samples, measure, measure_together

METHOD = 1
"""Counts up with every change of what is measured here: older results are then measured again."""
LAUNCH_S = 4e-3
"""Seconds of one sample."""
TRIAL_ITERATIONS = 256
COPIES = 8
"""Launches of one sample of the copy bandwidth."""
LOAD_LAUNCHES = 8
"""Launches over which the bytes loaded beside the multiplications are counted."""
CHOICE = Stopping(warmup_s=0.1, min_samples=8, max_samples=16, ci_rel=1e-6, cap_s=0.3)
"""For the choice between forms, which are timed in turn."""
COPY_BYTES = 1 << 30
"""Of each of the two buffers; at least this many times an L2 cache: a write that stays in the cache costs nothing."""
LOAD_BYTES = 24 << 20
"""Of what is loaded beside the multiplications; half the L2 cache if that is less."""


def steady(seconds: float) -> Stopping:
    """Warm up for at least 0.3 s and until the rate stops falling, then take samples for `seconds`."""
    most = 100_000
    return Stopping(warmup_s=0.15, steady_rel=0.01, min_samples=20, max_samples=most, ci_rel=1e-6, cap_s=seconds)


@dataclass(frozen=True)
class Rig:
    """What rates are measured on and with."""

    clock: Clock
    device: str
    copy_bytes: int
    load_bytes: int

    @classmethod
    def here(cls) -> Rig:
        """torch's current GPU."""
        from slidesparse.kernels.triton_copy import GRAIN
        from slidesparse.measure.cuda_clock import CudaClock

        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        free, _ = torch.cuda.mem_get_info()
        return cls(
            clock=CudaClock(),
            device="cuda",
            copy_bytes=min(COPY_BYTES, free // 4) // GRAIN * GRAIN,
            load_bytes=max(1 << 20, min(LOAD_BYTES, properties.L2_cache_size // 2)),
        )


@dataclass(frozen=True)
class Rate:
    """A measured rate, in `unit`, with how it was had."""

    samples: Samples
    """Rates, not seconds."""
    unit: str
    check: verify.Check
    instruction: str
    path: str
    load_rate: float | None = None
    """GB/s."""

    def columns(self) -> dict[str, Any]:
        """Measured columns of a `CalibrationRow`."""
        loads = {} if self.load_rate is None else {"load_rate": self.load_rate}
        return loads | {
            **self.samples.columns(1.0),
            "rate": self.samples.interval.median,
            "unit": self.unit,
            "verified": self.check.verified,
            "check": self.check.text,
            "instruction": self.instruction,
            "path": self.path,
        }


def copy_rate(rig: Rig, stopping: Stopping, seed: int) -> Rate:
    """GB/s (1e9), bytes read plus bytes written, of a copy between buffers far beyond the L2 cache.

    Raises UnsupportedHere without Triton, VerificationError when a copy differs from its source.
    """
    try:
        from slidesparse.kernels import triton_copy
    except ImportError:
        raise UnsupportedHere("the copy bandwidth needs triton for its kernel; install triton") from None
    generator = torch.Generator(rig.device).manual_seed(seed)
    source = torch.randint(256, (rig.copy_bytes,), generator=generator, dtype=torch.uint8, device=rig.device)
    target = torch.empty_like(source)
    calls: list[Call] = []
    for launch in triton_copy.LAUNCHES:
        torch.bitwise_not(source, out=target)
        triton_copy.copy(source, target, launch)
        if not torch.equal(source, target):
            raise VerificationError(f"copy kernel, {launch}: target and source differ")
        calls.append(lambda launch=launch: triton_copy.copy(source, target, launch))  # type: ignore[misc]
    prepared = [rig.clock.prepare([call] * COPIES, brief=True) for call in calls]
    amounts = [2.0 * rig.copy_bytes * 1e-9] * len(calls)
    place, samples = _best(prepared, amounts, rig.clock, stopping, seed)
    text = f"Triton copy, {triton_copy.LAUNCHES[place]}"
    check = verify.Check("exact", f"all {len(calls)} launches: every byte of {rig.copy_bytes} equal to its source")
    return Rate(samples, "GB/s", check, "loads and stores of 16 bytes a thread", text)


def tensor_core_rate(
    rig: Rig,
    library: PeakLibrary,
    capability: tuple[int, int],
    dtype: DType,
    sparse: bool,
    loads: bool,
    stopping: Stopping,
    seed: int,
) -> Rate:
    """TOPS (1e12 operations a second), 2*M*N*K with the zeros of a sparse operand counted.

    Raises UnsupportedHere (see `PeakLibrary.forms`), VerificationError when an instruction gives a wrong sum.
    """
    forms = library.forms(capability, dtype.torch, sparse)
    stream = _loads(rig, seed) if loads else None
    for form in forms:
        _verify(form, library, stream, rig.device, seed)
    calls, amounts = [], []
    for form in forms:
        call, operations = _launch(form, library, stream, rig, seed)
        calls.append(call)
        amounts.append(operations * 1e-12)
    place, samples = _best(calls, amounts, rig.clock, stopping, seed)
    best = forms[place].instruction
    check = verify.Check("exact", f"all {len(forms)} forms: integer operands, equal to the float64 product")
    load_rate = None if stream is None else _load_rate(stream, calls[place], rig)
    return Rate(samples, "TOPS", check, best, f"csrc/device, {best}", load_rate)


def _best(
    calls: Sequence[Call], amounts: Sequence[float], clock: Clock, stopping: Stopping, seed: int
) -> tuple[int, Samples]:
    """The call that does most in a second, and its rates: `amounts` are what one of each does."""
    timed = measure_together(calls, CHOICE, clock, seed)
    medians = [amount / percentile(samples.values, 50) for samples, amount in zip(timed, amounts, strict=True)]
    place = max(range(len(calls)), key=medians.__getitem__)
    seconds = measure(calls[place], stopping, clock)
    return place, replace(seconds, values=tuple(amounts[place] / value for value in seconds.values))


def _launch(form: Form, library: PeakLibrary, stream: Loads | None, rig: Rig, seed: int) -> tuple[Call, float]:
    """A prepared launch of about `LAUNCH_S`, and its operations on all multiprocessors."""
    operands = peak_operands.random_problem(form, seed, rig.device).operands
    working = library.run(form, operands, TRIAL_ITERATIONS, stream)
    trial = rig.clock.prepare([lambda: library.run(form, operands, TRIAL_ITERATIONS, stream)], brief=True)
    seconds = min(rig.clock.times([trial] * 4))
    iterations = max(TRIAL_ITERATIONS, int(TRIAL_ITERATIONS * LAUNCH_S / max(seconds, 1e-7)))
    call = rig.clock.prepare([lambda: library.run(form, operands, iterations, stream)], brief=True)
    return call, form.operations * iterations * working


def _verify(form: Form, library: PeakLibrary, stream: Loads | None, device: str, seed: int) -> None:
    """Integer operands, whose sums are exact in every type; each stage twice and the first once more."""
    iterations = 2 * form.stages + 1
    problem = peak_operands.exact_problem(form, seed, device)
    shape = (form.units, form.rows, form.cols)
    out = verify.poison(torch.empty(shape, dtype=form.sum_dtype, device=device))
    library.run(form, problem.operands, iterations, stream, out)
    expected = problem.product(iterations).to(form.sum_dtype)
    check = verify.check_same(out, expected, "exact product")
    if not check.ok:
        raise VerificationError(f"{form.instruction}: check failed: {check.text}")


def _loads(rig: Rig, seed: int) -> Loads:
    generator = torch.Generator(rig.device).manual_seed(seed)
    source = torch.randint(256, (rig.load_bytes,), generator=generator, dtype=torch.uint8, device=rig.device)
    return Loads(source, torch.zeros(1, dtype=torch.int64, device=rig.device))


def _load_rate(stream: Loads, call: Call, rig: Rig) -> float:
    """GB/s, from the bytes of a few more launches."""
    stream.loaded.zero_()
    seconds = sum(rig.clock.times([call] * LOAD_LAUNCHES))
    return float(stream.loaded.item()) / seconds * 1e-9
