"""Tasks 4 and 5: prefill and decode throughput through an engine, one session a variant."""

from __future__ import annotations

import time
from itertools import groupby
from statistics import median
from typing import Any

import torch

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import DiskError, UnsupportedHere, VerificationError
from slidesparse.kernels import verify
from slidesparse.kernels.backend import backend
from slidesparse.kernels.verify import Check
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.engines.base import Engine, Session, StepResult, engine
from slidesparse.measure.telemetry import PERIOD_S, Telemetry
from slidesparse.measure.timer import Clock, Samples, WallClock, collect
from slidesparse.plan import Task, ThroughputCell, Variant, fingerprint
from slidesparse.progress import Bar, track
from slidesparse.rows import DecodeRow, PrefillRow, ThroughputRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import TuningStore

CHECK_PROMPTS, CHECK_LENGTH = 4, 12
"""The fixed prompts of the logits check: sequences and tokens each, drawn with CHECK_SEED."""
CHECK_SEED = 1234


def run_task(run: Run, task: Task) -> Outcome:
    """Measure all cells of one phase.

    A cell that fails, also for want of memory, gets a failed row and the next one follows; a variant that cannot
    be loaded, or whose logits are wrong, fails all its cells.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, ThroughputCell)]
    with track(task.title, len(cells), run.quiet) as bar:
        for (model, dtype, variant), group in groupby(cells, key=lambda cell: (cell.model, cell.dtype, cell.variant)):
            _Variant(run, model, dtype, variant, list(group), outcome).measure(bar)
    return outcome


class _Pass:
    """Runs a cell once a call, and keeps the steps of every pass."""

    def __init__(self, session: Session, cell: ThroughputCell, seed: int) -> None:
        self._session, self._cell = session, cell
        self._generator = torch.Generator().manual_seed(seed + cell.m)
        self.passes: list[tuple[list[StepResult], list[StepResult]]] = []
        """Steps that read prompts, steps that only generate."""

    def prompts(self) -> torch.Tensor:
        """Fresh random prompts of one step, int64 [S, P]."""
        size = (self._cell.sequences, self._cell.prompt_len)
        return torch.randint(0, self._session.vocabulary, size, generator=self._generator)

    def __call__(self) -> float:
        """Seconds of one pass: the sum of its steps; making prompts is not counted."""
        if self._cell.phase == "prefill":
            prefills = [self._session.prefill_step(self.prompts()) for _ in range(self._cell.steps)]
            decodes: list[StepResult] = []
        else:
            result = self._session.decode(self.prompts(), self._cell.output_len)
            prefills, decodes = [result.prefill], list(result.steps)
        self.passes.append((prefills, decodes))
        return sum(step.seconds for step in (*prefills, *decodes))


class _Variant:
    """The cells of one file: one model, type, variant and phase."""

    def __init__(
        self, run: Run, model: str, dtype: DType, variant: Variant, cells: list[ThroughputCell], outcome: Outcome
    ) -> None:
        self._run, self._dtype, self._variant, self._cells, self._outcome = run, dtype, variant, cells, outcome
        profile = run.plan.profile
        self._phase = cells[0].phase
        self._stopping: Stopping = profile.prefill.stopping if self._phase == "prefill" else profile.decode.stopping
        self._folder = run.plan.checkpoint_folder(model, dtype, variant)
        self._path = run.tree.throughput(self._phase, model, dtype, variant)
        self._row: type[ThroughputRow] = PrefillRow if self._phase == "prefill" else DecodeRow
        self._seed = profile.seed
        self._clock: Clock = WallClock()
        self._probe = telemetry.probe(run.machine)

    def measure(self, bar: Bar) -> None:
        with RowBook(self._path) as book:
            try:
                runs_on = engine(self._run.plan.profile.engine)
                runs_on.require(self._run.machine)
                side = backend(self._variant.backend)
                side.require(self._run.machine, self._dtype)
                store = TuningStore.open(self._run.tree.tuning_store)
                source = Checkpoint.open(self._folder).fingerprint()
            except UnsupportedHere as error:
                self._all(self._cells, "skipped", reason_of(error), book, bar)
                return
            except DiskError:
                raise
            except Exception as error:
                self._run.log.error("%s: %s", self._cells[0], reason_of(error))
                self._all(self._cells, "failed", reason_of(error), book, bar)
                return
            families = (side.name, side.activations.name)
            conditions = (self._stopping, self._seed, source, runs_on.name, runs_on.versions())
            tuned = store.digest(families, self._dtype)
            prints = {cell: fingerprint(cell, *conditions, tuned) for cell in self._cells}
            pending = [cell for cell in self._cells if not book.done(_key(cell), prints[cell])]
            for cell in self._cells:
                if cell not in pending:
                    self._outcome.ok += 1
                    self._outcome.done_before += 1
                    bar.advance(note=str(cell))
            if pending:
                self._session(pending, prints, runs_on, store, book, bar)

    def _session(
        self,
        cells: list[ThroughputCell],
        prints: dict[ThroughputCell, str],
        runs_on: Engine,
        store: TuningStore,
        book: RowBook,
        bar: Bar,
    ) -> None:
        session: Session | None = None
        try:
            session = runs_on.open(self._folder, self._dtype, self._variant, store)
            logits = session.check_logits(_check_prompts(session.vocabulary))
            if not logits.ok:
                raise VerificationError(f"check failed: {logits.text}")
        except DiskError:
            raise
        except Exception as error:
            self._run.log.exception("%s", cells[0])
            self._all(cells, "failed", reason_of(error), book, bar, prints, isinstance(error, VerificationError))
            if session is not None:
                session.close()
            return
        for cell in cells:
            columns = self._columns(cell) | {"fingerprint": prints[cell], "engine": runs_on.name}
            columns |= {"emulation": backend(self._variant.backend).emulation, "startup_s": session.startup_s}
            try:
                row = self._row(**(columns | self._cell(cell, session, logits) | self._run.stamp()))
                self._outcome.ok += 1
            except DiskError:
                raise
            except Exception as error:
                self._run.log.exception("%s", cell)
                self._outcome.failed += 1
                if isinstance(error, VerificationError):
                    columns |= {"verified": "failed", "check": reason_of(error)}
                row = self._row(**(columns | self._run.stamp()), status="failed", reason=reason_of(error))
            book.add(row)
            book.flush()
            bar.advance(note=str(cell))
        session.close()

    def _cell(self, cell: ThroughputCell, session: Session, logits: Check) -> dict[str, Any]:
        """Measured columns of one cell. Raises VerificationError when a layer is wrong or a step holds other tokens."""
        session.begin()
        passes = _Pass(session, cell, self._seed)
        step = session.check_step(passes.prompts(), cell.phase)
        if not step.ok:
            raise VerificationError(f"check failed: {step.text}")
        with Telemetry(self._probe, PERIOD_S) as watch:
            started = time.monotonic()
            samples = collect(passes, self._stopping, self._clock)
            measured = time.monotonic() - started
        kept = passes.passes[-len(samples.values) :]
        checked = verify.worst((logits, step))
        return {
            **_figures(cell, samples, kept),
            **watch.columns(),
            "passes": len(kept),
            "peak_rss_mib": watch.peak_rss_mib,
            "warmup_s": samples.warmup_s,
            "measure_s": measured - samples.warmup_s,
            "verified": checked.verified,
            "check": f"{logits.text}; {step.text}",
            "path": session.path(),
            "tuning": session.tuning(),
        }

    def _columns(self, cell: ThroughputCell) -> dict[str, Any]:
        sparsity = cell.variant.sparsity
        columns = {
            f"M_{cell.phase}": cell.m,
            "prompt_len": cell.prompt_len,
            "max_num_seqs": cell.sequences,
            "num_prompts": cell.prompts,
            f"N_{cell.phase}": cell.steps,
            "model": cell.model,
            "dtype": cell.dtype.value,
            "backend": cell.variant.backend,
            "sparsity": "" if sparsity is None else str(sparsity),
        }
        return columns | ({"output_len": cell.output_len} if cell.phase == "decode" else {})

    def _all(
        self,
        cells: list[ThroughputCell],
        status: Any,
        reason: str,
        book: RowBook,
        bar: Bar,
        prints: dict[ThroughputCell, str] | None = None,
        wrong: bool = False,
    ) -> None:
        """The same fate for several cells. Skips are recorded once; failures every time."""
        for cell in cells:
            conditions = prints[cell] if prints else fingerprint(cell, status, reason)
            if status == "skipped":
                self._outcome.skipped += 1
            else:
                self._outcome.failed += 1
            if status != "skipped" or not book.done(_key(cell), conditions):
                columns = self._columns(cell) | self._run.stamp() | {"fingerprint": conditions}
                columns |= {"verified": "failed", "check": reason} if wrong else {}
                book.add(self._row(**columns, status=status, reason=reason))
            bar.advance(note=str(cell))


def _key(cell: ThroughputCell) -> dict[str, object]:
    return {f"M_{cell.phase}": cell.m}


def _check_prompts(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CHECK_SEED)
    return torch.randint(0, vocabulary, (CHECK_PROMPTS, CHECK_LENGTH), generator=generator)


def _figures(
    cell: ThroughputCell, samples: Samples, passes: list[tuple[list[StepResult], list[StepResult]]]
) -> dict[str, Any]:
    """Rates from what the engine counted. Raises VerificationError when a step held other than the cell's tokens."""
    prefills, decodes = passes[0]
    prompt_tokens = sum(step.tokens for step in prefills)
    outputs = sum(step.outputs for step in (*prefills, *decodes))
    timed = [step for one in passes for step in (one[0] if cell.phase == "prefill" else one[1])]
    counted = {step.tokens for step in timed}
    wanted = (cell.prompts * cell.prompt_len, cell.prompts * cell.output_len)
    if counted != {cell.m} or (prompt_tokens, outputs) != wanted:
        raise VerificationError(
            f"check failed: steps held {sorted(counted)} tokens, a pass {prompt_tokens} prompt and {outputs} output "
            f"tokens; the cell has {cell.m}, {wanted[0]} and {wanted[1]}"
        )
    seconds = samples.interval
    rate = seconds.rate(prompt_tokens + outputs)
    generating = [sum(step.seconds for step in one[1]) for one in passes]
    steady = prompt_tokens / seconds.median
    if cell.phase == "decode":
        steady = sum(step.outputs for step in decodes) / median(generating)
    return {
        "requests_per_s": cell.prompts / seconds.median,
        "tokens_per_s": rate.median,
        "elapsed_time_s": seconds.median,
        **samples.columns(1.0),
        "p20": (prompt_tokens + outputs) / samples.p80,
        "p80": (prompt_tokens + outputs) / samples.p20,
        "ci_low": rate.low,
        "ci_high": rate.high,
        "ci_rel": rate.rel,
        "step_ms": median(step.seconds for step in timed) * 1e3,
        "tokens_per_step": cell.m,
        "output_tokens_per_s": outputs / seconds.median,
        "steady_tokens_per_s": steady,
    }
