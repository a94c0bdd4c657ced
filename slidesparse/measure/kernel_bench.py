"""Tasks 6 to 8: GEMM latency of every algorithm at every point, dense and sparse, each checked before it is timed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from itertools import groupby
from typing import Any

import pandas as pd

from slidesparse import machine as machines
from slidesparse import records
from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere, VerificationError
from slidesparse.kernels import operands
from slidesparse.kernels.backend import Algorithm, Backend, backend, named, own_revision
from slidesparse.kernels.gemm_library import loaded_versions
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.kernels.verify import Check
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook
from slidesparse.measure.cells import Table
from slidesparse.measure.clocks import clock_of, free_memory
from slidesparse.measure.gemm_point import GemmPoint, LayerWeight, Product, Ranked, rank
from slidesparse.measure.scaled_point import point_of, whole_point
from slidesparse.measure.timer import Call, Samples, leading, ratio
from slidesparse.pattern import Sparsity
from slidesparse.plan import SQUARE, KernelCell, Task, Variant, fingerprint
from slidesparse.progress import Bar, track
from slidesparse.rows import BEST, KernelDenseRow, KernelRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import kernel_versions

Rival = tuple[str, Call]
"""Path and prepared call of what a point is timed beside."""
DENSE_RIVALS, SPARSE_RIVALS = ("cutlass",), ("cusparselt",)
"""What a GEMM with its epilogue is timed beside wherever it can run: vLLM's dense GEMM, which has no form without
scales, and the library's sparse one."""
DENSE_LEADERS = 2
"""Dense algorithms that are timed beside the sparse leaders, the winner of task 6 among them or one more."""


def run_task(run: Run, task: Task) -> Outcome:
    """Measure all points of one kernel task.

    Weights are the model's own where there is a checkpoint with the pattern, else random ones that keep to it
    (column `data`). Every algorithm is checked on a poisoned output first; if one is wrong the point is a failed
    row without numbers. A sparse row holds the dense twin's latency, interleaved, and the paired ratio. Of a backend
    that never runs without its epilogue both sides have it, and the libraries' sparse GEMM with a second kernel for
    the epilogue is timed beside them.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, KernelCell)]
    with track(task.title, len(cells), run.quiet) as bar:
        for (model, dtype, variant), group in groupby(cells, key=lambda cell: (cell.model, cell.dtype, cell.variant)):
            _Table(run, model, dtype, variant, list(group), outcome).measure(bar)
    return outcome


class _Table:
    """The points of one file: one model, type and variant."""

    def __init__(
        self,
        run: Run,
        model: str,
        dtype: DType,
        variant: Variant,
        cells: list[KernelCell],
        outcome: Outcome,
    ) -> None:
        self._run, self._model, self._dtype, self._variant, self._cells = run, model, dtype, variant, cells
        self._outcome = outcome
        self._probe = telemetry.probe(run.machine)
        self._stopping: Stopping = run.plan.profile.kernel.stopping
        self._seed = run.plan.profile.seed
        self._versions = kernel_versions()
        self._losses = LostContexts.open(run.tree.lost_contexts, self._versions)
        self._folder = run.plan.checkpoint_folder(model, dtype, variant)
        """Of a model that has no such checkpoint (16-bit types, square shapes): not there, so weights are random."""
        self._source = ""
        """`random`, or the fingerprint of the checkpoint that weights come from; known once the first cell asks."""
        self._weights: dict[tuple[str, str, int, int], LayerWeight] = {}
        self._row: type[KernelRow] = KernelDenseRow if variant.sparsity is None else KernelRow

    def measure(self, bar: Bar) -> None:
        path = self._run.tree.kernel(self._model, self._dtype, self._variant)
        try:
            side = backend(self._variant.backend)
            side.require(self._run.machine, self._dtype)
            header = self._header(side)
        except UnsupportedHere as error:
            with RowBook(path, self._header(None)) as book:
                table = Table(self._run, book, self._outcome, self._row)
                for cell in self._cells:
                    table.skip(cell, _key(cell), _columns(cell), str(error))
                    bar.advance(note=str(cell))
            return
        with RowBook(path, header) as book:
            table = Table(self._run, book, self._outcome, self._row)
            for cell in self._cells:
                columns = _columns(cell) | {"emulation": side.emulation}
                done = table.settle(cell, _key(cell), columns, self._conditions, self._guarded)
                if not done:
                    free_memory(side)
                bar.advance(note=str(cell))
        free_memory(side)

    def _conditions(self, cell: KernelCell) -> str:
        self._source = self._source or operands.weight_source(self._folder)
        dense = self._run.plan.profile.backends.dense[0]
        return fingerprint(cell, self._stopping, self._seed, self._source, dense, self._versions, *_own(cell.variant))

    def _guarded(self, cell: KernelCell) -> dict[str, Any]:
        side = backend(cell.variant.backend)
        with self._losses.cell(side, cell.dtype, str(cell)):
            return self._point(cell, side)

    # -- one point -------------------------------------------------------------------------------------

    def _point(self, cell: KernelCell, side: Backend) -> dict[str, Any]:
        """Measured columns. Raises VerificationError when an algorithm is wrong."""
        sparsity = cell.variant.sparsity
        weight = self._weight(cell, side)
        product = Product(weight.plain, cell.dtype, cell.m, self._seed)
        point = point_of(side, weight, product, sparsity)
        two_kernels, twins = self._two_kernels(cell, side, product, weight), self._twins_of(cell, side, product, weight)
        rivals = [call for _, call in (*two_kernels, *twins)]
        ranking = rank(point, self._stopping, clock_of(side), self._seed, self._losses, self._probe, rivals)
        best = ranking.leaders[0]
        check = _good(side, best.algorithm, point.check(best.algorithm))  # once more, after it was timed
        columns: dict[str, Any] = {}
        if sparsity is not None:
            others, dense = ranking.rivals[: len(two_kernels)], ranking.rivals[len(two_kernels) :]
            columns = _against("dense", "speedup", twins, dense, best.samples) | {
                "speedup_bound": sparsity.speedup_bound
            }
            if two_kernels:
                columns |= _against("two_kernels", "over_two_kernels", two_kernels, others, best.samples)
        return {
            **columns,
            **_best_columns(ranking.leaders, 2.0 * cell.m * cell.n * weight.packed.k),
            **best.samples.columns(1e6),
            **ranking.telemetry,
            "alg_count": ranking.checked,
            "algorithm": best.algorithm.name,
            "path": point.path(best.algorithm),
            "data": weight.data,
            "verified": check.verified,
            "check": f"all {ranking.checked} algorithms; the best: {check.text}",
        }

    def _twins_of(self, cell: KernelCell, side: Backend, product: Product, weight: LayerWeight) -> list[Rival]:
        """The leading dense algorithms on the same product, checked; the winner of task 6 last. A GEMM with its
        epilogue meets the epilogues of every dense backend at hand."""
        if cell.variant.sparsity is None:
            return []
        dense = backend(self._run.plan.profile.backends.dense[0])
        dense.require(self._run.machine, cell.dtype)
        if side.scaled_only:
            names = self._at_hand((*self._run.plan.profile.backends.dense, *DENSE_RIVALS), cell.dtype)
            return [rival for name in names for rival in self._whole(cell, name, None, product, weight)]
        point = GemmPoint(dense, self._packed(cell, dense, None, weight), product, None)
        clock = clock_of(dense)
        candidates, _ = point.candidates(self._losses)
        known = self._of_task_6(cell, dense, point)
        places = leading([candidate.calls for candidate in candidates], clock, DENSE_LEADERS)
        chosen = {candidates[place].algorithm.name: candidates[place].algorithm for place in reversed(places)}
        if known is not None:
            chosen.pop(known.name, None)
            chosen[known.name] = known
        return [(point.path(one), clock.prepare(point.calls(one))) for one in chosen.values()]

    def _two_kernels(self, cell: KernelCell, side: Backend, product: Product, weight: LayerWeight) -> list[Rival]:
        """For a GEMM with its epilogue: sparse GEMMs without, with a kernel for it behind them, on the same weight."""
        if not side.scaled_only or cell.variant.sparsity is None:
            return []
        names = self._at_hand((*self._run.plan.profile.backends.sparse, *SPARSE_RIVALS), cell.dtype)
        sparsity = cell.variant.sparsity
        return [rival for name in names for rival in self._whole(cell, name, sparsity, product, weight)]

    def _at_hand(self, names: Iterable[str], dtype: DType) -> list[str]:
        """Those that this machine can run, but for sparse ones that are no two kernels."""
        found = []
        for name in dict.fromkeys(names):
            try:
                side = backend(name)
                side.require(self._run.machine, dtype)
            except UnsupportedHere as error:
                self._run.log.info("not among the rivals: %s", error)
                continue
            if not (side.sparse and side.scaled_only):
                found.append(name)
        return found

    def _whole(
        self, cell: KernelCell, name: str, sparsity: Sparsity | None, product: Product, weight: LayerWeight
    ) -> list[Rival]:
        """The leading algorithm of another backend, with its whole epilogue, checked. None where it has none."""
        side = backend(name)
        point = whole_point(side, self._packed(cell, side, sparsity, weight), product, sparsity)
        candidates, _ = point.candidates(self._losses)
        places = leading([candidate.calls for candidate in candidates], clock_of(side), 1)
        chosen = [candidates[place] for place in places]
        return [(point.path(one.algorithm), clock_of(side).prepare(one.calls)) for one in chosen]

    def _packed(self, cell: KernelCell, side: Backend, sparsity: Sparsity | None, weight: LayerWeight) -> LayerWeight:
        """The weight of a point as another backend multiplies it."""
        key = (side.name, cell.layer, cell.n, cell.k)
        if key not in self._weights:
            self._weights[key] = LayerWeight.pack(weight.plain, weight.data, cell.dtype, sparsity, side, cell.layer)
        return self._weights[key]

    def _of_task_6(self, cell: KernelCell, dense: Backend, point: GemmPoint) -> Algorithm | None:
        """The winner of the same point in the dense task, if its row is there and made with the same libraries."""
        twin = replace(cell, variant=Variant(dense.name))
        frame, source = self._task_6
        conditions = fingerprint(twin, self._stopping, self._seed, source, dense.name, self._versions)
        if not records.done_in(frame, _key(twin), conditions):
            return None
        rows = frame[(frame["M"] == twin.m) & (frame["N"] == twin.n) & (frame["K"] == twin.k)]
        return named(point.algorithms(), str(rows["algorithm"].iloc[-1]))

    @cached_property
    def _task_6(self) -> tuple[pd.DataFrame, str]:
        """The dense task's table, which no sparse point changes, and where its weights came from."""
        dense = Variant(self._run.plan.profile.backends.dense[0])
        folder = self._run.plan.checkpoint_folder(self._model, self._dtype, dense)
        return records.read(self._run.tree.kernel(self._model, self._dtype, dense)), operands.weight_source(folder)

    def _weight(self, cell: KernelCell, side: Backend) -> LayerWeight:
        key = (side.name, cell.layer, cell.n, cell.k)
        if key not in self._weights:
            sparsity = cell.variant.sparsity
            if self._source == "random":
                plain = operands.random_weight(cell.n, cell.k, cell.dtype, sparsity, self._seed, side.device)
            else:
                plain = operands.model_weight(self._folder, cell.layer, (cell.n, cell.k), sparsity)
            data = "random" if self._source == "random" else "model"
            if cell.model == SQUARE:
                self._weights.clear()  # each size comes once, and the large ones are gigabytes
            self._weights[key] = LayerWeight.pack(plain, data, cell.dtype, sparsity, side, cell.layer)
        return self._weights[key]

    # -- the head of the file ----------------------------------------------------------------------------

    def _header(self, side: Backend | None) -> list[str]:
        """`#` lines with the keys of the published files."""
        run, host, sparsity = self._run, self._run.machine, self._variant.sparsity
        first = self._cells[0]
        shapes = {cell.layer: (cell.n, _lifted(cell)) for cell in self._cells}
        size = (self._dtype, first.m, first.n, _lifted(first))
        count = 0
        if side:
            count = len(side.scaled_algorithms(*size, bias=False) if side.scaled_only else side.algorithms(*size))
        compute = "cc0" if host.gpu is None else "cc{}{}".format(*host.gpu.compute_capability)
        packages = machines.package_versions()
        stopping = self._stopping
        out = "none" if side is None else str(side.output(self._dtype)).removeprefix("torch.").upper()
        lines = [
            f"GPU: {'none, CPU emulation: ' + host.cpu if host.gpu is None else host.gpu.name}",
            f"CC: {compute}",
            f"Mode: {'square' if self._model == SQUARE else 'model'}",
            f"Model: {self._model}" if self._model == SQUARE else f"Model: {self._model}-{self._dtype.suffix}",
            f"Backend: {self._variant.backend}",
            f"dtype: {self._dtype.value} -> {out} (like for like: dense and sparse write the same type)",
            f"alg_count: {count}",
            f"torch: {packages.get('torch', 'unknown')}",
            f"CUDA runtime: {host.cuda or 'none'}",
            *(f"{name}: {version}" for name, version in loaded_versions().items()),
            f"warmup={stopping.warmup_s} s, repeat={stopping.min_samples}..{stopping.max_samples} until the "
            f"95 % interval is within +-{stopping.ci_rel:.0%} or {stopping.cap_s} s, verify=True",
            f"M_list: {sorted({cell.m for cell in self._cells})}",
            f"NK_list: {list(shapes.values())}",
        ]
        if sparsity is not None:
            lines.append(f"Sparsity: {sparsity.slug} (K_factor={sparsity.expansion:.3f})")
        return [*lines, f"Run: {run.run_id}", f"Time: {datetime.now(UTC).isoformat(timespec='seconds')}"]


def _against(
    side: str, figure: str, rivals: Sequence[Rival], timed: Sequence[Samples], mine: Samples
) -> dict[str, Any]:
    """Columns of the fastest rival, and of the paired ratio to it."""
    place = min(range(len(rivals)), key=lambda place: timed[place].interval.median)
    over = ratio(timed[place], mine)
    return {
        f"{side}_us": timed[place].interval.median * 1e6,
        f"{side}_path": rivals[place][0],
        figure: over.median,
        f"{figure}_low": over.low,
        f"{figure}_high": over.high,
    }


def _own(variant: Variant) -> tuple[str, ...]:
    """What else a figure depends on: the kernels of a backend of ours."""
    revision = own_revision(variant.backend)
    return (revision,) if revision else ()


def _good(side: Backend, algorithm: Algorithm, check: Check) -> Check:
    if not check.ok:
        raise VerificationError(f"{side.name} {algorithm.name}: check failed: {check.text}")
    return check


def _lifted(cell: KernelCell) -> int:
    return cell.k if cell.variant.sparsity is None else cell.variant.sparsity.lifted_k(cell.k)


def _key(cell: KernelCell) -> dict[str, object]:
    return {"M": cell.m, "N": cell.n, "K": _lifted(cell)}


def _columns(cell: KernelCell) -> dict[str, Any]:
    sparsity = cell.variant.sparsity
    return {
        **_key(cell),
        "layer": cell.layer,
        "K_model": cell.k,
        "backend": cell.variant.backend,
        "sparsity": "" if sparsity is None else str(sparsity),
    }


def _best_columns(ranked: list[Ranked], operations: float) -> dict[str, Any]:
    """The published columns of the best three."""
    columns: dict[str, Any] = {}
    for place, entry in enumerate(ranked[:BEST], start=1):
        seconds = entry.samples.interval.median
        columns |= {
            f"tops_{place}": operations / seconds / 1e12,
            f"lat_us_{place}": seconds * 1e6,
            f"alg_id_{place}": entry.algorithm.alg_id,
            f"split_k_{place}": entry.algorithm.split_k,
            f"workspace_{place}": entry.algorithm.workspace,
        }
    return columns
