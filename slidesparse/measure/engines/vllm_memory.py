"""What a vLLM engine needs on a GPU: the KV cache, exactly; the rest, estimated from above."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slidesparse.measure.engines.base import Limits
from slidesparse.vllm_plugin.shards import kv_heads_of_rank

BLOCK = 16
"""Tokens of a KV cache block."""
SPARE_BLOCKS = 64
"""For the block that vLLM keeps for itself and for small prompts beside the timed ones."""
BFLOAT16, FLOAT32 = 2, 4
CHECK_SEQUENCES, CHECK_POSITIONS = 16, 64
"""Room for prompts that are only checked, whatever the timed ones are."""
LIFTED_LOAD = 1.7
"""Peak of a load over the bytes on disk: a sparse backend holds a weight dense and packed for a while."""
CONTEXT = 1536 << 20
"""CUDA context, libraries and their workspaces, NCCL, and what torch's allocator cannot hand out again."""
SHARE_OF_FREE = 0.97
"""Of the free memory, what engines may be planned into."""


@dataclass(frozen=True)
class Widths:
    """Sizes of a model's config.json."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Widths:
        heads = int(config["num_attention_heads"])
        return cls(
            layers=int(config["num_hidden_layers"]),
            hidden=int(config["hidden_size"]),
            intermediate=int(config["intermediate_size"]),
            heads=heads,
            kv_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or config["hidden_size"] // heads),
            vocabulary=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", False)),
        )

    def kv_heads_of_rank(self, ranks: int) -> int:
        """As `shards.kv_heads_of_rank`."""
        return kv_heads_of_rank(self.heads, self.kv_heads, ranks)


def sizes(limits: Limits) -> list[int]:
    """Tokens of every step that a timed cell makes: those that are measured, and the prompts of decode batches."""
    return sorted({*limits.sizes, *(s * limits.decode_prompt for s in limits.decode)})


def step_tokens(limits: Limits) -> int:
    """Tokens that one step must be able to hold."""
    return max(limits.step_tokens, CHECK_SEQUENCES * CHECK_POSITIONS)


def sequences(limits: Limits) -> int:
    """Of two prefill steps, since the next one is prepared while one runs, or of one decode batch."""
    return max([CHECK_SEQUENCES, *(2 * s for s, _ in limits.prefill), *limits.decode])


def positions(limits: Limits) -> int:
    return max(limits.positions, CHECK_POSITIONS)


def blocks(limits: Limits) -> int:
    """KV cache blocks of the largest batch, or of two prefill steps: every sequence fills its own."""
    decode = -(-(limits.decode_prompt + limits.decode_output) // BLOCK)
    most = [s * decode for s in limits.decode] + [2 * s * -(-(p + 1) // BLOCK) for s, p in limits.prefill]
    return max([*most, -(-positions(limits) // BLOCK)]) + SPARE_BLOCKS


def cache_bytes(widths: Widths, limits: Limits) -> int:
    """Of one rank: keys and values in bfloat16."""
    kv_heads = widths.kv_heads_of_rank(limits.tensor_parallel)
    return blocks(limits) * BLOCK * widths.layers * 2 * kv_heads * widths.head_dim * BFLOAT16


def engine_bytes(widths: Widths, limits: Limits, weights: int, sparse: bool) -> int:
    """One rank of an engine that waits for its turn: weights, cache, and what its CUDA graphs keep.

    The logits are bfloat16, float32 and the sampler's copy. While weights are loaded there is no cache yet.

    Args:
        weights: bytes of the checkpoint's files.
        sparse: weights are lifted and packed at load.
    """
    logits = sequences(limits) * widths.vocabulary * (BFLOAT16 + 2 * FLOAT32)
    own = weights // limits.tensor_parallel
    loading = int(own * (LIFTED_LOAD if sparse else 1))
    return CONTEXT + max(loading, own + cache_bytes(widths, limits) + step_bytes(widths, limits) + logits)


def turn_bytes(widths: Widths, limits: Limits) -> int:
    """What only the engine whose turn it is needs: a step outside graphs, or the float32 reference of its logits."""
    reference = widths.vocabulary * widths.hidden * FLOAT32 * (1 if widths.tied else 2)
    return max(step_bytes(widths, limits), reference)


def step_bytes(widths: Widths, limits: Limits) -> int:
    """Activations of the largest step on one rank.

    A layer's widest moment is its largest linear: 8-bit input, 32-bit accumulator and 16-bit output, beside the
    residual stream.
    """
    ranks = limits.tensor_parallel
    qkv = (widths.heads // ranks + 2 * widths.kv_heads_of_rank(ranks)) * widths.head_dim
    widest = max(2 * widths.intermediate // ranks, qkv, widths.hidden // ranks)
    token = widest * (FLOAT32 + BFLOAT16) + 2 * widths.intermediate // ranks + 3 * widths.hidden * BFLOAT16
    return step_tokens(limits) * token


def weight_bytes(folder: Path) -> int:
    """Of a checkpoint's files."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def fit(needs: list[int], turn: int, free: int) -> int:
    """How many engines of these needs, whichever they are, fit into `free` bytes beside one `turn`; at least 1."""
    return max(1, (int(free * SHARE_OF_FREE) - turn) // max(needs))
