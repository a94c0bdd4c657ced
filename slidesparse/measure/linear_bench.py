"""Task 9: whole linear layers, from bfloat16 tokens to bfloat16 outputs, against dense and the reference's pipeline.

One sample runs the merged linears of a decoder block (qkv, o, gate_up, down), one after the other. Three kinds are
timed in the same rounds: ours (quantise + lift, sparse GEMM, dequantise + bias, each as tuned), every way that the
dense backend has (its fastest is the baseline), and the pipeline that the reference implementation runs around the
same sparse GEMM (`kernels/reference_pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere, VerificationError
from slidesparse.kernels import operands, verify
from slidesparse.kernels.backend import backend, own_revision, source_hash
from slidesparse.kernels.linear import Choice, W8A8Linear
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.kernels.verify import Check
from slidesparse.measure import telemetry
from slidesparse.measure.book import RowBook
from slidesparse.measure.cells import Table
from slidesparse.measure.clocks import clock_of, free_memory
from slidesparse.measure.linear_block import Block
from slidesparse.measure.telemetry import TELEMETRY_PERIOD_S, measured_unthrottled
from slidesparse.measure.timer import Call, Clock, Samples, measure_together, ratio
from slidesparse.plan import LinearCell, Operation, Task, Variant, fingerprint
from slidesparse.progress import Bar, track
from slidesparse.rows import LinearRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import TuningStore, kernel_versions

YARDSTICK_ERROR = 0.03
"""Relative L2 distance of the reference pipeline from ours: codes one step off at ties, sums rounded to bf16."""
CHECKED_ROWS = 256
"""Tokens of a batch whose outputs are compared with the reference: spread over it, first and last among them."""


def run_task(run: Run, task: Task) -> Outcome:
    """Measure all cells: each layer is checked against the reference first; one that is wrong fails its cell.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
        ContextLost: the GPU's context is gone.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, LinearCell)]
    with track(task.title, len(cells), run.quiet) as bar:
        for (model, dtype), table in groupby(cells, key=lambda cell: (cell.model, cell.dtype)):
            with RowBook(run.tree.linear(model, dtype)) as book:
                for variant, group in groupby(table, key=lambda cell: cell.variant):
                    _Variant(run, model, dtype, variant, outcome, book).measure(list(group), bar)
    return outcome


@dataclass(frozen=True)
class _Layer:
    """One merged linear on both sides."""

    name: str
    sparse: W8A8Linear
    dense: W8A8Linear
    codes: torch.Tensor
    """Unlifted codes [N, K]."""
    scale: torch.Tensor


class _Variant:
    """The cells of one model, type and sparse variant."""

    def __init__(self, run: Run, model: str, dtype: DType, variant: Variant, outcome: Outcome, book: RowBook) -> None:
        self._run, self._model, self._dtype, self._variant = run, model, dtype, variant
        self._table = Table(run, book, outcome, LinearRow)
        self._dense = run.plan.profile.backends.dense[0]
        linear = run.plan.profile.linear
        assert linear is not None  # a profile without it has no task 9
        assert variant.sparsity is not None
        self._stopping, self._sparsity = linear.stopping, variant.sparsity
        self._seed = run.plan.profile.seed
        self._store = TuningStore.open(run.tree.tuning_store)
        self._losses = LostContexts.open(run.tree.lost_contexts, kernel_versions())
        self._probe = telemetry.probe(run.machine)
        self._shapes = run.plan.bench.models[model].linear_shapes()
        self._folder = run.plan.checkpoint_folder(model, dtype, variant)
        self._source = ""
        """`random`, or the fingerprint of the checkpoint that weights come from; known once the first cell asks."""
        self._layers: list[_Layer] = []

    def measure(self, cells: list[LinearCell], bar: Bar) -> None:
        for cell in cells:
            done = self._table.settle(cell, _key(cell), {}, self._conditions, self._guarded)
            if not done:
                free_memory(backend(self._variant.backend))
            bar.advance(note=str(cell))

    def _conditions(self, cell: LinearCell) -> str:
        """Raises UnsupportedHere where one of the sides cannot run."""
        for name in (self._variant.backend, self._dense):
            backend(name).require(self._run.machine, self._dtype)
        self._source = self._source or operands.weight_source(self._folder)
        digest = self._store.digest({self._variant.backend, self._dense, "triton", "cpu"}, self._dtype)
        revisions = own_revision(self._variant.backend), backend(self._variant.backend).activations.revision
        kernels = *(revision for revision in revisions if revision), source_hash("reference_pipeline")
        return fingerprint(
            cell, self._stopping, self._seed, self._source, self._dense, digest, kernels, kernel_versions()
        )

    def _guarded(self, cell: LinearCell) -> dict[str, Any]:
        with self._losses.cell(backend(self._variant.backend), self._dtype, str(cell)):
            return self._cell(cell)

    # -- one cell --------------------------------------------------------------------------------------

    def _cell(self, cell: LinearCell) -> dict[str, Any]:
        """Measured columns. Raises VerificationError when a layer is wrong."""
        self._layers = self._layers or [self._layer(name) for name in self._shapes]
        layers = self._layers
        side = layers[0].sparse.backend
        seeds = range(self._seed, self._seed + len(layers))
        tokens = [
            operands.activation(cell.m, layer.sparse.k, seed, side.device)
            for layer, seed in zip(layers, seeds, strict=True)
        ]
        sparse, plain = [layer.sparse for layer in layers], [layer.dense for layer in layers]
        clock = clock_of(side)
        mine, other = Block(sparse, tokens), Block(plain, tokens)
        tuned = [linear.choices(cell.m)[0] for linear in sparse]
        ours = mine.with_fastest(tuned, self._known, clock, self._losses)
        tuned = other.with_fastest([linear.choices(cell.m)[0] for linear in plain], self._known, clock, self._losses)
        fused = zip(*(linear.choices(cell.m)[1:] for linear in plain), strict=False)
        rivals = [
            tuned,
            *([replace(own, scaled=one.scaled) for own, one in zip(tuned, way, strict=True)] for way in fused),
        ]
        checks = [
            self._check(linear, layer, x, choice)
            for path, linears in [(ours, sparse), *((rival, plain) for rival in rivals)]
            for linear, layer, x, choice in zip(linears, layers, tokens, path, strict=True)
        ]
        calls = [clock.prepare(other.calls(rival)) for rival in rivals]
        reference_calls, reference_path = self._yardstick(mine, ours, clock)
        if reference_calls:
            calls.append(clock.prepare(reference_calls))
        calls.append(clock.prepare(mine.calls(ours)))
        timed, watched = measured_unthrottled(
            self._probe, lambda: measure_together(calls, self._stopping, clock, self._seed), TELEMETRY_PERIOD_S
        )
        best = min(range(len(rivals)), key=lambda place: timed[place].interval.median)
        speedup = ratio(timed[best], timed[-1])
        steps = {name: clock.prepare(own) for name, own in mine.steps(ours).items()}
        parts = zip(
            steps, measure_together(list(steps.values()), _steps(self._stopping), clock, self._seed), strict=True
        )
        worst = verify.worst(checks)
        return {
            **{name: samples.interval.median * 1e6 for name, samples in parts},
            **timed[-1].columns(1e6),
            **watched,
            **(_against_reference(timed[-2], timed[-1]) if reference_calls else {}),
            "reference_path": reference_path,
            "lat_us": timed[-1].interval.median * 1e6,
            "layers": "; ".join(f"{layer.name} {layer.sparse.n}x{layer.sparse.k}" for layer in layers),
            "data": "random" if self._source == "random" else "model",
            "emulation": side.emulation,
            "path": _paths(layers, ours),
            "dense_us": timed[best].interval.median * 1e6,
            "dense_path": _paths(layers, rivals[best]),
            "speedup": speedup.median,
            "speedup_low": speedup.low,
            "speedup_high": speedup.high,
            "speedup_bound": self._sparsity.speedup_bound,
            "verified": worst.verified,
            "check": f"all layers, {len(rivals) + 1} paths, {min(CHECKED_ROWS, cell.m)} tokens each: {worst.text}",
        }

    def _yardstick(self, block: Block, choices: list[Choice], clock: Clock) -> tuple[list[Call], str]:
        """The reference's pipeline on a GPU, with its path; no calls, and why, where it cannot run.

        Raises VerificationError when it computes something else.
        """
        side = self._layers[0].sparse.backend
        if side.device != "cuda":
            return [], ""
        if side.scaled_only:
            return [], f"not measured: {side.name} packs weights for itself; the rows of the library's backend have it"
        from slidesparse.measure.reference_block import ReferenceBlock

        try:
            yardstick = ReferenceBlock(block, clock, self._losses.barred(side, self._dtype))
        except UnsupportedHere as error:
            return [], f"not measured: {error}"
        calls = yardstick.calls()
        _compare(calls[0](), block.calls(choices)[0]())
        return calls, yardstick.path()

    def _known(self, operation: Operation, linear: W8A8Linear, m: int) -> bool:
        """Has tuning measured this operation of a layer at M tokens?"""
        sparsity, side = linear.variant.sparsity, linear.backend
        gemm = operation in ("dense_gemm", "sparse_gemm")
        family, n = (side.name, linear.n) if gemm else (side.activations.name, 0)
        pattern = "" if sparsity is None else str(sparsity)
        return self._store.holds((operation, family, linear.dtype.value, pattern, m, n, linear.k))

    def _layer(self, name: str) -> _Layer:
        n, k = self._shapes[name]
        device = backend(self._variant.backend).device
        if self._source == "random":
            codes = operands.random_weight(n, k, self._dtype, self._sparsity, self._seed, device)
        else:
            codes = operands.model_weight(self._folder, name, (n, k), self._sparsity).to(device)
        generator = torch.Generator(device).manual_seed(self._seed)
        scale = torch.rand(n, 1, generator=generator, device=device) * 1e-3 + 1e-4
        both = [
            W8A8Linear(name, codes, scale, None, k=k, variant=variant, dtype=self._dtype, store=self._store)
            for variant in (self._variant, Variant(self._dense))
        ]
        return _Layer(name, both[0], both[1], codes, scale)

    def _check(self, linear: W8A8Linear, layer: _Layer, x: torch.Tensor, choice: Choice) -> Check:
        """Run the layer at the very size that is timed; compare some of its rows. Raises VerificationError."""
        rows = torch.linspace(0, x.shape[0] - 1, min(CHECKED_ROWS, x.shape[0]), device=x.device).long()
        with verify.poisoned_memory():
            y = linear.run(x, choice)
        error, _ = linear.backend.accumulation_error(self._dtype, linear.weight.k)
        between = 0.0 if choice.scaled else verify.OUTPUT_UNIT.get(linear.backend.output(self._dtype), 0.0)
        check = verify.check_linear(x[rows], y[rows], layer.codes, layer.scale, None, self._dtype, error, between)
        if not check.ok:
            raise VerificationError(f"{layer.name}, {linear.variant}, {choice}: check failed: {check.text}")
        return check


def _steps(stopping: Stopping) -> Stopping:
    """Steps alone only explain the whole: the least samples, no warm-up of their own."""
    return stopping.model_copy(update={"warmup_s": 0.0, "steady_rel": None, "max_samples": stopping.min_samples})


def _paths(layers: Sequence[_Layer], choices: Sequence[Choice]) -> str:
    return "; ".join(f"{layer.name}: {choice}" for layer, choice in zip(layers, choices, strict=True))


def _compare(reference: Any, ours: Any) -> None:
    """The yardstick rounds in other places, so its outputs may differ by about a percent, not more.

    Raises VerificationError.
    """
    for place, (one, other) in enumerate(zip(reference, ours, strict=True)):
        error = float(torch.linalg.vector_norm(one.float() - other.float()) / torch.linalg.vector_norm(other.float()))
        if not error <= YARDSTICK_ERROR:
            raise VerificationError(f"check failed: reference pipeline, linear {place}: relative L2 error {error:.3g}")


def _against_reference(reference: Samples, mine: Samples) -> dict[str, Any]:
    over = ratio(reference, mine)
    return {
        "reference_us": reference.interval.median * 1e6,
        "over_reference": over.median,
        "over_reference_low": over.low,
        "over_reference_high": over.high,
    }


def _key(cell: LinearCell) -> dict[str, Any]:
    return {"backend": cell.variant.backend, "sparsity": str(cell.variant.sparsity), "M": cell.m}
