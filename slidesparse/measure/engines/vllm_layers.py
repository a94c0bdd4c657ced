"""The linears of a decoder layer in vLLM, as a step of M tokens runs them, against the reference.

Where the model fuses a norm (an addition, a gate) with a linear, that operator is checked: the codes that the fused
kernel writes, then the product of those codes. Elsewhere the linear is checked by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.kernels import verify
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.linear import Recipe
from slidesparse.kernels.verify import Check
from slidesparse.kernels.verify_normed import ExpectedNormed
from slidesparse.measure.engines.model import plain_codes
from slidesparse.measure.engines.stock_check import check_stock
from slidesparse.pattern import Sparsity
from slidesparse.plan import STOCK, Variant
from slidesparse.tuning.store import TuningStore
from slidesparse.vllm_plugin import fused, linear_op
from slidesparse.vllm_plugin.buckets import bucket

CHECKED_ROWS = 8
"""Tokens of a step whose layer outputs are compared with the reference, spread over the step."""
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM runs as one."""
NORMS = {
    "self_attn.qkv_proj": "input_layernorm",
    "self_attn.o_proj": "self_attn.attn_sub_norm",
    "mlp.gate_up_proj": "post_attention_layernorm",
    "mlp.down_proj": "mlp.ffn_sub_norm",
}
"""The norm before each linear of BitNet."""
FIRST_LAYER = "model.layers.0"


@torch.inference_mode()
def check_linears(worker: Any, folder: Path, variant: Variant, m: int) -> list[Check]:
    """Every linear of the first decoder layer on M random tokens: CHECKED_ROWS of them against the reference.

    INT8 equals the integer reference bit for bit where the epilogue has its order of operations; FP8 is within the
    bound of its accumulation. Stock kernels: `stock_check`. Fused norms: `verify_normed`.
    """
    checkpoint, model = Checkpoint.open(folder), worker.get_model()
    found = []
    for name, layer in _linears(model):
        with _uncounted():
            before = None if variant.backend == STOCK else getattr(layer, fused.BEFORE, None)
            if before is None:
                check = _check_linear(checkpoint, name, layer, variant, m, worker.device)
            else:
                check = _check_fused(checkpoint, name, layer, _norm_of(model, name), before, m, worker.device)
        found.append(Check(check.verified, check.text if check.ok else f"{name}: {check.text}"))
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()  # other engines share this GPU
    return found


def merged(checkpoint: Checkpoint, name: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unlifted codes [N, K] and scales float32 [N, 1] of a linear of vLLM's, from the checkpoint's own layers."""
    parent, _, own = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in MERGED.get(own, (own,))]
    codes = torch.cat([plain_codes(checkpoint, part, k).view(torch.int8) for part in parts])
    assert checkpoint.dtype is not None
    scale = torch.cat([checkpoint.load(f"{part}.weight_scale") for part in parts])
    return codes.view(checkpoint.dtype.torch), scale


def unlifted(codes: torch.Tensor, sparsity: Sparsity | None, k: int) -> torch.Tensor:
    """Activation codes [M, K'] -> [M, K]: of each column the last of its copies, which are equal."""
    if sparsity is None:
        return codes
    columns = torch.from_numpy(sparsity.column_map(k)).long()
    place = torch.empty(k, dtype=torch.int64)
    used = columns >= 0
    place[columns[used]] = torch.arange(len(columns))[used]
    return codes.view(torch.uint8)[:, place.to(codes.device)].view(codes.dtype)


# -- inside --------------------------------------------------------------------------------------------------


def _linears(model: Any) -> Iterator[tuple[str, Any]]:
    """Of the first decoder layer, by name."""
    from vllm.model_executor.layers.linear import LinearBase

    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and name.startswith(f"{FIRST_LAYER}."):
            yield name, module


def _norm_of(model: Any, name: str) -> Any:
    return model.get_submodule(f"{FIRST_LAYER}.{NORMS[name.removeprefix(f'{FIRST_LAYER}.')]}")


@contextmanager
def _uncounted() -> Iterator[None]:
    """What runs and is looked up inside the block is no part of the path that a step takes."""
    kinds = linear_op.kinds()
    calls = [kind.calls.copy() for kind in kinds]
    stores = {id(kind.recipe.store): kind.recipe.store for kind in kinds if isinstance(kind.recipe.store, TuningStore)}
    counts = {key: store.counts.copy() for key, store in stores.items()}
    try:
        yield
    finally:
        for kind, counted in zip(kinds, calls, strict=True):
            kind.calls = counted
        for key, store in stores.items():
            store.counts = counts[key]


def _tokens(m: int, k: int, device: torch.device, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(m + seed)
    return torch.randn(m, k, generator=generator, dtype=torch.bfloat16, device=device)


def _rows(m: int, device: torch.device) -> torch.Tensor:
    return torch.linspace(0, m - 1, min(CHECKED_ROWS, m)).long().to(device)


def _check_linear(
    checkpoint: Checkpoint, name: str, layer: Any, variant: Variant, m: int, device: torch.device
) -> Check:
    """Quantise, product and epilogue of a linear by itself, without its bias."""
    k, dtype = int(layer.input_size), checkpoint.dtype
    assert dtype is not None
    x = _tokens(m, k, device)
    with verify.poisoned_memory():
        y = layer.quant_method.apply(layer, x, None)
    rows = _rows(m, device)
    codes, scale = (part.to(device) for part in merged(checkpoint, name, k))
    if variant.backend == STOCK:
        return check_stock(x[rows], y[rows], codes, scale, dtype)
    recipe = linear_op.recipe_at(getattr(layer, fused.KIND), m)
    return verify.check_linear(x[rows], y[rows], codes, scale, None, dtype, *_bounds(recipe))


def _check_fused(
    checkpoint: Checkpoint, name: str, layer: Any, norm: Any, before: BitNetOperation, m: int, device: torch.device
) -> Check:
    """The codes that a fused kernel writes, and the product of those codes as the operator gives it."""
    k, dtype = int(layer.input_size), checkpoint.dtype
    assert dtype is not None
    x = _tokens(m, 2 * k if before == "gate" else k, device)
    residual = _tokens(m, k, device, seed=1) if before == "add" else None
    with verify.poisoned_memory():
        if residual is not None:
            y, total = fused.add_norm_linear(norm, x, residual, layer)
        else:
            y, total = (fused.gate_norm_linear if before == "gate" else fused.norm_linear)(norm, x, layer), None
    recipe = linear_op.recipe_at(getattr(layer, fused.KIND), m, before)
    sparsity = recipe.variant.sparsity
    encode = recipe.encoder(recipe.choices(bucket(m), False, before)[0])
    operand = torch.empty(m, recipe.operand_k, dtype=dtype.torch, device=device)
    token = torch.empty(m, 1, dtype=torch.float32, device=device)
    encode(x, residual, norm.weight, norm.variance_epsilon, operand, token)
    rows = _rows(m, device)
    own = None if residual is None else residual[rows]
    expected = ExpectedNormed(before, x[rows], own, norm.weight, norm.variance_epsilon, dtype, sparsity)
    written = expected.check(operand[rows], token[rows], None if total is None else total[rows])
    codes, scale = (part.to(device) for part in merged(checkpoint, name, k))
    given = unlifted(operand[rows], sparsity, k), token[rows]
    product = verify.check_product(given, y[rows], codes, scale, None, dtype, *_bounds(recipe))
    both = f"fused norm: {written.text}; product: {product.text}"
    return Check(verify.worst((written, product)).verified, both)


def _bounds(recipe: Recipe) -> tuple[float, float, bool, float]:
    """Of `verify.check_product`: accumulation, rounding of the accumulator, order of the epilogue, norm."""
    side, dtype = recipe.backend, recipe.dtype
    error, _ = side.accumulation_error(dtype, recipe.operand_k)
    between = verify.OUTPUT_UNIT.get(side.output(dtype), 0.0)
    return error, between, side.exact_epilogue, side.norm_error(dtype)
