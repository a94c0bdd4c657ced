"""`bench.yaml` -> an immutable plan: the eight tasks of the reference run, two of our own, every cell of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Literal

from slidesparse.config import Bench, Linear, Model, Profile
from slidesparse.dtypes import DType
from slidesparse.pattern import Sparsity

Stage = Literal["prepare", "convert", "tune", "prefill", "decode", "kernel", "linear", "calibrate"]
Phase = Literal["prefill", "decode"]
STOCK, AUTO = "vllm", "auto"
"""Backends that only an engine has: its own kernels, untouched; its choice among all of ours."""
SQUARE = "SQUARE"
"""Stands for a model's name where M = N = K, as in published files."""


@dataclass(frozen=True)
class Variant:
    """How a linear layer runs: backend, and the pattern of its weights (None: dense)."""

    backend: str
    sparsity: Sparsity | None = None

    @property
    def folder(self) -> str:
        """Place in the result tree: `cublaslt` or `cusparselt/2_8`."""
        return self.backend if self.sparsity is None else f"{self.backend}/{self.sparsity.slug}"

    def __str__(self) -> str:
        return self.backend if self.sparsity is None else f"{self.backend} {self.sparsity}"


@dataclass(frozen=True)
class PrepareCell:
    """One quantised checkpoint."""

    model: str
    dtype: DType

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype.suffix}"


@dataclass(frozen=True)
class ConvertCell:
    """One pruned checkpoint."""

    model: str
    dtype: DType
    sparsity: Sparsity

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype.suffix}-SlideSparse-{self.sparsity.slug}"


Operation = Literal[
    "dense_gemm", "quantise", "sparse_gemm", "dequantise_bias", "quantise_lift",
    "norm_quantise", "add_norm_quantise", "gate_norm_quantise",
    "norm_quantise_lift", "add_norm_quantise_lift", "gate_norm_quantise_lift",
]  # fmt: skip
"""The last six: the fused BitNet kernels (`kernels/bitnet_reference.py`), dense and lifting."""
FUSED_BEFORE: tuple[tuple[Operation, Operation, tuple[str, ...]], ...] = (
    ("norm_quantise", "norm_quantise_lift", ("qkv", "o")),
    ("add_norm_quantise", "add_norm_quantise_lift", ("qkv", "gate_up")),
    ("gate_norm_quantise", "gate_norm_quantise_lift", ("down",)),
)
"""A fused kernel, dense and lifting, and the linears it stands before (qkv of the first block has nothing to add)."""
SPLIT_BY_RANKS = ("o", "down")
"""Linears whose K tensor parallelism splits: their norms need the other ranks' squares, so nothing is fused there."""


@dataclass(frozen=True)
class TuneCell:
    """One operation at one size, for which every candidate is measured. K is the unlifted K."""

    model: str
    dtype: DType
    granularity: Literal["coarse", "fine"]
    operation: Operation
    variant: Variant
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype.suffix} {self.operation} {self.variant} M={self.m} N={self.n} K={self.k}"


@dataclass(frozen=True)
class ThroughputCell:
    """One end-to-end measurement. `m` is tokens a step (prefill) or sequences (decode)."""

    phase: Phase
    model: str
    dtype: DType
    variant: Variant
    m: int
    prompt_len: int
    sequences: int
    steps: int
    output_len: int

    @property
    def prompts(self) -> int:
        """Prompts of one pass: every step holds `sequences` of them (prefill), or one batch (decode)."""
        return self.sequences * self.steps if self.phase == "prefill" else self.sequences

    def __str__(self) -> str:
        return f"{self.phase} {self.model}-{self.dtype.suffix} {self.variant} M={self.m}"


@dataclass(frozen=True)
class KernelCell:
    """One GEMM at one size. K is the unlifted K; `layer` names the merged linear it comes from."""

    model: str
    dtype: DType
    variant: Variant
    layer: str
    m: int
    n: int
    k: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype.suffix} {self.variant} {self.layer} M={self.m} N={self.n} K={self.k}"


@dataclass(frozen=True)
class LinearCell:
    """All merged linears of one decoder block, one after the other, of M tokens each."""

    model: str
    dtype: DType
    variant: Variant
    m: int

    def __str__(self) -> str:
        return f"{self.model}-{self.dtype.suffix} {self.variant} linears M={self.m}"


@dataclass(frozen=True)
class CalibrateCell:
    """One rate of the machine itself."""

    quantity: Literal["copy", "tensor cores"]
    dtype: DType | None = None
    """Of the tensor cores' operands."""
    sparse: bool = False
    loads: bool = False
    """Tensor cores: while memory traffic goes on beside them."""

    def __str__(self) -> str:
        if self.dtype is None:
            return self.quantity
        return f"{self.quantity} {self.dtype.value} {'2:4' if self.sparse else 'dense'}{' with loads' * self.loads}"


Cell = PrepareCell | ConvertCell | TuneCell | ThroughputCell | KernelCell | LinearCell | CalibrateCell


@dataclass(frozen=True)
class Task:
    """Numbers 1 to 8: the tasks of the reference run. From 9 on: ours."""

    number: int
    name: str
    title: str
    stage: Stage
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do; stages read it and never change it."""

    bench: Bench
    profile_name: str
    data: Path

    @property
    def profile(self) -> Profile:
        return self.bench.profile(self.profile_name)

    @cached_property
    def tasks(self) -> tuple[Task, ...]:
        p = self.profile
        high, low = p.sparsity.kernel_high, p.sparsity.kernel_low
        return (
            Task(1, "prepare", "base model preparation", "prepare", tuple(_prepare(p))),
            Task(2, "convert", "SlideSparse conversion", "convert", tuple(_convert(p))),
            Task(3, "tune", "offline tuning", "tune", tuple(_tune(p, self.bench.models))),
            Task(4, "prefill", "prefill benchmark", "prefill", tuple(_prefill(p))),
            Task(5, "decode", "decode benchmark", "decode", tuple(_decode(p))),
            Task(6, "kernel_dense", "kernel, dense", "kernel", tuple(_kernel(p, self.bench.models, None))),
            Task(7, "kernel_high", "kernel, sparse high", "kernel", tuple(_kernel(p, self.bench.models, high))),
            Task(8, "kernel_low", "kernel, sparse low", "kernel", tuple(_kernel(p, self.bench.models, low))),
            *self._own_tasks(),
        )

    def _own_tasks(self) -> Iterator[Task]:
        if self.profile.linear is not None:
            yield Task(9, "linear", "whole linear layers", "linear", linear_cells(self.profile))
        if self.profile.on_gpu:
            yield Task(10, "calibrate", "what this machine can do", "calibrate", calibrate_cells(self.profile))

    def stage_tasks(self, stage: Stage) -> tuple[Task, ...]:
        return tuple(task for task in self.tasks if task.stage == stage)

    # -- folders: the naming convention, once --------------------------------------------------------

    def base_folder(self, model: str) -> Path:
        """`checkpoints/{model}-BF16`, the model before quantisation."""
        return self.data / self.bench.paths.source / f"{model}-BF16"

    def prepared_folder(self, model: str, dtype: DType) -> Path:
        """`checkpoints/{model}-{INT8|FP8}`."""
        return self.data / self.bench.paths.checkpoints / f"{model}-{dtype.suffix}"

    def converted_folder(self, model: str, dtype: DType, sparsity: Sparsity) -> Path:
        """`checkpoints_slidesparse/{model}-{INT8|FP8}-SlideSparse-{Z}_{L}`."""
        name = f"{model}-{dtype.suffix}-SlideSparse-{sparsity.slug}"
        return self.data / self.bench.paths.converted / name

    def checkpoint_folder(self, model: str, dtype: DType, variant: Variant) -> Path:
        """The checkpoint that a variant runs on."""
        if variant.sparsity is None:
            return self.prepared_folder(model, dtype)
        return self.converted_folder(model, dtype, variant.sparsity)

    @property
    def reports_folder(self) -> Path:
        return self.data / self.bench.paths.reports


def fingerprint(*parts: object) -> str:
    """12 hex digits over everything that decides a measured value; a changed part means: measure again."""
    text = json.dumps([str(part) for part in parts])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def throughput_cells(profile: Profile, phase: Phase) -> tuple[ThroughputCell, ...]:
    """The cells of one phase; they depend on the profile alone, so the report can count those that did not run."""
    return tuple(_prefill(profile) if phase == "prefill" else _decode(profile))


def linear_cells(profile: Profile) -> tuple[LinearCell, ...]:
    """The cells of task 9, which also depend on the profile alone; none where it leaves the task out."""
    return () if profile.linear is None else tuple(_linear(profile, profile.linear))


def calibrate_cells(profile: Profile) -> tuple[CalibrateCell, ...]:
    """The cells of task 10: none without a GPU backend."""
    return tuple(_calibrate()) if profile.on_gpu else ()


# -- cells -------------------------------------------------------------------------------------------


def _prepare(p: Profile) -> Iterator[PrepareCell]:
    for model, dtype in product(p.models, p.dtypes):
        yield PrepareCell(model, dtype)


def _convert(p: Profile) -> Iterator[ConvertCell]:
    for model, dtype, sparsity in product(p.models, p.dtypes, p.sparsity.end_to_end):
        yield ConvertCell(model, dtype, sparsity)


def _variants(backends: tuple[str, ...], patterns: tuple[Sparsity, ...]) -> list[Variant]:
    return [Variant(backend, sparsity) for backend, sparsity in product(backends, patterns)]


def _tune(p: Profile, models: dict[str, Model]) -> Iterator[TuneCell]:
    """Coarse: dense GEMM and quantise. Fine: sparse GEMM, dequantise + bias, quantise + lift.

    Quantise + lift is tuned for every pattern that whole linear layers are measured with. Backends share the kernels
    around their GEMMs, so the first sparse backend stands for all. The fused BitNet kernels,
    fine, for the end-to-end patterns, where the engine runs them: in vLLM.

    A kernel that works on activations depends on K alone, one that works on outputs on N alone, so
    those get one cell for each distinct size (N or K is then 0).
    """
    dense = [Variant(backend) for backend in p.backends.dense]
    sparse = _variants(p.backends.every_sparse, p.sparsity.end_to_end)
    first = p.backends.sparse[:1]
    patterns = p.sparsity.end_to_end if p.linear is None else p.sparsity.every
    lifted = [Variant(backend, pattern) for backend, pattern in product(first, patterns)]
    for model, dtype in product(p.models, p.dtypes):
        shapes = list(dict.fromkeys(models[model].linear_shapes().values()))
        columns, rows = sorted({k for _, k in shapes}), sorted({n for n, _ in shapes})
        for m, variant in product(p.tune.coarse_m, dense):
            for n, k in shapes:
                yield TuneCell(model, dtype, "coarse", "dense_gemm", variant, m, n, k)
            for k in columns:
                yield TuneCell(model, dtype, "coarse", "quantise", variant, m, 0, k)
        for m, variant in product(p.tune.fine_m, sparse):
            for n, k in shapes:
                yield TuneCell(model, dtype, "fine", "sparse_gemm", variant, m, n, k)
        for m, variant, k in product(p.tune.fine_m, lifted, columns):
            yield TuneCell(model, dtype, "fine", "quantise_lift", variant, m, 0, k)
        for m, backend, n in product(p.tune.fine_m, first, rows):
            yield TuneCell(model, dtype, "fine", "dequantise_bias", Variant(backend), m, n, 0)
        if p.engine == "vllm" and models[model].config["model_type"] == "bitnet":
            yield from _tune_fused(p, model, dtype, models[model].linear_shapes())


def _tune_fused(p: Profile, model: str, dtype: DType, shapes: dict[str, tuple[int, int]]) -> Iterator[TuneCell]:
    """Dense as finely as lifted: both run at every M of decode, where a launch's choice matters most.

    Backends share these kernels and their winners, so one dense and one sparse backend stand for all.
    """
    dense_side, sparse_side = p.backends.dense[:1], p.backends.sparse[:1]
    variants = [Variant(backend) for backend in dense_side]
    variants += [Variant(backend, pattern) for backend, pattern in product(sparse_side, p.sparsity.end_to_end)]
    left_out = SPLIT_BY_RANKS if p.vllm.tensor_parallel_size > 1 else ()
    for m, variant, (dense, lifting, layers) in product(p.tune.fine_m, variants, FUSED_BEFORE):
        for k in sorted({shapes[layer][1] for layer in layers if layer not in left_out}):
            yield TuneCell(model, dtype, "fine", dense if variant.sparsity is None else lifting, variant, m, 0, k)


def _end_to_end(p: Profile) -> list[Variant]:
    dense = [Variant(backend) for backend in p.backends.engine_dense]
    return dense + _variants(p.backends.engine_sparse, p.sparsity.end_to_end)


def _prefill(p: Profile) -> Iterator[ThroughputCell]:
    for model, dtype, variant, m in product(p.models, p.dtypes, _end_to_end(p), p.prefill.m):
        prompt = min(m, p.prefill.prompt_cap)
        yield ThroughputCell("prefill", model, dtype, variant, m, prompt, m // prompt, p.prefill.steps, 1)


def _decode(p: Profile) -> Iterator[ThroughputCell]:
    for model, dtype, variant, m in product(p.models, p.dtypes, _end_to_end(p), p.decode.m):
        out = p.decode.output_len
        yield ThroughputCell("decode", model, dtype, variant, m, p.decode.prompt_len, m, out, out)


def _kernel(p: Profile, models: dict[str, Model], patterns: tuple[Sparsity, ...] | None) -> Iterator[KernelCell]:
    dense = [Variant(backend) for backend in p.backends.dense]
    variants = dense if patterns is None else _variants(p.backends.sparse, patterns)
    for model, dtype, variant in product(p.models, p.types, variants):
        for m, (layer, (n, k)) in product(p.kernel.m, models[model].linear_shapes().items()):
            yield KernelCell(model, dtype, variant, layer, m, n, k)
    for dtype, variant, size in product(p.types, variants, p.kernel.square):
        yield KernelCell(SQUARE, dtype, variant, "square", size, size, size)


def _linear(p: Profile, linear: Linear) -> Iterator[LinearCell]:
    for model, dtype, variant, m in product(
        p.models, p.dtypes, _variants(p.backends.sparse, p.sparsity.every), linear.m
    ):
        yield LinearCell(model, dtype, variant, m)


def _calibrate() -> Iterator[CalibrateCell]:
    yield CalibrateCell("copy")
    for dtype, sparse, loads in product(DType, (False, True), (False, True)):
        yield CalibrateCell("tensor cores", dtype, sparse, loads)
