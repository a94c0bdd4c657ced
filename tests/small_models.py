"""In-memory checkpoints of tiny models, for tests of what reads checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slidesparse.dtypes import DType
from slidesparse.kernels import operands, reference
from slidesparse.pattern import Sparsity

BITNET = {
    "model_type": "bitnet", "hidden_size": 96, "intermediate_size": 176, "num_hidden_layers": 2,
    "num_attention_heads": 3, "num_key_value_heads": 1, "vocab_size": 128, "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5, "hidden_act": "relu2", "tie_word_embeddings": True, "rope_theta": 10000.0,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
LLAMA = BITNET | {"model_type": "llama", "hidden_act": "silu", "tie_word_embeddings": False}
QWEN2 = LLAMA | {"model_type": "qwen2"}


@dataclass(frozen=True)
class FakeSection:
    pattern: Sparsity
    layout: str


@dataclass
class FakeCheckpoint:
    """The part of `Checkpoint` that readers use."""

    config: dict[str, Any]
    tensors: dict[str, torch.Tensor]
    dtype: DType | None
    section: FakeSection | None = None
    loads: list[str] = field(default_factory=list)

    def names(self) -> Iterable[str]:
        return list(self.tensors)

    def load(self, name: str) -> torch.Tensor:
        self.loads.append(name)
        return self.tensors[name].clone()

    def fingerprint(self) -> str:
        return "fake"


def float_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A float32 transformers model with random weights, norms and biases away from their initial values."""
    keys = {key: value for key, value in config.items() if key != "model_type"}
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **keys), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def prune(weight: torch.Tensor, sparsity: Sparsity | None) -> torch.Tensor:
    """Zero the two smallest of every whole group of L (short last groups: down to L - 2 left)."""
    if sparsity is None or sparsity.l is None:
        return weight
    out = weight.clone()
    for first in range(0, weight.shape[1], sparsity.l):
        group = out[:, first : first + sparsity.l]
        surplus = group.shape[1] - (sparsity.l - 2)
        if surplus > 0:
            group.scatter_(1, group.abs().topk(surplus, dim=1, largest=False).indices, 0.0)
    return out


def checkpoint(
    config: dict[str, Any], dtype: DType, sparsity: Sparsity | None = None, layout: str = "plain", seed: int = 0
) -> FakeCheckpoint:
    """Quantise a random model: ternary with one scale a tensor for BitNet, absmax a channel otherwise."""
    model = float_model(config, seed)
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for name, module in model.model.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        weight = module.weight.detach()
        if config["model_type"] == "bitnet":
            mean = weight.abs().mean()
            codes, scale = (weight / mean).round().clamp(-1, 1), mean.expand(weight.shape[0], 1).contiguous()
            codes = (codes * prune(weight, sparsity).ne(0)).to(dtype.torch)
        else:
            codes, scale = reference.quantise(prune(weight, sparsity), dtype)
        if sparsity is not None and layout == "lifted":
            codes = operands.lift(codes, sparsity, name)
        tensors |= {f"model.{name}.weight": codes, f"model.{name}.weight_scale": scale.float()}
    section = None if sparsity is None else FakeSection(sparsity, layout)
    return FakeCheckpoint(config, tensors, dtype, section)
