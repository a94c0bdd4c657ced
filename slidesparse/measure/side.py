"""One variant of an end-to-end measurement: its cells, what is pending of them, its session, and its rows."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch

from slidesparse import records
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.config import Stopping
from slidesparse.errors import DiskError, UnsupportedHere, VerificationError
from slidesparse.kernels import verify
from slidesparse.kernels.backend import backend, own_revision, require
from slidesparse.kernels.verify import Check
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.engines.base import PROFILED_DECODE_STEP, Engine, Limits, Session
from slidesparse.measure.side_by_side import Measured, example_prompts, figures
from slidesparse.measure.step_profile import StepProfile, step_rows
from slidesparse.measure.telemetry import Telemetry
from slidesparse.plan import AUTO, STOCK, Phase, ThroughputCell, fingerprint
from slidesparse.progress import Bar
from slidesparse.rows import UNMEASURED, DecodeRow, PrefillRow, ThroughputRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import TuningStore

GPU_BOUND = 0.9
"""Share of a step's time that kernels run in, under which the step waits for the host: its ratios say little."""
CHECK_PROMPTS, CHECK_LENGTH = 4, 12
"""The fixed prompts of the logits check: sequences and tokens each, drawn with CHECK_SEED."""
CHECK_SEED = 1234
SHOWN_TOKENS = 8
"""Greedy tokens after each of these prompts that the rows carry: to be compared between runs, on two ranks say."""
ROWS: dict[Phase, type[ThroughputRow]] = {"prefill": PrefillRow, "decode": DecodeRow}


class Side:
    """All cells of one variant, of one model and type. Rows go into `books`, counts into `outcomes`, by phase."""

    def __init__(
        self,
        run: Run,
        cells: list[ThroughputCell],
        books: dict[Phase, RowBook],
        outcomes: dict[Phase, Outcome],
        bar: Bar,
    ) -> None:
        self._run, self._books, self._outcomes, self._bar = run, books, outcomes, bar
        self.cells = cells
        self.variant, self._model, self.dtype = cells[0].variant, cells[0].model, cells[0].dtype
        self.pending: list[ThroughputCell] = []
        self._prints: dict[ThroughputCell, str] = {}
        self._store: TuningStore | None = None
        self.session: Session | None = None
        self._logits = Check("not_checked", "")
        self._tokens = ""

    @property
    def stock(self) -> bool:
        return self.variant.backend == STOCK

    @property
    def folder(self) -> Path:
        return self._run.plan.checkpoint_folder(self._model, self.dtype, self.variant)

    def look(self, runs_on: Engine, limits: Limits) -> bool:
        """Work out what is pending. False where nothing of this variant can run: its rows say why."""
        try:
            self._store = TuningStore.open(self._run.tree.tuning_store)
            require(self.variant.backend, self._run.machine, self.dtype)
            families = self._store.families
            revision = (
                "" if self.stock else own_revision("fused" if self.variant.backend == AUTO else self.variant.backend)
            )
            if self.variant.backend not in (STOCK, AUTO):
                kernels = backend(self.variant.backend)
                families = {kernels.name, kernels.activations.name, kernels.activations.norm_family}
            source = Checkpoint.open(self.folder).fingerprint()
        except UnsupportedHere as error:
            self.all("skipped", reason_of(error))
            return False
        except DiskError:
            raise
        except Exception as error:
            self._run.log.error("%s: %s", self.cells[0], reason_of(error))
            self.all("failed", reason_of(error))
            return False
        tuned = "" if self.stock else self._store.digest(families, self.dtype)
        for cell in self.cells:
            conditions = (self.stopping(cell.phase), self._run.plan.profile.seed, source, runs_on.name)
            profiled = ("step profile",) if self._profiled(cell) else ()
            kernels_of_ours = (revision,) if revision else ()
            self._prints[cell] = fingerprint(
                cell, *conditions, runs_on.versions(), tuned, limits.tensor_parallel, *profiled, *kernels_of_ours
            )
            if self._books[cell.phase].done(_key(cell), self._prints[cell]):
                self._outcomes[cell.phase].ok += 1
                self._outcomes[cell.phase].done_before += 1
                self._bar.advance(note=str(cell))
            else:
                self.pending.append(cell)
        return True

    def stopping(self, phase: Phase) -> Stopping:
        profile = self._run.plan.profile
        return profile.prefill.stopping if phase == "prefill" else profile.decode.stopping

    def pending_in(self, phase: Phase) -> bool:
        return any(cell.phase == phase for cell in self.pending)

    # -- its session -------------------------------------------------------------------------------------

    def open(self, runs_on: Engine, limits: Limits, turn: AbstractContextManager[object]) -> Exception | None:
        """Open the session and check its logits; the error, for `fail_pending`, if one did not work.

        Several sides may do so at once: they start side by side, and check one at a time, inside `turn`. Without an
        answer of the check no cell can be recorded.
        """
        assert self._store is not None
        try:
            self.session = runs_on.open(self.folder, self.dtype, self.variant, self._store, limits)
            with turn:
                self._check_logits(self.session)
        except Exception as error:
            self.close()
            return error
        return None

    def _check_logits(self, session: Session) -> None:
        prompts = _check_prompts(session.vocabulary)
        self._logits = session.check_logits(prompts)
        tokens = session.decode(prompts, SHOWN_TOKENS).tokens
        self._tokens = " / ".join(" ".join(map(str, sequence)) for sequence in tokens.tolist())
        if self._logits.wrong:
            self._run.log.error("%s %s: check failed: %s", self._model, self.variant, self._logits.text)

    def close(self) -> None:
        session, self.session = self.session, None
        if session is not None:
            session.close()

    def check(self, cell: ThroughputCell) -> Check:
        """One step of the cell's size, its layers compared where the engine can.

        Raises VerificationError where they differ; what the session raises.
        """
        assert self.session is not None
        self.session.begin()
        found = self.session.check_step(example_prompts(self.session, cell, self._run.plan.profile.seed), cell.phase)
        if found.wrong:
            raise VerificationError(f"check failed: {found.text}")
        return found

    # -- its rows ----------------------------------------------------------------------------------------

    def record(
        self, cell: ThroughputCell, measured: Measured, step: Check, watch: Telemetry, ratios: dict[str, float]
    ) -> None:
        """The row of a measured cell, and the profile of one more of its steps where the plan names its size.

        Where the logits are wrong the figures stand, marked: the cell counts as failed, and its fingerprint is
        another, so that the next run measures it again.
        """
        assert self.session is not None
        try:
            columns = self._columns(cell) | figures(cell, measured) | watch.columns() | ratios
            columns |= {"path": self.session.path(), "tuning": self.session.tuning()}
        except Exception as error:
            self.fail(cell, error)
            return
        # Last of what is asked of the session: a profiler that takes it along costs no figure.
        profile = self._profile(cell, columns["path"]) if self._profiled(cell) else None
        columns |= {
            "peak_rss_mib": UNMEASURED if self.session.own_process else watch.peak_rss_mib,
            "startup_s": self.session.startup_s,
            "compile_s": self.session.compile_s,
            "warmup_s": measured.samples.warmup_s,
            "measure_s": measured.samples.measure_s,
            "verified": verify.worst((self._logits, step)).verified,
            "check": f"{self._logits.text}; {step.text}",
            "greedy_tokens": self._tokens,
            "host_bound": profile is not None and profile.busy_us < GPU_BOUND * columns["step_ms"] * 1e3,
        }
        if self._logits.wrong:
            self._outcomes[cell.phase].failed += 1
            columns |= {
                "reason": f"check failed: {self._logits.text}",
                "fingerprint": fingerprint(self._prints[cell], "check failed"),
            }
        else:
            self._outcomes[cell.phase].ok += 1
        self._add(cell, columns)

    def _profiled(self, cell: ThroughputCell) -> bool:
        return cell.m in self._run.plan.profile.step_profiles.sizes(cell.phase)

    def _profile(self, cell: ThroughputCell, path: str) -> StepProfile | None:
        """One more step, and the rows of where its time goes, if the engine can tell.

        An error is logged and costs no cell.
        """
        assert self.session is not None
        profile = self._run.plan.profile
        try:
            found = self.session.profile_step(example_prompts(self.session, cell, profile.seed), cell.phase)
            if found is None:
                return None
            stamp = self._run.stamp() | {"fingerprint": self._prints[cell], "engine": profile.engine, "path": path}
            context = cell.prompt_len + (PROFILED_DECODE_STEP if cell.phase == "decode" else 0)
            model, ranks = self._run.plan.bench.models[cell.model], profile.vllm.tensor_parallel_size
            rows = step_rows(found, cell, model, context, stamp, ranks)
            records.append(self._run.tree.step_profile(cell.model, cell.dtype), rows)
        except DiskError:
            raise
        except Exception as error:
            self._run.log.error("%s: no profile of a step: %s", cell, reason_of(error), exc_info=error)
            return None
        return found

    def fail(self, cell: ThroughputCell, error: BaseException) -> None:
        """A failed row, if the cell was asked for. Raises a DiskError on: nothing more can be recorded."""
        if isinstance(error, DiskError):
            raise error
        self._run.log.error("%s: %s", cell, reason_of(error), exc_info=error)
        if cell not in self.pending:  # it ran beside others alone, whose rows now lack a ratio
            return
        self._outcomes[cell.phase].failed += 1
        columns = self._columns(cell) | {"status": "failed", "reason": reason_of(error)}
        if isinstance(error, VerificationError):
            columns |= {"verified": "failed", "check": reason_of(error)}
        self._add(cell, columns)

    def fail_pending(self, error: Exception) -> None:
        if not self.pending:
            self._run.log.error(
                "%s %s: nothing is compared with it: %s", self._model, self.variant, reason_of(error), exc_info=error
            )
        for cell in list(self.pending):
            self.fail(cell, error)

    def all(self, status: Literal["failed", "skipped"], reason: str) -> None:
        """The same fate for every cell. Skips are recorded once; failures every time."""
        for cell in self.cells:
            self._prints[cell] = fingerprint(cell, status, reason)
            outcome = self._outcomes[cell.phase]
            outcome.skipped += status == "skipped"
            outcome.failed += status == "failed"
            if status == "skipped" and self._books[cell.phase].done(_key(cell), self._prints[cell]):
                self._bar.advance(note=str(cell))
            else:
                self._add(cell, self._columns(cell) | {"status": status, "reason": reason})

    def _add(self, cell: ThroughputCell, columns: dict[str, Any]) -> None:
        if cell in self.pending:  # of a reference, so that beside the next group it is not recorded again
            self.pending.remove(cell)
        book = self._books[cell.phase]
        book.add(ROWS[cell.phase](**columns))
        book.flush()
        self._bar.advance(note=str(cell))

    def _columns(self, cell: ThroughputCell) -> dict[str, Any]:
        """What every row of the cell says, measured or not."""
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
            "engine": self._run.plan.profile.engine,
            "emulation": self.variant.backend not in (STOCK, AUTO) and backend(self.variant.backend).emulation,
            "fingerprint": self._prints[cell],
        }
        return columns | self._run.stamp() | ({"output_len": cell.output_len} if cell.phase == "decode" else {})


def first(sides: Iterable[Side], stock: bool) -> Side | None:
    """The engine's own kernels, or our first dense variant: what the others are compared with."""
    return next((side for side in sides if side.stock == stock and side.variant.sparsity is None), None)


def _key(cell: ThroughputCell) -> dict[str, object]:
    return {f"M_{cell.phase}": cell.m}


def _check_prompts(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(CHECK_SEED)
    return torch.randint(0, vocabulary, (CHECK_PROMPTS, CHECK_LENGTH), generator=generator)
