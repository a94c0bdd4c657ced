"""Task 3, offline tuning: measure every candidate of every cell, check it first, store the winners."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from slidesparse.errors import ContextLost, DiskError, UnsupportedHere
from slidesparse.kernels.backend import Backend, backend
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.kernels.verify import Check
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.clocks import clock_of, free_memory
from slidesparse.measure.telemetry import TELEMETRY_PERIOD_S, measured_unthrottled
from slidesparse.measure.timer import leading, measure_together
from slidesparse.plan import Task, TuneCell, fingerprint
from slidesparse.progress import track
from slidesparse.rows import TuneRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.candidates import FUSED, Candidate, Workbench
from slidesparse.tuning.store import Key, TuningStore, Winner, kernel_versions


def run_task(run: Run, task: Task) -> Outcome:
    """Tune all cells of the task. A candidate that fails its check gets a failed row and cannot win.

    A cell is ok when it has a winner, failed when no candidate passed, skipped where the backend cannot run.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    outcome = Outcome()
    store = TuningStore.open(run.tree.tuning_store)
    cells = [cell for cell in task.cells if isinstance(cell, TuneCell)]
    with track(task.title, len(cells), run.quiet) as bar:
        for (model, dtype), group in groupby(cells, key=lambda cell: (cell.model, cell.dtype)):
            with RowBook(run.tree.tune(model, dtype), before=store.save) as book:
                tuner = _Tuner(run, store, book, outcome)
                for cell in group:
                    tuner.tune(cell)
                    bar.advance(note=str(cell))
                if tuner.failed:
                    outcome.notes.append(f"{model}-{dtype.suffix}: {tuner.failed} candidates failed (rows say why)")
    if tuned := len(store):
        outcome.notes.append(f"{tuned} winners stored")
    return outcome


class _Tuner:
    """The cells of one table. `failed`: candidates that were wrong or crashed."""

    def __init__(self, run: Run, store: TuningStore, book: RowBook, outcome: Outcome) -> None:
        self._run, self._store, self._book, self._outcome = run, store, book, outcome
        self._benches: dict[str, Workbench] = {}
        self.failed = 0
        self._probe = telemetry.probe(run.machine)
        self._losses = LostContexts.open(run.tree.lost_contexts, kernel_versions())
        self._stopping = run.plan.profile.tune.stopping

    def tune(self, cell: TuneCell) -> None:
        seed = self._run.plan.profile.seed
        try:
            chosen = backend(cell.variant.backend)
            chosen.require(self._run.machine, cell.dtype)
        except UnsupportedHere as error:
            self._skip(cell, error)
            return
        key = _winner_key(cell, chosen)
        conditions = fingerprint(cell, self._stopping, seed, self._store.versions(_family(cell, chosen)))
        if self._store.holds(key) and self._book.done(_cell_key(cell), conditions):
            self._outcome.ok += 1
            self._outcome.done_before += 1
            return
        try:
            bench = self._benches.setdefault(chosen.name, Workbench(chosen, cell.dtype, seed))
            with self._losses.cell(chosen, cell.dtype, str(cell)):
                rows = self._measure(cell, bench, chosen, conditions)
        except (DiskError, ContextLost):
            raise
        except UnsupportedHere as error:
            self._skip(cell, error)
        except Exception as error:
            self._run.log.exception("tune %s", cell)
            self._outcome.failed += 1
            self._none(cell, "failed", reason_of(error), conditions)
        else:
            self._keep(cell, key, rows)
            return
        free_memory(chosen)  # only now: the traceback held the buffers

    def _measure(self, cell: TuneCell, bench: Workbench, chosen: Backend, conditions: str) -> list[TuneRow]:
        """Check all, take a quick look if there are many, measure the leaders together."""
        candidates = bench.candidates(cell)
        common = _columns(cell) | {"fingerprint": conditions, "emulation": chosen.emulation}
        good: list[tuple[Candidate, Check]] = []
        rows = []
        for candidate in candidates:
            try:
                with self._losses.guard(chosen, cell.dtype, candidate.algorithm.name):
                    check = self._check(cell, candidate, chosen)
            except (DiskError, ContextLost):
                raise
            except Exception as error:
                self._run.log.exception("tune %s, %s", cell, candidate.algorithm.name)
                columns = common | _identity(candidate) | self._run.stamp()
                rows.append(TuneRow(**columns, status="failed", reason=reason_of(error)))
                continue
            if check.ok:
                good.append((candidate, check))
                continue
            self._run.log.error("tune %s, %s: %s", cell, candidate.algorithm.name, check.text)
            columns = common | _identity(candidate) | {"verified": check.verified, "check": check.text}
            reason = f"check failed: {check.text}"
            rows.append(TuneRow(**columns, **self._run.stamp(), status="failed", reason=reason))
        if not good:
            return rows
        clock = clock_of(chosen)
        leaders = leading([candidate.calls for candidate, _ in good], clock)
        calls = [clock.prepare(good[place][0].calls) for place in leaders]
        copies = bench.copy_calls(cell, clock)
        if copies:
            calls.append(clock.prepare(copies))
        seed = self._run.plan.profile.seed
        timed, watched = measured_unthrottled(
            self._probe, lambda: measure_together(calls, self._stopping, clock, seed), TELEMETRY_PERIOD_S
        )
        moved: dict[str, Any] = {"bytes_moved": bench.bytes_moved(cell)}
        if copies:
            moved["copy_us"] = timed[-1].interval.median * 1e6
        for place, samples in zip(leaders, timed, strict=False):
            candidate, check = good[place]
            columns = common | _identity(candidate) | self._run.stamp() | samples.columns(1e6) | watched
            columns |= moved | {"verified": check.verified, "check": check.text or "every element checked"}
            rows.append(TuneRow(**columns, lat_us=samples.interval.median * 1e6, candidates=len(candidates)))
        return rows

    def _check(self, cell: TuneCell, candidate: Candidate, chosen: Backend) -> Check:
        if candidate.algorithm.name in self._losses.barred(chosen, cell.dtype):
            raise UnsupportedHere("it crashed the GPU context in an earlier run")
        return candidate.check()

    def _keep(self, cell: TuneCell, key: Key, rows: list[TuneRow]) -> None:
        """Failed rows first and the winner last: the cell's last row says whether it is done."""
        valid = sorted((row for row in rows if row.status == "ok"), key=lambda row: -row.lat_us)
        failed = [row for row in rows if row.status != "ok"]
        self.failed += len(failed)
        if not valid:
            self._outcome.failed += 1
            self._book.add(*failed)
            return
        best = valid[-1].model_copy(update={"winner": True})
        made = (best.algorithm, best.alg_id, best.lat_us, self._store.versions(key[1]), best.run_id, best.time_utc)
        self._store.put(Winner(*key, *made))
        self._outcome.ok += 1
        self._book.add(*failed, *valid[:-1], best)

    def _skip(self, cell: TuneCell, reason: UnsupportedHere) -> None:
        self._outcome.skipped += 1
        self._none(cell, "skipped", str(reason), fingerprint(cell, reason))

    def _none(self, cell: TuneCell, status: Any, reason: str, conditions: str) -> None:
        """A cell without candidates."""
        if status == "skipped" and self._book.done(_cell_key(cell), conditions):
            return
        columns = _columns(cell) | self._run.stamp() | {"algorithm": "", "alg_id": -1, "fingerprint": conditions}
        self._book.add(TuneRow(**columns, status=status, reason=reason))


def _cell_key(cell: TuneCell) -> dict[str, object]:
    columns = _columns(cell)
    return {name: columns[name] for name in ("operation", "backend", "sparsity", "M", "N", "K")}


def _identity(candidate: Candidate) -> dict[str, Any]:
    return {
        "algorithm": candidate.algorithm.name,
        "alg_id": candidate.algorithm.alg_id,
        "config": candidate.algorithm.config,
        "path": candidate.path,
    }


def _columns(cell: TuneCell) -> dict[str, Any]:
    sparsity = cell.variant.sparsity
    lifted = sparsity is not None and cell.operation == "sparse_gemm"
    return {
        "granularity": cell.granularity,
        "operation": cell.operation,
        "backend": cell.variant.backend,
        "sparsity": "" if sparsity is None else str(sparsity),
        "M": cell.m,
        "N": cell.n,
        "K": sparsity.lifted_k(cell.k) if lifted and sparsity else cell.k,
    }


def _family(cell: TuneCell, chosen: Backend) -> str:
    if cell.operation in ("dense_gemm", "sparse_gemm"):
        return chosen.name
    return chosen.activations.norm_family if cell.operation in FUSED else chosen.activations.name


def _winner_key(cell: TuneCell, chosen: Backend) -> Key:
    sparsity = "" if cell.variant.sparsity is None else str(cell.variant.sparsity)
    return cell.operation, _family(cell, chosen), cell.dtype.value, sparsity, cell.m, cell.n, cell.k
