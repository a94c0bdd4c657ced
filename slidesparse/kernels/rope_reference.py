"""Rotary embedding and KV-cache write of an attention layer, in plain PyTorch: the oracle of `triton_rope`.

Of every head of q and k, whose halves are a and b, at a token's position, products and sums in float32:

    a' = bf16(a * cos - b * sin)        b' = bf16(b * cos + a * sin)

v stays as it is. A token's k' and v go to its slot in the paged cache: page slot // P, place slot % P; a slot below 0
is padding. As vLLM's `RotaryEmbedding.forward_native` once Inductor has fused it, which rounds the result alone.
"""

from __future__ import annotations

import torch


def rotate(
    qkv: torch.Tensor, positions: torch.Tensor, cos_sin: torch.Tensor, heads: int, kv_heads: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """bfloat16 [M, (heads + 2 kv_heads) D], positions int64 [M], cos and sin [positions, D] -> q, k, v [M, ., D]."""
    width = cos_sin.shape[1]
    whole = qkv.view(qkv.shape[0], -1, width)
    cos, sin = cos_sin[positions].float().unsqueeze(1).chunk(2, dim=-1)
    a, b = whole[:, : heads + kv_heads].float().chunk(2, dim=-1)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(qkv.dtype)
    return turned[:, :heads], turned[:, heads:], whole[:, heads + kv_heads :]


def rope_and_cache(
    qkv: torch.Tensor,
    positions: torch.Tensor,
    cos_sin: torch.Tensor,
    heads: int,
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
) -> torch.Tensor:
    """As `triton_rope.rope_and_cache`; pages of any strides."""
    q, k, v = rotate(qkv, positions, cos_sin, heads, keys.shape[2])
    used = slots >= 0
    page, place = slots[used] // keys.shape[1], slots[used] % keys.shape[1]
    keys[page, place] = k[: len(slots)][used]
    values[page, place] = v[: len(slots)][used]
    return q.contiguous()


def floor_bytes(m: int, heads: int, kv_heads: int, head: int) -> int:
    """Bytes that one pass must move: bfloat16 q, k, v read and written once, a token's position, slot and angles."""
    return m * (2 * 2 * (heads + 2 * kv_heads) * head + 2 * head + 16)
