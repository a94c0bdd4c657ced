"""Operands for timing a GEMM: weights of the model itself, or random ones that keep to the pattern; activations."""

from __future__ import annotations

from pathlib import Path

import torch

from slidesparse.checkpoint.lift import lift_weight, unlift_weight
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

MERGED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear layers that an inference engine merges along N, by the names of `config.Model.linear_shapes`."""


def activation(m: int, k: int, seed: int) -> torch.Tensor:
    """bfloat16 [M, K], standard normal."""
    return torch.randn(m, k, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def random_weight(n: int, k: int, dtype: DType, sparsity: Sparsity | None, seed: int) -> torch.Tensor:
    """Unlifted codes [N, K] of `dtype.torch`: quantised normal values, Z random zeros in every group of L.

    A last group of fewer than L columns counts the missing ones as zeros.
    """
    generator = torch.Generator().manual_seed(seed)
    codes, _ = reference.quantise(torch.randn(n, k, generator=generator), dtype)
    if sparsity is None or sparsity.l is None:
        return codes
    groups = sparsity.groups(k)
    order = torch.rand(n, groups * sparsity.l, generator=generator)
    order[:, k:] = -1.0
    zeros = order.reshape(n, groups, sparsity.l).topk(Sparsity.z, dim=2, largest=False).indices
    keep = torch.ones(n, groups, sparsity.l, dtype=torch.uint8).scatter_(2, zeros, 0)
    return (codes.view(torch.uint8) * keep.reshape(n, -1)[:, :k]).view(dtype.torch)


def model_weight(folder: Path, layer: str, shape: tuple[int, int], sparsity: Sparsity | None) -> torch.Tensor:
    """Unlifted codes [N, K] of one merged linear of the first decoder block of a checkpoint of ours.

    Raises:
        CheckpointError: the folder is no checkpoint, has another pattern, or other shapes than the plan.
    """
    from slidesparse.checkpoint.checkpoint import Checkpoint

    checkpoint = Checkpoint.open(folder)
    section = checkpoint.section
    pattern = None if section is None else section.pattern
    if pattern != sparsity:
        raise CheckpointError(
            f"{folder}: holds pattern {pattern or 'dense'}, but {sparsity or 'dense'} is needed; convert again"
        )
    parts = [checkpoint.load(f"model.layers.0.{name}.weight") for name in MERGED[layer]]
    merged = torch.cat([part.view(torch.uint8) for part in parts]).view(parts[0].dtype)
    if section is not None and section.layout == "lifted":
        merged = unlift(merged, shape[1], section.pattern)
    if tuple(merged.shape) != shape:
        raise CheckpointError(
            f"{folder}: {layer} is {tuple(merged.shape)}, but bench.yaml says {shape}; prepare it again"
        )
    return merged


def lift(codes: torch.Tensor, sparsity: Sparsity, layer: str) -> torch.Tensor:
    """Codes [N, K] -> [N, K'] of the same type. Raises CheckpointError when a group holds too many non-zeros."""
    lifted = lift_weight(codes.contiguous().view(torch.int8).numpy(), sparsity, layer)
    return torch.from_numpy(lifted).view(codes.dtype)


def unlift(lifted: torch.Tensor, k: int, sparsity: Sparsity) -> torch.Tensor:
    """Codes [N, K'] -> [N, K] of the same type."""
    return torch.from_numpy(unlift_weight(lifted.contiguous().view(torch.int8).numpy(), k, sparsity)).view(lifted.dtype)
