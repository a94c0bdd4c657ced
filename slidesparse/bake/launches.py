"""Every launch of our Triton kernels that a profile can come to, made through the functions that make it in a run.

Tensors are of device `meta`: sizes, types and alignment without memory. Torch's allocator aligns every tensor to more
than the 16 bytes that Triton asks about, as `meta` tensors are. What is launched is decided where it is decided in a
run (`Activations`, the launch functions of the kernels), so nothing here knows arguments of a kernel.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

import torch

from slidesparse.config import Model
from slidesparse.dtypes import DType
from slidesparse.kernels import reference_pipeline, triton_copy, triton_rope
from slidesparse.kernels.backend import ActivationOperation, backend
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.gpu import FP8_CAPABILITY, output
from slidesparse.kernels.gpu_activations import TritonActivations
from slidesparse.kernels.triton_dequantise import DEQUANTISE_LAUNCHES
from slidesparse.measure.engines.vllm_memory import BLOCK, Widths
from slidesparse.pattern import Sparsity, align
from slidesparse.plan import SPLIT_BY_RANKS, KernelCell, LinearCell, Plan, TuneCell
from slidesparse.tuning.candidates import EPS, FUSED

ALIGNMENT = 16
"""Triton has kernels of their own for integers that are multiples of this."""


def token_counts() -> tuple[int, ...]:
    """An M of every class that launch code or Triton tells apart: 1, each below the rows of a program, multiples of 16,
    all others."""
    rows = max(launch.rows for launch in DEQUANTISE_LAUNCHES)
    return (*range(1, rows + 2), align(rows + 2, ALIGNMENT))


def launch_all(plan: Plan, architecture: int) -> None:
    """Launch everything that the plan can launch on `architecture` (90: compute capability 9.0); for `trace`.

    The profile has GPU backends. FP8 is left out where the GPU has none.
    """
    for launch in triton_copy.LAUNCHES:
        buffer = _empty(triton_copy.GRAIN, dtype=torch.uint8)
        triton_copy.copy(buffer, buffer, launch)
    able = divmod(architecture, 10) >= FP8_CAPABILITY
    for dtype in (dtype for dtype in plan.profile.dtypes if able or dtype is not DType.FP8):
        for name in plan.profile.models:
            _launch_model(plan, plan.bench.models[name], name, dtype)


def _launch_model(plan: Plan, model: Model, name: str, dtype: DType) -> None:
    cells = [cell for task in plan.tasks for cell in task.cells]
    tuned = [cell for cell in cells if isinstance(cell, TuneCell) and (cell.model, cell.dtype) == (name, dtype)]
    rows, columns = _sizes(plan, model)
    scaled_only = any(backend(one).scaled_only for one in plan.profile.backends.sparse)
    rows |= {cell.n for cell in cells if scaled_only and isinstance(cell, KernelCell)}
    patterns = {None, *(cell.variant.sparsity for cell in tuned), *plan.profile.sparsity.end_to_end}
    linear = {cell.variant.sparsity for cell in cells if isinstance(cell, LinearCell)} - {None}
    for k, sparsity in product(sorted(columns), sorted(patterns | linear, key=str)):
        quantise(dtype, sparsity, k)
    for before, sparsity, k in dict.fromkeys(
        (FUSED[cell.operation], cell.variant.sparsity, cell.k) for cell in tuned if cell.operation in FUSED
    ):
        norm_and_quantise(before, dtype, sparsity, k)
    for n in sorted(rows):
        dequantise(output(dtype), n, _biases(plan, model))
    if plan.profile.engine == "vllm" and model.config["model_type"] == "bitnet":
        widths, ranks = Widths.of(model.config), plan.profile.vllm.tensor_parallel_size
        rope(widths.heads // ranks, widths.kv_heads_of_rank(ranks), widths.head_dim)
    if linear:
        reference(dtype, sorted(linear, key=str), sorted(rows), sorted(columns))


def quantise(dtype: DType, sparsity: Sparsity | None, k: int, tokens: Iterable[int] | None = None) -> None:
    """Quantise, and lift, rows of K values, by every launch that tuning tries; `tokens`: the Ms, one of every class."""
    kernels = TritonActivations()
    operation: ActivationOperation = "quantise" if sparsity is None else "quantise_lift"
    for m, algorithm in product(token_counts() if tokens is None else tokens, kernels.algorithms(operation, dtype)):
        kernels.quantise(_empty(m, k, dtype=torch.bfloat16), dtype, sparsity, algorithm)


def norm_and_quantise(
    before: BitNetOperation, dtype: DType, sparsity: Sparsity | None, k: int, tokens: Iterable[int] | None = None
) -> None:
    """The fused BitNet kernels on rows of K values, norm weights bfloat16 as in the models. `tokens` as above."""
    kernels, weight = TritonActivations(), _empty(k, dtype=torch.bfloat16)
    for m, algorithm in product(token_counts() if tokens is None else tokens, kernels.norm_algorithms(k)):
        x = _empty(m, 2 * k if before == "gate" else k, dtype=torch.bfloat16)
        residual = _empty(m, k, dtype=torch.bfloat16) if before == "add" else None
        codes = _empty(m, k if sparsity is None else sparsity.lifted_k(k), dtype=dtype.torch)
        scale = _empty(m, 1, dtype=torch.float32)
        kernels.encoder(before, dtype, sparsity, k, algorithm)(x, residual, weight, EPS, codes, scale)


def dequantise(
    acc: torch.dtype, n: int, biases: Iterable[torch.dtype | None], tokens: Iterable[int] | None = None
) -> None:
    """Dequantise sums of type `acc` [M, N], with a bias of each type or none (None). `tokens` as above."""
    kernels = TritonActivations()
    launches = kernels.algorithms("dequantise_bias", DType.INT8)
    for m, bias, algorithm in product(token_counts() if tokens is None else tokens, biases, launches):
        vector = None if bias is None else _empty(n, dtype=bias)
        scales = (_empty(m, 1, dtype=torch.float32), _empty(n, 1, dtype=torch.float32))
        kernels.dequantise_bias(_empty(m, n, dtype=acc), *scales, vector, torch.bfloat16, algorithm)


def rope(heads: int, kv_heads: int, head: int, tokens: Iterable[int] | None = None) -> None:
    """Rotary embedding and KV-cache write of an attention layer, pages as the engine's. `tokens` as above."""
    keys, values = _empty(2, 2, BLOCK, kv_heads, head, dtype=torch.bfloat16).unbind(1)
    angles = _empty(64, head, dtype=torch.bfloat16)
    for m in (1, triton_rope.FEW) if tokens is None else tokens:
        qkv = _empty(m, (heads + 2 * kv_heads) * head, dtype=torch.bfloat16)
        places = _empty(m, dtype=torch.int64)
        triton_rope.rope_and_cache(qkv, places, angles, heads, keys, values, places)


def reference(
    dtype: DType,
    patterns: Iterable[Sparsity | None],
    rows: Iterable[int],
    columns: Iterable[int],
    tokens: Iterable[int] | None = None,
) -> None:
    """The reference's pipeline around its GEMM, which writes bfloat16, and which always has a bias. `tokens` as
    above."""
    for m in token_counts() if tokens is None else tokens:
        for k, sparsity, first in product(columns, patterns, reference_pipeline.QUANTISE_LAUNCHES):
            reference_pipeline.quantise_slide(_empty(m, k, dtype=torch.bfloat16), dtype, sparsity, first)
        for n, last in product(rows, reference_pipeline.DEQUANTISE_LAUNCHES):
            acc, bias = _empty(m, n, dtype=torch.bfloat16), _empty(n, dtype=torch.bfloat16)
            scales = (_empty(m, 1, dtype=torch.float32), _empty(n, 1, dtype=torch.float32))
            reference_pipeline.dequantise_bias(acc, *scales, bias, last)


def _sizes(plan: Plan, model: Model) -> tuple[set[int], set[int]]:
    """Ns and Ks of the linears: whole, and of a rank where the engine splits them."""
    ranks = plan.profile.vllm.tensor_parallel_size
    shapes = model.linear_shapes()
    rows, columns = {n for n, _ in shapes.values()}, {k for _, k in shapes.values()}
    for layer, (n, k) in shapes.items():
        if layer in SPLIT_BY_RANKS:
            columns.add(k // ranks)
        else:
            rows.add(n // ranks)
    return rows, columns


def _biases(plan: Plan, model: Model) -> tuple[torch.dtype | None, ...]:
    """Without one; float32 as our layers keep it and tuning tries it; bfloat16 as the engine keeps that of a model."""
    bare = model.config["model_type"] == "bitnet" and not model.config.get("attention_bias")
    own = (torch.bfloat16,) if plan.profile.engine == "vllm" and not bare else ()
    return (None, torch.float32, *own)


def _empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")
