"""A norm and the linear behind it as one operator: vLLM's layers in, `linear_op`'s fused operators out.

For linears whose weights are one of our kernels', unsharded along K: under tensor parallelism the mean of squares of a
sub-norm needs all ranks between norm and quantise, so there norm and linear stay apart (`bitnet.py`).
"""

from __future__ import annotations

from typing import Any

import torch

from slidesparse.vllm_plugin import linear_op  # noqa: F401  registers the operators

KIND = "slidesparse_kind"
"""Attribute of a linear layer of vLLM: see `linear_op`."""
BEFORE = "slidesparse_before"
"""The same: what the model fuses with it; backend `auto` measures the two together."""


def norm_linear(norm: Any, x: torch.Tensor, linear: Any) -> torch.Tensor:
    """linear(norm(x)): bfloat16 [M, K] -> [M, N].

    Args:
        norm: vLLM's RMSNorm.
        linear: a linear of vLLM that our kernels have prepared; its bias is added.
    """
    y: torch.Tensor = torch.ops.slidesparse.norm_linear.default(x, *_operands(norm, linear))
    return y


def add_norm_linear(
    norm: Any, x: torch.Tensor, residual: torch.Tensor, linear: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """linear(norm(x + residual)), and x + residual."""
    y, total = torch.ops.slidesparse.add_norm_linear.default(x, residual, *_operands(norm, linear))
    return y, total


def gate_norm_linear(norm: Any, gate_up: torch.Tensor, linear: Any) -> torch.Tensor:
    """linear(norm(max(gate, 0)**2 * up)): bfloat16 [M, 2 K] -> [M, N]."""
    y: torch.Tensor = torch.ops.slidesparse.gate_norm_linear.default(gate_up, *_operands(norm, linear))
    return y


def _operands(norm: Any, linear: Any) -> tuple[Any, ...]:
    return norm.weight, norm.variance_epsilon, linear.weight, linear.weight_scale, linear.bias, getattr(linear, KIND)
