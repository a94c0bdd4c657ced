"""The activation kernels as torch operators: opaque to torch.compile (any M), safe in CUDA graphs.

    slidesparse::quantise_lift(x, length, fp8, words, warps) -> (codes, scale)
    slidesparse::dequantise_bias(acc, scale_token, scale_channel, bias?, words, warps, rows) -> out

Patterns and launches travel as plain numbers: `quantise_lift` and `dequantise_bias` below take the project's own types.
A kernel is compiled at its first call with new sizes, so call once before capturing.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import triton_activations, triton_dequantise
from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.triton_launch import Launch
from slidesparse.pattern import Sparsity

DENSE, INFINITE = 0, -1
"""`length` of an operator is L, or one of these: no pattern, and 2:inf."""


def quantise_lift(
    x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_activations.quantise_lift` as one operator of a graph."""
    result: tuple[torch.Tensor, torch.Tensor] = quantise_lift_op(
        x, *numbers(dtype, sparsity), launch.words, launch.warps
    )
    return result


def dequantise_bias(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    launch: Launch,
) -> torch.Tensor:
    """`triton_dequantise.dequantise_bias` as one operator of a graph."""
    result: torch.Tensor = dequantise_bias_op(
        acc, scale_token, scale_channel, bias, launch.words, launch.warps, launch.rows
    )
    return result


def numbers(dtype: DType, sparsity: Sparsity | None) -> tuple[int, bool]:
    """`length` and `fp8` of an operator."""
    return DENSE if sparsity is None else sparsity.l or INFINITE, dtype is DType.FP8


def meaning(length: int, fp8: bool) -> tuple[DType, Sparsity | None]:
    """What `numbers` were made of."""
    sparsity = None if length == DENSE else Sparsity(None if length == INFINITE else length)
    return DType.FP8 if fp8 else DType.INT8, sparsity


@torch.library.custom_op(f"{NAMESPACE}::quantise_lift", mutates_args=())
def quantise_lift_op(
    x: torch.Tensor,
    length: int,
    fp8: bool,
    words: int,
    warps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bfloat16 [M, K] -> codes [M, K'], scale float32 [M, 1]."""
    dtype, sparsity = meaning(length, fp8)
    return triton_activations.quantise_lift(x, dtype, sparsity, Launch(words, warps))


@torch.library.custom_op(f"{NAMESPACE}::dequantise_bias", mutates_args=())
def dequantise_bias_op(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    words: int,
    warps: int,
    rows: int,
) -> torch.Tensor:
    """acc [M, N], scales float32 [M, 1] and [N, 1], bias [N] -> bfloat16 [M, N]."""
    return triton_dequantise.dequantise_bias(acc, scale_token, scale_channel, bias, Launch(words, warps, rows))


@quantise_lift_op.register_fake
def _(
    x: torch.Tensor,
    length: int,
    fp8: bool,
    words: int,
    warps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    dtype, sparsity = meaning(length, fp8)
    # K is the layer's, a plain number; M may be a symbol.
    width = triton_activations.lifted_width(int(x.shape[1]), dtype, sparsity)
    return x.new_empty((x.shape[0], width), dtype=dtype.torch), x.new_empty((x.shape[0], 1), dtype=torch.float32)


@dequantise_bias_op.register_fake
def _(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    words: int,
    warps: int,
    rows: int,
) -> torch.Tensor:
    return torch.empty_like(acc, dtype=torch.bfloat16)
