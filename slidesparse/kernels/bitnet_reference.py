"""What stands between two linears of a BitNet layer, in plain PyTorch: the oracle of `triton_bitnet`, and its traffic.

As in `transformers` (modeling_bitnet.py) with a bfloat16 model; bf16(...) marks every rounding, r is float32:

    add         t = bf16(x + residual)                                  the residual stream is bfloat16
    gate        t = bf16(bf16(max(gate, 0)**2) * up)
    norm        r = 1 / sqrt(mean(t**2) + eps)
                y = bf16(weight * bf16(t * r))
    then        codes, scale = reference.quantise(y), lifted

A float32 weight is multiplied as it is and rounded with the product (transformers would go on in float32).

How far a kernel that sums in another order may be from this: its r differs by at most 2**-17. (Either r is within
2**-18 of the exact one: the sum has positive terms and a depth below 120, the root halves its error, and is itself off
by 2**-22 at most.) Where t * r lies that close to the middle of two bfloat16, the other one may be taken, which moves y
by at most 1/72 of itself (every pair of mantissas tried) and its code by at most one step, INT8 codes beyond 72 by two.
Where it is the row's largest value that moves, so does the scale, by as much, and with it any code of the row: by one
step, INT8 codes beyond 36 by up to four. With r moved by up to 2**-22 in 50,000 rows of 2560 random values: 3 codes in
a million, one scale in 25,000, no code by more than one step.
"""

from __future__ import annotations

from typing import Literal

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

BitNetOperation = Literal["norm", "add", "gate"]
"""What is normalised: x, x + residual, max(gate, 0)**2 * up."""

SCALE_ERROR = 1 / 72
"""Largest relative difference of the scales: see above."""


def add(x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
    """bfloat16 [M, K] twice -> their sum, rounded once."""
    return x + residual


def squared_relu_gate(gate_up: torch.Tensor) -> torch.Tensor:
    """bfloat16 [M, 2 K], gate first -> bfloat16 [M, K]: the square and the product are rounded."""
    gate, up = gate_up.chunk(2, dim=1)
    return torch.relu(gate).square() * up


def inverse_rms(t: torch.Tensor, eps: float) -> torch.Tensor:
    """bfloat16 [M, K] -> float32 [M, 1]."""
    return torch.rsqrt(t.float().square().mean(dim=1, keepdim=True) + eps)


def normalise(t: torch.Tensor, inverse: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """bfloat16 [M, K], float32 [M, 1], weight bfloat16 or float32 [K] -> bfloat16 [M, K]."""
    return (weight.float() * (t.float() * inverse).bfloat16().float()).bfloat16()


def norm_quantise_lift(
    t: torch.Tensor, weight: torch.Tensor, eps: float, dtype: DType, sparsity: Sparsity | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """bfloat16 [M, K] -> codes [M, K'] (K without a pattern), scale float32 [M, 1]."""
    return quantise_lift(normalise(t, inverse_rms(t, eps), weight), dtype, sparsity)


def add_norm_quantise_lift(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, dtype: DType, sparsity: Sparsity | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same of x + residual, which comes last: bfloat16 [M, K]."""
    total = add(x, residual)
    return *norm_quantise_lift(total, weight, eps, dtype, sparsity), total


def gate_norm_quantise_lift(
    gate_up: torch.Tensor, weight: torch.Tensor, eps: float, dtype: DType, sparsity: Sparsity | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of `squared_relu_gate`: bfloat16 [M, 2 K] -> codes [M, K'], scale float32 [M, 1]."""
    return norm_quantise_lift(squared_relu_gate(gate_up), weight, eps, dtype, sparsity)


def quantise_lift(y: torch.Tensor, dtype: DType, sparsity: Sparsity | None) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.quantise`, then `reference.lift` where there is a pattern."""
    codes, scale = reference.quantise(y, dtype)
    return (codes if sparsity is None else reference.lift(codes, sparsity)), scale


def floor_bytes(operation: BitNetOperation, m: int, k: int, sparsity: Sparsity | None) -> int:
    """Bytes that the fused operation must move: inputs (bfloat16 weights too) read once, outputs written once."""
    read, written = {"norm": (2, 0), "add": (4, 2), "gate": (4, 0)}[operation]
    return m * k * (read + written) + m * _row_result(k, sparsity) + 2 * k


def unfused_bytes(operation: BitNetOperation, m: int, k: int, sparsity: Sparsity | None) -> int:
    """The same with a kernel each for gate (4 read, 2 written), norm (2 and 2; with an addition 4 and 4), quantise."""
    before = {"norm": 4, "add": 8, "gate": 10}[operation]
    return m * k * (before + 2) + m * _row_result(k, sparsity) + 2 * k


def _row_result(k: int, sparsity: Sparsity | None) -> int:
    """Codes and the scale of a row."""
    return (k if sparsity is None else sparsity.lifted_k(k)) + 4
