"""Operands for timing a GEMM: weights of the model itself, or random ones that keep to the pattern; activations."""

from __future__ import annotations

from pathlib import Path

import torch

from slidesparse.checkpoint.lift import lift_weight, unlift_weight
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import reference
from slidesparse.kernels.device_lift import lift_on_device
from slidesparse.pattern import Sparsity

MERGED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}
"""Linear layers that an inference engine merges along N, by the names of `config.Model.linear_shapes`."""


ACTIVATION_STREAM = 1 << 32


def activation(m: int, k: int, seed: int, device: str = "cpu") -> torch.Tensor:
    """bfloat16 [M, K], standard normal."""
    # Not the stream that random weights come from: row m of x would be row m of the weight, and their product a sum of
    # squares, which is the worst case of FP8 accumulation.
    generator = torch.Generator(device).manual_seed(seed + ACTIVATION_STREAM)
    return torch.randn(m, k, generator=generator, device=device, dtype=torch.float32).to(torch.bfloat16)


def codes_of(x: torch.Tensor, dtype: DType) -> torch.Tensor:
    """Values [M, K] as GEMM operands: quantised codes, or just the 16-bit type."""
    return reference.quantise(x, dtype)[0] if dtype.quantised else x.to(dtype.torch)


def random_weight(
    n: int, k: int, dtype: DType, sparsity: Sparsity | None, seed: int, device: str = "cpu"
) -> torch.Tensor:
    """Unlifted codes [N, K] of `dtype.torch`: quantised normal values, Z random zeros in every group of L.

    A last group of fewer than L columns counts the missing ones as zeros.
    """
    generator = torch.Generator(device).manual_seed(seed)
    codes = codes_of(torch.randn(n, k, generator=generator, device=device), dtype)
    if sparsity is None or sparsity.l is None:
        return codes
    groups = sparsity.groups(k)
    order = torch.rand(n, groups * sparsity.l, generator=generator, device=device)
    order[:, k:] = -1.0
    zeros = order.reshape(n, groups, sparsity.l).topk(Sparsity.z, dim=2, largest=False).indices
    drop = torch.zeros(n, groups, sparsity.l, dtype=torch.bool, device=device).scatter_(2, zeros, True)
    bits = codes.view(torch.uint8 if codes.itemsize == 1 else torch.int16)
    return bits.masked_fill_(drop.reshape(n, -1)[:, :k], 0).view(dtype.torch)


def signs(codes: torch.Tensor) -> torch.Tensor:
    """-1, 0 and 1 in the same type: products of such operands have exact sums on every tensor core."""
    return codes.float().sign_().to(codes.dtype)


def weight_source(folder: Path) -> str:
    """`random`, or the fingerprint of the checkpoint that weights come from."""
    from slidesparse.checkpoint.checkpoint import Checkpoint

    return Checkpoint.open(folder).fingerprint() if folder.exists() else "random"


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
    """Codes [N, K] -> [N, K'] of the same type, on their device.

    Raises CheckpointError when a group holds too many non-zeros.
    """
    if codes.is_cuda or codes.itemsize > 1:
        return lift_on_device(codes, sparsity, layer)
    lifted = lift_weight(codes.contiguous().view(torch.int8).numpy(), sparsity, layer)
    return torch.from_numpy(lifted).view(codes.dtype)


def unlift(lifted: torch.Tensor, k: int, sparsity: Sparsity) -> torch.Tensor:
    """Codes [N, K'] -> [N, K] of the same type."""
    return torch.from_numpy(unlift_weight(lifted.contiguous().view(torch.int8).numpy(), k, sparsity)).view(lifted.dtype)
