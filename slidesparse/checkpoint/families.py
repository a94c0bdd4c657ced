"""The model families that we know: which tensors a checkpoint of each must hold, and their shapes.

Names and shapes are those of the `transformers` implementations. Synthetic models are made from this table
and opened checkpoints are checked against it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slidesparse.errors import CheckpointError

LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
"""Linear layers of a decoder block, the ones that are quantised and pruned. lm_head never is."""

Shape = tuple[int, ...]
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Family:
    """One `model_type` of `config.json`."""

    architecture: str
    qkv_bias: bool = False
    sub_norms: bool = False
    """BitNet's RMSNorm before o_proj and before down_proj."""


FAMILIES: Mapping[str, Family] = {
    "bitnet": Family("BitNetForCausalLM", sub_norms=True),
    "llama": Family("LlamaForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
}


def family(config: Mapping[str, Any], where: str) -> Family:
    """The family of a config. Raises CheckpointError naming `where` and the known types."""
    name = config.get("model_type")
    if name not in FAMILIES:
        raise CheckpointError(f"{where}: unknown model_type {name!r}; supported: {', '.join(FAMILIES)}")
    return FAMILIES[str(name)]


def layer_of(tensor: str) -> int | None:
    """Decoder layer that a tensor belongs to; None for embeddings, final norm and lm_head."""
    match = _LAYER.match(tensor)
    return int(match[1]) if match else None


def layer_prefix(layer: int) -> str:
    return f"model.layers.{layer}."


def layer_tensors(config: Mapping[str, Any], layer: int, where: str = "config") -> dict[str, Shape]:
    """Name and shape of every parameter of one decoder layer, before quantisation. Linear weights are [N, K].

    Raises CheckpointError when the config lacks a size.
    """
    kind = family(config, where)
    try:
        hidden, inner = int(config["hidden_size"]), int(config["intermediate_size"])
        heads = int(config["num_attention_heads"])
    except KeyError as error:
        raise CheckpointError(f"{where}: key {error} is missing") from None
    kv_heads = int(config.get("num_key_value_heads") or heads)
    head = int(config.get("head_dim") or hidden // heads)
    q, kv = heads * head, kv_heads * head
    attention = ((q, hidden), (kv, hidden), (kv, hidden), (hidden, q))
    weights = dict(zip(LINEARS, (*attention, (inner, hidden), (inner, hidden), (hidden, inner)), strict=True))
    attention_bias = bool(config.get("attention_bias"))
    biased = set(LINEARS[:3]) if kind.qkv_bias or attention_bias else set()
    biased |= {LINEARS[3]} if attention_bias and not kind.qkv_bias else set()
    biased |= set(LINEARS[4:]) if config.get("mlp_bias") else set()
    prefix = layer_prefix(layer)
    out: dict[str, Shape] = {}
    for linear, shape in weights.items():
        out[f"{prefix}{linear}.weight"] = shape
        if linear in biased:
            out[f"{prefix}{linear}.bias"] = (shape[0],)
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    if kind.sub_norms:
        norms |= {"self_attn.attn_sub_norm": hidden, "mlp.ffn_sub_norm": inner}
    return out | {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}


def rest_tensors(config: Mapping[str, Any]) -> dict[str, Shape]:
    """Name and shape of every parameter outside the decoder layers."""
    hidden, vocabulary = int(config["hidden_size"]), int(config["vocab_size"])
    out: dict[str, Shape] = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = (vocabulary, hidden)
    return out


def linear_names(config: Mapping[str, Any]) -> list[str]:
    """Module names of all quantised linear layers, in layer order: `model.layers.0.self_attn.q_proj`, ..."""
    return [layer_prefix(layer) + name for layer in range(int(config["num_hidden_layers"])) for name in LINEARS]
