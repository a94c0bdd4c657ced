"""Tasks 6 to 8: GEMM latency of every algorithm at every point, dense and sparse, each checked before it is timed."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import groupby
from typing import Any

from slidesparse import machine as machines
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import DiskError, UnsupportedHere, VerificationError
from slidesparse.kernels import operands
from slidesparse.kernels import reference as ref
from slidesparse.kernels.backend import Algorithm, Backend, backend
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.gemm_point import LayerWeight, Product, Ranked, checked_call, rank
from slidesparse.measure.telemetry import Telemetry
from slidesparse.measure.timer import Clock, Pairs, Samples, WallClock, measure_pairs
from slidesparse.plan import KernelCell, Task, Variant, fingerprint
from slidesparse.progress import Bar, track
from slidesparse.rows import BEST, KernelDenseRow, KernelRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import kernel_versions


def run_task(run: Run, task: Task) -> Outcome:
    """Measure all points of one kernel task.

    Weights are the model's own where there is a checkpoint with the pattern, else random ones that keep to it
    (column `data`). Every algorithm is checked on a poisoned output first; if one is wrong the point is a failed
    row without numbers. A sparse row holds the dense twin's latency, interleaved, and the paired ratio.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, KernelCell)]
    twins: dict[tuple[str, DType, str, int], Algorithm] = {}
    with track(task.title, len(cells), run.quiet) as bar:
        for (model, dtype, variant), group in groupby(cells, key=lambda cell: (cell.model, cell.dtype, cell.variant)):
            _Table(run, model, dtype, variant, list(group), outcome, twins).measure(bar)
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
        twins: dict[tuple[str, DType, str, int], Algorithm],
    ) -> None:
        self._run, self._model, self._dtype, self._variant, self._cells = run, model, dtype, variant, cells
        self._outcome, self._twins = outcome, twins
        self._clock: Clock = WallClock()
        self._probe = telemetry.probe(run.machine)
        self._stopping: Stopping = run.plan.profile.kernel.stopping
        self._seed = run.plan.profile.seed
        self._versions = kernel_versions()
        self._folder = run.plan.checkpoint_folder(model, dtype, variant)
        self._source = ""
        """`random`, or the fingerprint of the checkpoint that weights come from; known once the first cell asks."""
        self._weights: dict[tuple[str, str], LayerWeight] = {}
        self._row: type[KernelRow] = KernelDenseRow if variant.sparsity is None else KernelRow

    def measure(self, bar: Bar) -> None:
        path = self._run.tree.kernel(self._model, self._dtype, self._variant)
        try:
            side = backend(self._variant.backend)
            side.require(self._run.machine, self._dtype)
        except UnsupportedHere as error:
            with RowBook(path, self._header(None)) as book:
                for cell in self._cells:
                    self._skip(cell, str(error), book)
                    bar.advance(note=str(cell))
            return
        with RowBook(path, self._header(side)) as book:
            for cell in self._cells:
                self._cell(cell, side, book)
                bar.advance(note=str(cell))

    def _cell(self, cell: KernelCell, side: Backend, book: RowBook) -> None:
        dense = self._run.plan.profile.backends.dense[0]
        columns = _columns(cell) | {"fingerprint": "", "emulation": side.emulation}
        try:
            if not self._source:
                self._source = Checkpoint.open(self._folder).fingerprint() if self._folder.exists() else "random"
            conditions = fingerprint(cell, self._stopping, self._seed, self._source, dense, self._versions)
            columns["fingerprint"] = conditions
            if book.done(_key(cell), conditions):
                self._outcome.ok += 1
                self._outcome.done_before += 1
                return
            columns |= self._point(cell, side)
            row = self._row(**(columns | self._run.stamp()))
            self._outcome.ok += 1
        except DiskError:
            raise
        except UnsupportedHere as error:
            self._skip(cell, str(error), book)
            return
        except Exception as error:
            self._run.log.exception("kernel %s", cell)
            self._outcome.failed += 1
            if isinstance(error, VerificationError):
                columns |= {"verified": "failed", "check": reason_of(error)}
            row = self._row(**(columns | self._run.stamp()), status="failed", reason=reason_of(error))
        book.add(row)

    def _skip(self, cell: KernelCell, reason: str, book: RowBook) -> None:
        self._outcome.skipped += 1
        conditions = fingerprint(cell, "skipped", reason)
        if not book.done(_key(cell), conditions):
            columns = _columns(cell) | self._run.stamp() | {"fingerprint": conditions}
            book.add(self._row(**columns, status="skipped", reason=reason))

    # -- one point -------------------------------------------------------------------------------------

    def _point(self, cell: KernelCell, side: Backend) -> dict[str, Any]:
        """Measured columns. Raises VerificationError when an algorithm is wrong."""
        weight = self._weight(cell, side)
        product = Product.make(weight.plain, cell.dtype, cell.m, self._seed)
        sparsity = cell.variant.sparsity
        x = product.codes if sparsity is None else ref.lift(product.codes, sparsity)
        with Telemetry(self._probe) as watch:
            ranked = rank(side, x, weight.packed, product, self._stopping, self._clock)
            samples, columns = ranked[0].samples, {}
            if sparsity is not None:
                pairs, twin_path = self._against_dense(cell, product, weight, ranked[0])
                samples = pairs.second
                columns = {
                    "dense_us": pairs.first.interval.median * 1e6,
                    "dense_path": twin_path,
                    "speedup": pairs.ratio.median,
                    "speedup_low": pairs.ratio.low,
                    "speedup_high": pairs.ratio.high,
                    "speedup_bound": sparsity.speedup_bound,
                }
        best = ranked[0]
        return {
            **columns,
            **_best_columns(ranked, samples, 2.0 * cell.m * cell.n * weight.packed.k),
            **samples.columns(1e6),
            **watch.columns(),
            "alg_count": len(ranked),
            "algorithm": best.algorithm.name,
            "path": side.path(cell.dtype, best.algorithm),
            "data": weight.data,
            "verified": best.check.verified,
            "check": f"all {len(ranked)} algorithms: {best.check.text}",
        }

    def _against_dense(
        self, cell: KernelCell, product: Product, weight: LayerWeight, best: Ranked
    ) -> tuple[Pairs, str]:
        """Time the best sparse algorithm and the best dense one alternately, on the same product."""
        dense = backend(self._run.plan.profile.backends.dense[0])
        dense.require(self._run.machine, cell.dtype)
        twin = self._weights.get((dense.name, cell.layer))
        if twin is None:
            twin = LayerWeight.pack(weight.plain, weight.data, cell.dtype, None, dense, cell.layer)
            self._weights[(dense.name, cell.layer)] = twin
        place = (cell.model, cell.dtype, cell.layer, cell.m)
        if place not in self._twins:
            ranked = rank(dense, product.codes, twin.packed, product, self._stopping, self._clock)
            self._twins[place] = ranked[0].algorithm
        algorithm = self._twins[place]
        call, _ = checked_call(dense, algorithm, product.codes, twin.packed, product)
        pairs = measure_pairs(call, best.call, self._stopping, self._clock, self._seed)
        return pairs, dense.path(cell.dtype, algorithm)

    def _weight(self, cell: KernelCell, side: Backend) -> LayerWeight:
        key = (side.name, cell.layer)
        if key not in self._weights:
            sparsity = cell.variant.sparsity
            if self._source == "random":
                plain = operands.random_weight(cell.n, cell.k, cell.dtype, sparsity, self._seed)
            else:
                plain = operands.model_weight(self._folder, cell.layer, (cell.n, cell.k), sparsity)
            data = "random" if self._source == "random" else "model"
            self._weights[key] = LayerWeight.pack(plain, data, cell.dtype, sparsity, side, cell.layer)
        return self._weights[key]

    # -- the head of the file ----------------------------------------------------------------------------

    def _header(self, side: Backend | None) -> list[str]:
        """`#` lines with the keys of the published files."""
        run, host, sparsity = self._run, self._run.machine, self._variant.sparsity
        first = self._cells[0]
        shapes = {cell.layer: (cell.n, _lifted(cell)) for cell in self._cells}
        count = len(side.algorithms(self._dtype, first.m, first.n, _lifted(first))) if side else 0
        compute = "cc0" if host.gpu is None else "cc{}{}".format(*host.gpu.compute_capability)
        packages = machines.package_versions()
        stopping = self._stopping
        out = "INT32" if self._dtype is DType.INT8 else "FP32"
        lines = [
            f"GPU: {'none, CPU emulation: ' + host.cpu if host.gpu is None else host.gpu.name}",
            f"CC: {compute}",
            "Mode: model",
            f"Model: {self._model}-{self._dtype.suffix}",
            f"Backend: {self._variant.backend}",
            f"dtype: {self._dtype.value} -> {out} (like for like: dense and sparse give the accumulator)",
            f"alg_count: {count}",
            f"torch: {packages.get('torch', 'unknown')}",
            f"CUDA runtime: {host.cuda or 'none'}",
            f"warmup={stopping.warmup_s} s, repeat={stopping.min_samples}..{stopping.max_samples} until the "
            f"95 % interval is within +-{stopping.ci_rel:.0%} or {stopping.cap_s} s, verify=True",
            f"M_list: {sorted({cell.m for cell in self._cells})}",
            f"NK_list: {list(shapes.values())}",
        ]
        if sparsity is not None:
            lines.append(f"Sparsity: {sparsity.slug} (K_factor={sparsity.expansion:.3f})")
        return [*lines, f"Run: {run.run_id}", f"Time: {datetime.now(UTC).isoformat(timespec='seconds')}"]


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


def _best_columns(ranked: list[Ranked], best: Samples, operations: float) -> dict[str, Any]:
    """The published columns of the best three. `best`: samples of the first (from the interleaved run if sparse)."""
    columns: dict[str, Any] = {}
    for place, entry in enumerate(ranked[:BEST], start=1):
        seconds = (best if place == 1 else entry.samples).interval.median
        columns |= {
            f"tops_{place}": operations / seconds / 1e12,
            f"lat_us_{place}": seconds * 1e6,
            f"alg_id_{place}": entry.algorithm.alg_id,
            f"split_k_{place}": entry.algorithm.split_k,
            f"workspace_{place}": entry.algorithm.workspace,
        }
    return columns
