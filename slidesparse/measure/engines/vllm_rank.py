"""What a session asks of vLLM's workers: functions of a worker, sent by `collective_rpc`, one process a rank.

What they keep between calls lies on the model runner, under names of ours.
"""

from __future__ import annotations

from typing import Any

import torch

from slidesparse.measure.engines.graph_timer import GraphTimer
from slidesparse.tuning.store import TuningStore
from slidesparse.vllm_plugin import linear_op, model_paths

GRAPHS, KEPT, TIMER = "slidesparse_graphs", "slidesparse_logits", "slidesparse_graph_timer"


# -- graphs ------------------------------------------------------------------------------------------------


def watch_graphs(worker: Any) -> None:
    """From now on, keep which CUDA graph each step runs in, and time those that are one graph."""
    runner = worker.model_runner
    dispatcher, seen, timer = runner.cudagraph_dispatcher, {}, GraphTimer()
    genuine = dispatcher.dispatch
    if worker.device.type == "cuda":
        timer.install()

    def dispatch(num_tokens: int, *arguments: Any, **keywords: Any) -> Any:
        mode, batch = genuine(num_tokens, *arguments, **keywords)
        padded = "" if batch.num_tokens == num_tokens else f", padded to {batch.num_tokens}"
        seen[num_tokens] = f"{mode.name} CUDA graph{padded}" if mode.name != "NONE" else "no CUDA graph"
        timer.on = mode.name == "FULL"
        return mode, batch

    dispatcher.dispatch = dispatch
    setattr(runner, GRAPHS, seen)
    setattr(runner, TIMER, timer)


def split_as_without_large_graphs(worker: Any) -> None:
    """Let attention of steps outside FULL graphs choose its splits, as where vLLM captures its default sizes.

    NOTE: FlashAttention 3 must not choose in a graph, so vLLM gives it room for 32 splits at every size up to the
    largest that is captured at all, though attention is no part of PIECEWISE graphs. With prompts of 32,768 tokens
    among the sizes, each prefill step was split (combine kernels: 1.3 of 85 ms at 16,384 tokens on an H200) and held
    7.5 GiB of partial results.
    """
    from vllm.config import CUDAGraphMode

    runner = worker.model_runner
    full = [batch.num_tokens for batch in runner.cudagraph_dispatcher.cudagraph_keys[CUDAGraphMode.FULL]]
    for group in (group for groups in runner.attn_groups for group in groups):
        for builder in group.metadata_builders:
            if hasattr(builder, "max_cudagraph_size"):  # of FlashAttention alone
                builder.max_cudagraph_size = max(full, default=0)


def forget_graphs(worker: Any) -> None:
    getattr(worker.model_runner, GRAPHS).clear()


def graph_seconds(worker: Any) -> list[float]:
    """GPU time of each step since the last call that was one graph, in their order."""
    timer: GraphTimer = getattr(worker.model_runner, TIMER)
    return timer.take()


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


# -- what runs ------------------------------------------------------------------------------------------------


def what_runs(worker: Any) -> dict[str, Any]:
    """Model class, attention backends and what runs before them, linear kernels, graphs of the steps seen, paths of our
    linears."""
    runner, model = worker.model_runner, worker.get_model()
    kernels = {kernel.partition(" ")[0] for kernel in model_paths.linear_kernels(model).values()}
    return {
        "model": type(model).__name__,
        "attention": sorted({group.backend.get_name() for groups in runner.attn_groups for group in groups}),
        "before attention": model_paths.before_attention(model),
        "kernels": sorted(kernels),
        "graphs": dict(getattr(runner, GRAPHS)),
        "paths": linear_op.paths(),
    }


def look_ups(worker: Any) -> str:
    """Summary of the tuning store that this rank's linears ask."""
    stores = {id(kind.recipe.store): kind.recipe.store for kind in linear_op.kinds()}
    summaries = [store.summary() for store in stores.values() if isinstance(store, TuningStore)]
    return " | ".join(summaries) or "no store"


def memory(worker: Any) -> dict[str, int]:
    """Bytes that torch holds on this rank's GPU, now and at most; zeros without a GPU."""
    if worker.device.type != "cuda":
        return {"reserved": 0, "peak": 0}
    return {"reserved": torch.cuda.memory_reserved(), "peak": torch.cuda.max_memory_reserved()}
