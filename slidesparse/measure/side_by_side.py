"""One end-to-end cell in several sessions side by side: the same step in each, in random order, round after round.

Prefill: a round is a burst of a few steps of M tokens a session, the first of which (`lead_in`) is not counted where an
engine overlaps steps; a pass, the published cell, is `cell.steps` counted ones. Decode: a pass is a batch a session,
from its prompts to its last token; it runs whole, in the first round of the pass, and gives every round a block of its
steps. So every ratio of two variants is of steps that ran within seconds, at the same clocks and temperature, and in
decode at the same context length.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import gcd
from statistics import median
from typing import Any

import torch

from slidesparse.config import Stopping
from slidesparse.errors import VerificationError
from slidesparse.measure.engines.base import Session, StepResult
from slidesparse.measure.statistics import Interval
from slidesparse.measure.timer import Call, Samples, WallClock, measure_together
from slidesparse.plan import ThroughputCell

BURST = 16
"""Most steps of a prefill sample."""
WARMUP_OUTPUTS = 16
"""Tokens a sequence of a decode batch that only warms up."""
BLOCK = 32
"""Decode steps that make one sample, of a step's time and of its graph's on the GPU. Pairs are of blocks at the same
place in their batches; a batch takes seconds, and so few of them would have no interval."""


class SessionFailed(Exception):
    """A session could not run a step; `place` says which of those side by side. The cause is `__cause__`."""

    def __init__(self, place: int) -> None:
        super().__init__(f"session {place} failed")
        self.place = place


@dataclass
class Measured:
    """One session's part of a cell."""

    samples: Samples
    """Seconds of a prefill step, the mean of a burst; of a decode step, the median of a block."""
    prefills: list[StepResult]
    decodes: list[StepResult]
    """Of the samples' rounds, in order, lead-in left out."""

    @property
    def graphs(self) -> tuple[float, ...]:
        """Seconds of a decode step's CUDA graph on the GPU, the median of each block of a batch; empty where one is
        not known."""
        times = [step.graph_seconds for step in self.decodes]
        if not times or min(times) <= 0:
            return ()
        length = len(times) // len(self.prefills)
        batches = (times[first : first + length] for first in range(0, len(times), length))
        return tuple(each for batch in batches for each in _blocks(batch))


@dataclass
class _Rounds:
    """One session's steps, as calls that time themselves."""

    session: Session
    cell: ThroughputCell
    seed: int
    prefills: list[StepResult] = field(default_factory=list)
    decodes: list[StepResult] = field(default_factory=list)
    _left: list[float] = field(default_factory=list)
    """Blocks of the last decode batch that no round has taken yet."""

    def __post_init__(self) -> None:
        self._generator = torch.Generator().manual_seed(self.seed + self.cell.m)

    @property
    def burst(self) -> int:
        """Counted steps of a prefill round."""
        return gcd(self.cell.steps, BURST) if self.session.lead_in else 1

    @property
    def rounds_of_a_pass(self) -> int:
        if self.cell.phase == "prefill":
            return self.cell.steps // self.burst
        return -(-(self.cell.output_len - 1) // BLOCK)

    def prompts(self, steps: int) -> torch.Tensor:
        """Fresh random prompts, int64 [steps, S, P]; every session draws the same ones."""
        size = (steps, self.cell.sequences, self.cell.prompt_len)
        return torch.randint(0, self.session.vocabulary, size, generator=self._generator)

    def __call__(self) -> float:
        """Seconds of a step, of one round; making prompts is not counted."""
        if self.cell.phase == "prefill":
            return self._prefill(self.burst)
        if not self._left:
            self._left = _blocks(self._decode(self.cell.output_len))
        return self._left.pop(0)

    def warm_up(self) -> float:
        if self.cell.phase == "prefill":
            return self._prefill(1)
        return median(self._decode(min(self.cell.output_len, WARMUP_OUTPUTS)))

    def _prefill(self, burst: int) -> float:
        lead_in = self.session.lead_in
        steps = self.session.prefill_steps(self.prompts(lead_in + burst))[lead_in:]
        self.prefills.extend(steps)
        return sum(step.seconds for step in steps) / len(steps)

    def _decode(self, output_len: int) -> list[float]:
        result = self.session.decode(self.prompts(1)[0], output_len)
        self.prefills.append(result.prefill)
        self.decodes.extend(result.steps)
        return [step.seconds for step in result.steps]

    def forget(self) -> None:
        self.prefills.clear()
        self.decodes.clear()


def _blocks(steps: Sequence[float]) -> list[float]:
    """Medians of blocks of a batch's steps; the last block is what is left."""
    return [median(steps[first : first + BLOCK]) for first in range(0, len(steps), BLOCK)]


class _SelfTimed(WallClock):
    """For calls that return their own seconds. `batch` rounds are one pass of the cell."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def times(self, calls: Sequence[Call]) -> list[float]:
        return [float(call()) for call in calls]  # type: ignore[arg-type]


def example_prompts(session: Session, cell: ThroughputCell, seed: int) -> torch.Tensor:
    """Prompts of one step of the cell, int64 [S, P]."""
    return _Rounds(session, cell, seed).prompts(1)[0]


def measure_cell(sessions: Sequence[Session], cell: ThroughputCell, stopping: Stopping, seed: int) -> list[Measured]:
    """Measure `cell`'s sizes in every session, whole passes, until the stopping rule is met.

    The rule looks at the last session and at the fastest other one, as for kernels; `cap_s` is for all together.

    Raises:
        SessionFailed: one of them could not run; nothing is kept.
    """
    rounds = [_Rounds(session, cell, seed) for session in sessions]
    calls = [_blaming(place, own) for place, own in enumerate(rounds)]
    warm = [_blaming(place, own.warm_up) for place, own in enumerate(rounds)]

    def begin() -> None:
        for own in rounds:
            own.forget()

    clock = _SelfTimed(rounds[0].rounds_of_a_pass)
    samples = measure_together(calls, stopping, clock, seed, warm_up=warm, before=begin)
    return [Measured(s, own.prefills, own.decodes) for s, own in zip(samples, rounds, strict=True)]


def _blaming(place: int, call: Callable[[], float]) -> Call:
    return partial(_blamed, place, call)


def _blamed(place: int, call: Callable[[], float]) -> float:
    try:
        return call()
    except Exception as error:
        raise SessionFailed(place) from error


def figures(cell: ThroughputCell, measured: Measured) -> dict[str, Any]:
    """Rates of one pass, from what the engine counted. Raises VerificationError when a step held other tokens.

    A pass takes as often the median step as it has steps; decode: and once the median step that reads the prompts. One
    slow step is noise, not throughput.
    """
    samples, prefills, decodes = measured.samples, measured.prefills, measured.decodes
    prefill = cell.phase == "prefill"
    passes = len(prefills) // (cell.steps if prefill else 1)
    steps, first = (cell.steps, 0.0) if prefill else (cell.output_len - 1, median(step.seconds for step in prefills))
    timed = prefills if prefill else decodes
    counted = {step.tokens for step in timed}
    prompt_tokens = sum(step.tokens for step in prefills) // passes
    outputs = sum(step.outputs for step in (*prefills, *decodes)) // passes
    wanted = (cell.prompts * cell.prompt_len, cell.prompts * cell.output_len)
    if counted != {cell.m} or (prompt_tokens, outputs) != wanted:
        raise VerificationError(
            f"check failed: steps held {sorted(counted)} tokens, a pass {prompt_tokens} prompt and {outputs} output "
            f"tokens; the cell has {cell.m}, {wanted[0]} and {wanted[1]}"
        )
    step, graphs = samples.interval, measured.graphs
    seconds = Interval(*(first + steps * value for value in (step.median, step.low, step.high)))
    tokens = prompt_tokens + outputs
    rate = seconds.rate(tokens)
    return {
        "requests_per_s": cell.prompts / seconds.median,
        "tokens_per_s": rate.median,
        "elapsed_time_s": seconds.median,
        **samples.columns(1.0),
        "p20": tokens / (first + samples.p80 * steps),
        "p80": tokens / (first + samples.p20 * steps),
        "ci_low": rate.low,
        "ci_high": rate.high,
        "ci_rel": rate.rel,
        "passes": passes,
        "step_ms": step.median * 1e3,
        "tokens_per_step": cell.m,
        "output_tokens_per_s": outputs / seconds.median,
        "steady_tokens_per_s": cell.m / step.median,
        **({"graph_ms": median(graphs) * 1e3} if graphs else {}),
    }
