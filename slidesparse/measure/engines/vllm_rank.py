"""What a session asks of vLLM's workers: functions of a worker, sent by `collective_rpc`, one process a rank.

What they keep between calls lies on the model runner, under names of ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.kernels import verify
from slidesparse.kernels.linear import Recipe
from slidesparse.kernels.verify import Check
from slidesparse.measure.engines.model import plain_codes
from slidesparse.measure.engines.stock_check import check_stock
from slidesparse.plan import Variant
from slidesparse.tuning.store import TuningStore
from slidesparse.vllm_plugin import linear_op, model_paths
from slidesparse.vllm_plugin.fused import KIND
from slidesparse.vllm_plugin.settings import STOCK

CHECKED_ROWS = 8
"""Tokens of a step whose layer outputs are compared with the reference, spread over the step."""
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""Linears that vLLM runs as one."""
GRAPHS, KEPT = "slidesparse_graphs", "slidesparse_logits"


# -- graphs ------------------------------------------------------------------------------------------------


def watch_graphs(worker: Any) -> None:
    """From now on, keep which CUDA graph each step runs in."""
    runner = worker.model_runner
    dispatcher, seen = runner.cudagraph_dispatcher, {}
    genuine = dispatcher.dispatch

    def dispatch(num_tokens: int, *arguments: Any, **keywords: Any) -> Any:
        mode, batch = genuine(num_tokens, *arguments, **keywords)
        padded = "" if batch.num_tokens == num_tokens else f", padded to {batch.num_tokens}"
        seen[num_tokens] = f"{mode.name} CUDA graph{padded}" if mode.name != "NONE" else "no CUDA graph"
        return mode, batch

    dispatcher.dispatch = dispatch
    setattr(runner, GRAPHS, seen)


def forget_graphs(worker: Any) -> None:
    getattr(worker.model_runner, GRAPHS).clear()


# -- logits ------------------------------------------------------------------------------------------------


def keep_logits(worker: Any) -> None:
    """From now on, keep the logits of every step, with the requests that their rows belong to."""
    runner, model = worker.model_runner, worker.get_model()
    genuine = model.compute_logits
    kept: list[tuple[list[str], torch.Tensor]] = []

    def compute_logits(*arguments: Any, **keywords: Any) -> torch.Tensor | None:
        logits: torch.Tensor | None = genuine(*arguments, **keywords)
        if logits is not None:  # with several ranks, only the first may hold them
            kept.append((list(runner.input_batch.req_ids), logits.float().cpu()))
        return logits

    model.compute_logits = compute_logits
    setattr(runner, KEPT, kept)


def take_logits(worker: Any) -> list[tuple[list[str], torch.Tensor]]:
    """What was kept, of the first rank; nothing is kept any more."""
    runner = worker.model_runner
    del worker.get_model().compute_logits  # the method of the class is what stood there before
    kept: list[tuple[list[str], torch.Tensor]] = runner.__dict__.pop(KEPT)
    return kept if worker.rank == 0 else []


# -- linears ------------------------------------------------------------------------------------------------


@torch.inference_mode()
def check_linears(worker: Any, folder: Path, variant: Variant, m: int) -> list[Check]:
    """Every linear of the first decoder layer on M random tokens: CHECKED_ROWS of them against the reference.

    INT8 equals the integer reference bit for bit where the epilogue has its order of operations; FP8 is within the
    bound of its accumulation. Stock kernels: `stock_check`.
    """
    checkpoint = Checkpoint.open(folder)
    found = []
    for name, layer in _linears_of_first_layer(worker.get_model()):
        x = _random_tokens(m, int(layer.input_size), worker.device)
        with verify.poisoned_memory(), _uncounted():
            y = layer.quant_method.apply(layer, x, None)
        rows = torch.linspace(0, m - 1, min(CHECKED_ROWS, m)).long().to(x.device)
        recipe = None if variant.backend == STOCK else linear_op.recipe_at(getattr(layer, KIND), m)
        check = _check(checkpoint, name, recipe, x[rows], y[rows])
        found.append(Check(check.verified, check.text if check.ok else f"{name}: {check.text}"))
        del x, y
    if worker.device.type == "cuda":
        torch.cuda.empty_cache()  # other engines share this GPU
    return found


def _linears_of_first_layer(model: Any) -> Iterator[tuple[str, Any]]:
    from vllm.model_executor.layers.linear import LinearBase

    for name, module in model.named_modules():
        if isinstance(module, LinearBase) and ".layers.0." in name:
            yield name, module


@contextmanager
def _uncounted() -> Iterator[None]:
    """Calls of our operators inside the block are no part of the path that a step takes."""
    calls = {kind: kind.calls.copy() for kind in linear_op._KINDS.values()}
    try:
        yield
    finally:
        for kind, counted in calls.items():
            kind.calls = counted


def _random_tokens(m: int, k: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator(device).manual_seed(m)
    return torch.randn(m, k, generator=generator, dtype=torch.bfloat16, device=device)


def _check(checkpoint: Checkpoint, name: str, recipe: Recipe | None, x: torch.Tensor, y: torch.Tensor) -> Check:
    """x [R, K] -> y [R, N], without bias, against the checkpoint's own codes and scales. No recipe: stock kernels."""
    dtype, k = checkpoint.dtype, x.shape[1]
    assert dtype is not None
    codes, scale = (part.to(x.device) for part in merged(checkpoint, name, k))
    if recipe is None:
        return check_stock(x, y, codes, scale, dtype)
    side = recipe.backend
    error, _ = side.accumulation_error(dtype, recipe.operand_k)
    between = verify.OUTPUT_UNIT.get(side.output(dtype), 0.0)
    return verify.check_linear(x, y, codes, scale, None, dtype, error, between, side.exact_epilogue)


def merged(checkpoint: Checkpoint, name: str, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Unlifted codes [N, K] and scales float32 [N, 1] of a linear of vLLM's, from the checkpoint's own layers."""
    parent, _, own = name.rpartition(".")
    parts = [f"{parent}.{part}" for part in MERGED.get(own, (own,))]
    codes = torch.cat([plain_codes(checkpoint, part, k).view(torch.int8) for part in parts])
    assert checkpoint.dtype is not None
    scale = torch.cat([checkpoint.load(f"{part}.weight_scale") for part in parts])
    return codes.view(checkpoint.dtype.torch), scale


# -- what runs ------------------------------------------------------------------------------------------------


def what_runs(worker: Any) -> dict[str, Any]:
    """Model class, attention backends, linear kernels, graphs of the steps seen, paths of our linears."""
    runner, model = worker.model_runner, worker.get_model()
    kernels = {kernel.partition(" ")[0] for kernel in model_paths.linear_kernels(model).values()}
    return {
        "model": type(model).__name__,
        "attention": sorted({group.backend.get_name() for groups in runner.attn_groups for group in groups}),
        "kernels": sorted(kernels),
        "graphs": dict(getattr(runner, GRAPHS)),
        "paths": linear_op.paths(),
    }


def look_ups(worker: Any) -> str:
    """Summary of the tuning store that this rank's linears ask."""
    stores = {id(kind.recipe.store): kind.recipe.store for kind in linear_op._KINDS.values()}
    summaries = [store.summary() for store in stores.values() if isinstance(store, TuningStore)]
    return " | ".join(summaries) or "no store"


def memory(worker: Any) -> dict[str, int]:
    """Bytes that torch holds on this rank's GPU, now and at most; zeros without a GPU."""
    if worker.device.type != "cuda":
        return {"reserved": 0, "peak": 0}
    return {"reserved": torch.cuda.memory_reserved(), "peak": torch.cuda.max_memory_reserved()}
