"""Tasks 4 and 5: prefill and decode throughput through an engine, one session a variant for all M of both phases.

The variants of a model and type are held side by side, as many as fit, and measured in turns (`side_by_side`). Where
they do not all fit, every group holds the variants that the others are compared with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import groupby
from threading import Lock, Thread

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.verify import Check
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.engines.base import Engine, Limits, engine
from slidesparse.measure.side import Side, first
from slidesparse.measure.side_by_side import SessionFailed, measure_cell
from slidesparse.measure.statistics import paired_ratio
from slidesparse.measure.telemetry import PERIOD_S, Telemetry
from slidesparse.plan import Phase, Task, ThroughputCell, Variant
from slidesparse.progress import Bar, track
from slidesparse.run import Outcome, Run


def run_tasks(run: Run, tasks: Sequence[Task]) -> list[Outcome]:
    """Measure all cells of the tasks together: prefill, decode, or both. Returns one outcome a task.

    A cell that fails, also for want of memory, gets a failed row and the next one follows; a variant that cannot be
    loaded fails all its cells. One whose logits are wrong is measured, but its rows say so and count as failed.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    profile = run.plan.profile
    outcomes = [Outcome(seconds=0.0) for _ in tasks]
    by_phase: dict[Phase, Outcome] = {}
    cells: list[ThroughputCell] = []
    for task, outcome in zip(tasks, outcomes, strict=True):
        own = [cell for cell in task.cells if isinstance(cell, ThroughputCell)]
        by_phase |= {cell.phase: outcome for cell in own}
        cells += own
    cells.sort(key=lambda cell: (profile.models.index(cell.model), profile.dtypes.index(cell.dtype)))
    with track(" and ".join(task.title for task in tasks), len(cells), run.quiet) as bar:
        for (model, dtype), group in groupby(cells, key=lambda cell: (cell.model, cell.dtype)):
            _Model(run, model, dtype, list(group), by_phase, bar).measure()
    return outcomes


class _Model:
    """All variants of one model and type."""

    def __init__(
        self,
        run: Run,
        model: str,
        dtype: DType,
        cells: list[ThroughputCell],
        outcomes: dict[Phase, Outcome],
        bar: Bar,
    ) -> None:
        self._run, self._model, self._dtype, self._cells = run, model, dtype, cells
        self._outcomes, self._bar = outcomes, bar
        self._probe = telemetry.probe(run.machine)
        self._phases = list(dict.fromkeys(cell.phase for cell in cells))
        self._since = time.monotonic()

    def measure(self) -> None:
        profile = self._run.plan.profile
        with ExitStack() as stack:
            sides = [self._side(variant, stack) for variant in dict.fromkeys(cell.variant for cell in self._cells)]
            try:
                runs_on = engine(profile.engine)
                runs_on.require(self._run.machine)
            except UnsupportedHere as error:
                for side in sides:
                    side.all("skipped", reason_of(error))
                return
            limits = _limits(self._cells, profile.vllm.tensor_parallel_size)
            able = [side for side in sides if side.look(runs_on, limits)]
            groups = self._groups(able, runs_on, limits)
            self._say_starts(groups)
            for group in groups:
                self._measure_group(group, runs_on, limits)
            self._bill(self._phases[0])

    def _side(self, variant: Variant, stack: ExitStack) -> Side:
        paths = {phase: self._run.tree.throughput(phase, self._model, self._dtype, variant) for phase in self._phases}
        books = {phase: stack.enter_context(RowBook(path)) for phase, path in paths.items()}
        own = [cell for cell in self._cells if cell.variant == variant]
        return Side(self._run, own, books, self._outcomes, self._bar)

    def _groups(self, sides: list[Side], runs_on: Engine, limits: Limits) -> list[list[Side]]:
        """Sides to hold at a time. Each group begins with those that the others are compared with, if they fit."""
        pending = [side for side in sides if side.pending]
        if not pending:
            return []
        references = [side for side in sides if side in (first(sides, True), first(sides, False))]
        others = [side for side in pending if side not in references]
        needed = references + others
        room = runs_on.together([side.folder for side in needed], limits, self._run.machine)
        room = min(room, self._run.plan.profile.vllm.together or room)
        if len(needed) <= room:
            return [needed]
        if room <= len(references):
            return [[side] for side in pending]
        step = room - len(references)
        return [references + others[i : i + step] for i in range(0, len(others), step)]

    def _say_starts(self, groups: list[list[Side]]) -> None:
        """That memory made a run longer is worth a line."""
        starts = [side.variant for group in groups for side in group]
        if again := len(starts) - len(set(starts)):
            note = (
                f"{self._model}-{self._dtype.suffix}: {len(groups)} groups of engines, as {len(groups[0])} fit into "
                f"memory at a time; {again} started again, to compare the others with"
            )
            self._run.log.info(note)
            self._outcomes[self._phases[0]].notes.append(note)

    def _measure_group(self, group: list[Side], runs_on: Engine, limits: Limits) -> None:
        starting = next(phase for phase in self._phases if any(side.pending_in(phase) for side in group))
        try:
            for side, error in _open(group, runs_on, limits).items():
                side.fail_pending(error)
            self._bill(starting)
            for phase in self._phases:
                for cells in _by_size(group, phase):
                    self._measure_size(group, cells)
                self._bill(phase)
        finally:
            with ThreadPoolExecutor(len(group)) as pool:  # each waits for its engine to end
                list(pool.map(Side.close, group))

    def _measure_size(self, group: list[Side], cells: dict[Variant, ThroughputCell]) -> None:
        """The cells of one phase and M: those that are pending, beside the variants that they are compared with."""
        stock, dense = first(group, True), first(group, False)
        wanted = [side for side in group if cells[side.variant] in side.pending]
        if not wanted:
            return
        sides = [side for side in group if side.session is not None and side in (*wanted, stock, dense)]
        checks: dict[Side, Check] = {}
        for side in list(sides):
            try:
                checks[side] = side.check(cells[side.variant])
            except Exception as error:
                sides.remove(side)
                side.fail(cells[side.variant], error)
        while any(side in wanted for side in sides):
            one = sides[-1]
            try:
                with Telemetry(self._probe, PERIOD_S) as watch:
                    measured = measure_cell(
                        [side.session for side in sides if side.session is not None],
                        cells[one.variant],
                        one.stopping(cells[one.variant].phase),
                        self._run.plan.profile.seed,
                    )
            except SessionFailed as failure:
                lost = sides.pop(failure.place)
                lost.fail(cells[lost.variant], failure.__cause__ or failure)
                continue
            samples = {side: part.samples.values for side, part in zip(sides, measured, strict=True)}
            graphs = {side: part.graphs for side, part in zip(sides, measured, strict=True) if part.graphs}
            for side, part in zip(sides, measured, strict=True):
                if side in wanted:
                    ratios = _ratios(side, {"over_stock": stock, "over_dense": dense}, samples)
                    ratios |= _ratios(side, {"graph_over_stock": stock}, graphs)
                    side.record(cells[side.variant], part, checks[side], watch, ratios)
            return

    def _bill(self, phase: Phase) -> None:
        """The time since the last call goes to this phase; starting engines counts as the first pending phase's."""
        now = time.monotonic()
        outcome = self._outcomes[phase]
        outcome.seconds = (outcome.seconds or 0.0) + now - self._since
        self._since = now


def _open(group: list[Side], runs_on: Engine, limits: Limits) -> dict[Side, Exception]:
    """Open all sessions at once, each in a thread, and check those that are there while others start.

    Returns what went wrong. The threads are daemons: Ctrl-C need not wait for engines that are starting, which end with
    this process. A single session needs none.
    """
    errors: dict[Side, Exception] = {}
    turn = Lock()

    def open_one(side: Side) -> None:
        error = side.open(runs_on, limits, turn)
        if error is not None:
            errors[side] = error

    if len(group) == 1:
        open_one(group[0])
        return errors
    threads = [Thread(target=open_one, args=(side,), daemon=True) for side in group]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return errors


def _ratios(side: Side, references: dict[str, Side | None], samples: dict[Side, tuple[float, ...]]) -> dict[str, float]:
    """Columns of the paired ratios reference / side, for the references that were measured beside it."""
    columns: dict[str, float] = {}
    for name, reference in references.items():
        if reference is not None and reference is not side and {reference, side} <= samples.keys():
            over = paired_ratio(samples[reference], samples[side])
            columns |= {name: over.median, f"{name}_low": over.low, f"{name}_high": over.high}
    return columns


def _by_size(group: list[Side], phase: Phase) -> list[dict[Variant, ThroughputCell]]:
    """The cells of each M, in the plan's order, by variant."""
    sizes: dict[int, dict[Variant, ThroughputCell]] = {}
    for side in group:
        for cell in side.cells:
            if cell.phase == phase:
                sizes.setdefault(cell.m, {})[side.variant] = cell
    return list(sizes.values())


def _limits(cells: Sequence[ThroughputCell], tensor_parallel: int) -> Limits:
    prefill = tuple(dict.fromkeys((cell.sequences, cell.prompt_len) for cell in cells if cell.phase == "prefill"))
    decode = [cell for cell in cells if cell.phase == "decode"]
    return Limits(
        prefill,
        tuple(dict.fromkeys(cell.sequences for cell in decode)),
        decode_prompt=decode[0].prompt_len if decode else 1,
        decode_output=decode[0].output_len if decode else 1,
        tensor_parallel=tensor_parallel,
    )
