"""How big a model is: parameters, bytes of its checkpoints, bytes of its KV cache. From its config alone."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from slidesparse.checkpoint.families import LINEARS, layer_tensors, rest_tensors
from slidesparse.config import Model
from slidesparse.pattern import Sparsity

BF16, FP32, CODE = 2, 4, 1
"""Bytes of one value: unquantised weights, scales, 8-bit codes."""


class Parameters(NamedTuple):
    """Weights of the linear layers that are quantised and pruned, and all other parameters."""

    linear: int
    other: int

    @property
    def total(self) -> int:
        return self.linear + self.other


@dataclass(frozen=True)
class CheckpointBytes:
    """Bytes on disk that one checkpoint of each kind adds. Headers, tokeniser and JSON (a few MB) are not counted."""

    base: int
    """The BF16 model."""
    prepared: int
    """One 8-bit type: codes, float32 scales of every output channel, all other parameters in BF16."""
    converted: int
    """One pattern of one 8-bit type: codes and scales; all other parameters are hard links to the prepared one."""


def parameter_count(model: Model) -> Parameters:
    """Parameters of a catalogue entry. A tied lm_head is not counted twice.

    Raises:
        CheckpointError: model_type is unknown, or the config lacks a size.
    """
    layer = layer_tensors(model.config, 0)
    linear = sum(math.prod(layer[f"model.layers.0.{name}.weight"]) for name in LINEARS)
    every = sum(math.prod(shape) for shape in layer.values())
    layers = int(model.config["num_hidden_layers"])
    rest = sum(math.prod(shape) for shape in rest_tensors(model.config).values())
    return Parameters(layers * linear, layers * (every - linear) + rest)


def checkpoint_bytes(model: Model, sparsity: Sparsity | None = None) -> CheckpointBytes:
    """Bytes of the three kinds of checkpoint; with a pattern, `converted` is that of the layout `lifted`.

    Raises:
        CheckpointError: as `parameter_count`.
    """
    count = parameter_count(model)
    shapes = [layer_tensors(model.config, 0)[f"model.layers.0.{name}.weight"] for name in LINEARS]
    layers = int(model.config["num_hidden_layers"])
    scales = layers * sum(n for n, _ in shapes) * FP32
    codes = layers * sum(n * (k if sparsity is None else sparsity.lifted_k(k)) for n, k in shapes) * CODE
    return CheckpointBytes(
        base=count.total * BF16,
        prepared=count.linear * CODE + scales + count.other * BF16,
        converted=codes + scales,
    )


def kv_cache_bytes(model: Model, tokens: int) -> int:
    """BF16 keys and values of `tokens` tokens: 2 * layers * kv_heads * head_dim * 2 bytes each."""
    (kv, _) = layer_tensors(model.config, 0)["model.layers.0.self_attn.k_proj.weight"]
    return 2 * int(model.config["num_hidden_layers"]) * kv * BF16 * tokens
