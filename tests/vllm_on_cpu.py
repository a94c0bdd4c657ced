"""vLLM's own model classes and loaders on a CPU: attention is torch's, our GPU backends are stood in for by CPU ones.

Everything else is the real package: configuration, registry, choice of kernels, weight loading, tensor parallelism.
Runs in a process of its own (`vllm_scenarios.py`), whose platform vLLM has taken for CUDA.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from gemm_doubles import CutlassDouble, Double, scaled_product
from small_runs import MACHINE
from torch import nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model, process_weights_after_loading
from vllm.utils.torch_utils import set_default_torch_dtype

from slidesparse.kernels import backend as backends
from slidesparse.kernels import cutlass, linear
from slidesparse.kernels.backend import Backend
from slidesparse.vllm_plugin import auto, linear_kernels, rope_attention

DOUBLES: dict[str, Backend] = {
    "cublaslt": Double("cublaslt", False), "cusparselt": Double("cusparselt", True), "cutlass": CutlassDouble()
}  # fmt: skip


def use_doubles() -> None:
    for module in (linear, linear_kernels, auto):
        module.backend = lambda name: DOUBLES.get(name) or backends.backend(name)  # type: ignore
    linear_kernels.detect = lambda: MACHINE  # type: ignore[assignment]
    cutlass._scaled_product = lambda: scaled_product  # type: ignore[assignment]


class CausalAttention(nn.Module):
    """All tokens are one sequence."""

    def __init__(self, heads: int, kv_heads: int, head: int) -> None:
        super().__init__()
        self.sizes = heads, kv_heads, head

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        heads, kv_heads, head = self.sizes
        q, k, v = (x.view(-1, n, head).transpose(0, 1) for x, n in ((q, heads), (k, kv_heads), (v, kv_heads)))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return y.transpose(0, 1).reshape(-1, heads * head)


def configure(folder: Path, additional: dict[str, Any] | None = None, **changes: Any) -> VllmConfig:
    """As `vllm serve FOLDER` would; operations in plain PyTorch."""
    return EngineArgs(
        model=str(folder), skip_tokenizer_init=True, enforce_eager=True, max_model_len=64,
        additional_config={} if additional is None else {"slidesparse": additional},
        compilation_config={"custom_ops": ["none"]}, **changes,
    ).create_engine_config()  # fmt: skip


@contextmanager
def building(config: VllmConfig) -> Iterator[None]:
    with set_current_vllm_config(config), set_default_torch_dtype(config.model_config.dtype):
        yield


def load(config: VllmConfig, weights: bool = True) -> Any:
    """The model that vLLM makes of a configuration, weights loaded and processed."""
    with building(config):
        model = initialize_model(config)
        if weights:
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        process_weights_after_loading(model, config.model_config, torch.device("cpu"))
    for module in model.modules():
        if hasattr(module, "self_attn"):
            a = module.self_attn
            a.attn = CausalAttention(a.num_heads, a.num_kv_heads, a.head_dim)
            a.one_pass = False  # there is no cache
    return model


@torch.inference_mode()
def logits(config: VllmConfig, model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """tokens int64 [P] -> float32 [P, vocabulary]."""
    with building(config):
        hidden = model(tokens, torch.arange(tokens.numel()))
        out: torch.Tensor = model.compute_logits(hidden)
    return out.float()


def compiled(config: VllmConfig, model: Any, prompts: list[torch.Tensor]) -> dict[str, Any]:
    """A decoder as one graph, M symbolic, on several prompts: same values as without; operators of ours per graph."""
    calls = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        names = Counter(str(node.target) for node in graph.graph.nodes if str(node.target).startswith("slidesparse."))
        calls.append({name.split(".")[1]: count for name, count in names.items()})
        return graph.forward

    whole = torch.compile(lambda ids, positions: model(ids, positions, None), fullgraph=True, backend=count)
    same = []
    for ids in prompts:
        positions = torch.arange(ids.numel())
        with building(config), torch.inference_mode():
            expected = model(ids, positions, None)
            torch._dynamo.mark_dynamic(ids, 0)
            torch._dynamo.mark_dynamic(positions, 0)
            same.append(torch.equal(whole(ids, positions), expected))
    return {"same": same, "operators of each graph": calls}


def cuts(config: VllmConfig, model: Any) -> list[list[str]]:
    """How vLLM cuts a decoder's graph whose rotary embedding and cache write are ours: the operators of each part."""
    from vllm.compilation.backends import split_graph

    for number, layer in enumerate(model.layers):
        a = layer.self_attn
        a.one_pass = True
        vars(a.attn).update(num_heads=a.num_heads, head_size=a.head_dim, layer_name=f"layer {number}")
    parts = []

    def cut(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for part in split_graph(graph, config.compilation_config.splitting_ops)[1]:
            nodes = [str(node.target) for node in part.graph.graph.nodes if node.op == "call_function"]
            parts.append([name.split(".")[1] for name in nodes if name.startswith("slidesparse.")])
        raise _Seen

    config.compilation_config.splitting_ops = ["vllm::unified_attention_with_output"]
    rope_attention.split_at_attention(config)
    rope_attention.split_at_attention(config)
    tokens = torch.arange(7)
    torch._dynamo.mark_dynamic(tokens, 0)
    with building(config), torch.inference_mode(), pytest.raises(Exception, match="_Seen"):
        torch.compile(lambda ids, positions: model(ids, positions, None), fullgraph=True, backend=cut)(tokens, tokens)
    return parts


class _Seen(Exception):
    pass


def start(folder: Path, rank: int, ranks: int) -> None:
    """What a worker of vLLM does before it loads a model; and our GPU backends get their doubles."""
    use_doubles()
    config = configure(folder / "checkpoints" / "Tiny-INT8", None, tensor_parallel_size=ranks)
    with building(config):
        init_distributed_environment(ranks, rank, f"file://{folder / f'meeting-{ranks}'}", rank, backend="gloo")
        initialize_model_parallel(ranks)
