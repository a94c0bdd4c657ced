"""All of an attention layer between its linears as one operator: rotary embedding, KV-cache write, attention.

    slidesparse::rope_attention(qkv, positions, cos_sin, out!, layer)

vLLM rotates q and k in compiled code, copies k and v into the cache by a kernel of its own and calls attention. Here
one kernel rotates and writes (`kernels/triton_rope`), and vLLM's attention follows. As vLLM's own operators do it finds
the cache, and the slots of this step's tokens in it, through the forward context: so vLLM must call it between its
piecewise graphs, not inside one (`split_at_attention`); FULL graphs hold it like everything else.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import get_attention_context, unified_attention_with_output
from vllm.model_executor.layers.rotary_embedding.base import RotaryEmbedding
from vllm.utils.torch_utils import direct_register_custom_op
from vllm.v1.attention.backend import AttentionType

from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.triton_rope import HEAD_WIDTHS, RopeAndCache

NAME = "rope_attention"
BACKENDS = ("FLASH_ATTN",)
"""Attention that reads nothing but the cache, in pages [pages, 2, P, kv_heads, D]."""
KERNEL = "slidesparse_rope_and_cache"
"""Name under which an attention layer keeps its kernel; made anew when its cache is another."""


def runs_on(attention: Any, rotary: Any, config: VllmConfig) -> bool:
    """Whether the kernel does what vLLM would do for this layer; else vLLM's own operators run, and the path says so.

    Args:
        attention: vLLM's `Attention`.
        rotary: what rotates its q and k.
    """
    return (
        attention.attn_backend.get_name() in BACKENDS
        and attention.attn_type == AttentionType.DECODER
        and attention.kv_cache_torch_dtype == torch.bfloat16
        and attention.kv_sharing_target_layer_name is None
        and attention.query_quant is None
        and not attention.calculate_kv_scales
        and config.parallel_config.decode_context_parallel_size == 1
        and type(rotary) is RotaryEmbedding
        and rotary.is_neox_style
        and rotary.rotary_dim == rotary.head_size == attention.head_size
        and rotary.head_size in HEAD_WIDTHS
        and rotary.cos_sin_cache.dtype == torch.bfloat16
    )


def split_at_attention(config: VllmConfig) -> None:
    """Have vLLM cut its graphs at this operator as it does at its own attention, where it cuts them at all."""
    operators, name = config.compilation_config.splitting_ops, f"{NAMESPACE}::{NAME}"
    if operators and name not in operators:
        operators.append(name)


def rope_attention(qkv: torch.Tensor, positions: torch.Tensor, attention: Any, rotary: Any) -> torch.Tensor:
    """qkv bfloat16 [M, (heads + 2 kv_heads) D], positions int64 [M] -> attended bfloat16 [M, heads D]."""
    out = torch.empty(qkv.shape[0], attention.num_heads * attention.head_size, dtype=qkv.dtype, device=qkv.device)
    torch.ops.slidesparse.rope_attention.default(qkv, positions, rotary.cos_sin_cache, out, attention.layer_name)
    return out


def _run(qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    _, attention, pages, slots = get_attention_context(layer)
    heads, kv_heads, head = attention.num_heads, attention.num_kv_heads, attention.head_size
    whole = qkv.view(-1, heads + 2 * kv_heads, head)
    q, k, v = whole.split([heads, kv_heads, kv_heads], dim=1)
    if slots is not None:  # else vLLM tries a step out before it has a cache
        kernel = attention.__dict__.get(KERNEL)
        if kernel is None or kernel.pages != pages.data_ptr():
            kernel = RopeAndCache(heads, cos_sin, *_keys_and_values(pages))
            setattr(attention, KERNEL, kernel)
        q = kernel(qkv, positions, slots)
    # Of k and v this attention reads what the cache holds, not what it is given.
    unified_attention_with_output(q, k, v, out.view(-1, heads, head), layer)


def _keys_and_values(pages: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """[pages, 2, P, kv_heads, D] -> both halves, [pages, P, kv_heads, D]."""
    return pages.unbind(1)


def _fake(qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, out: torch.Tensor, layer: str) -> None:
    return


_library = torch.library.Library(NAMESPACE, "FRAGMENT")
"""The operator lives as long as this. Not `torch.library.custom_op`: vLLM calls it outside graphs, layer by layer."""
direct_register_custom_op(
    NAME, eager_break_during_capture(_run), mutates_args=["out"], fake_impl=_fake, target_lib=_library
)
