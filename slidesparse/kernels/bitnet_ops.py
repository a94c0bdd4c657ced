"""The fused BitNet kernels as torch operators: opaque to torch.compile (any M), safe in CUDA graphs.

    slidesparse::norm_quantise_lift(x, weight, eps, length, fp8, words, warps) -> (codes, scale)
    slidesparse::add_norm_quantise_lift(x, residual, weight, eps, length, fp8, words, warps) -> (codes, scale, total)
    slidesparse::gate_norm_quantise_lift(gate_up, weight, eps, length, fp8, words, warps) -> (codes, scale)

Patterns and launches travel as plain numbers, as in `activation_ops`; the functions without `_op` take the project's
own types. A kernel is compiled at its first call with new sizes, so call once before capturing.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import triton_bitnet as kernels
from slidesparse.kernels.activation_ops import meaning, numbers
from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.triton_activations import lifted_width
from slidesparse.kernels.triton_launch import Launch
from slidesparse.pattern import Sparsity


def norm_quantise_lift(
    x: torch.Tensor, weight: torch.Tensor, eps: float, dtype: DType, sparsity: Sparsity | None, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_bitnet.norm_quantise_lift` as one operator of a graph."""
    result: tuple[torch.Tensor, torch.Tensor] = norm_quantise_lift_op(
        x, weight, eps, *numbers(dtype, sparsity), launch.words, launch.warps
    )
    return result


def add_norm_quantise_lift(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`triton_bitnet.add_norm_quantise_lift` as one operator of a graph. The residual stays as it is."""
    result: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = add_norm_quantise_lift_op(
        x, residual, weight, eps, *numbers(dtype, sparsity), launch.words, launch.warps
    )
    return result


def gate_norm_quantise_lift(
    gate_up: torch.Tensor, weight: torch.Tensor, eps: float, dtype: DType, sparsity: Sparsity | None, launch: Launch
) -> tuple[torch.Tensor, torch.Tensor]:
    """`triton_bitnet.gate_norm_quantise_lift` as one operator of a graph."""
    result: tuple[torch.Tensor, torch.Tensor] = gate_norm_quantise_lift_op(
        gate_up, weight, eps, *numbers(dtype, sparsity), launch.words, launch.warps
    )
    return result


@torch.library.custom_op(f"{NAMESPACE}::norm_quantise_lift", mutates_args=())
def norm_quantise_lift_op(
    x: torch.Tensor, weight: torch.Tensor, eps: float, length: int, fp8: bool, words: int, warps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bfloat16 [M, K], weight [K] -> codes [M, K'], scale float32 [M, 1]."""
    return kernels.norm_quantise_lift(x, weight, eps, *meaning(length, fp8), Launch(words, warps))


@torch.library.custom_op(f"{NAMESPACE}::add_norm_quantise_lift", mutates_args=())
def add_norm_quantise_lift_op(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    length: int,
    fp8: bool,
    words: int,
    warps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, residual bfloat16 [M, K], weight [K] -> codes [M, K'], scale float32 [M, 1], sum bfloat16 [M, K]."""
    return kernels.add_norm_quantise_lift(x, residual, weight, eps, *meaning(length, fp8), Launch(words, warps))


@torch.library.custom_op(f"{NAMESPACE}::gate_norm_quantise_lift", mutates_args=())
def gate_norm_quantise_lift_op(
    gate_up: torch.Tensor, weight: torch.Tensor, eps: float, length: int, fp8: bool, words: int, warps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """gate_up bfloat16 [M, 2 K], weight [K] -> codes [M, K'], scale float32 [M, 1]."""
    return kernels.gate_norm_quantise_lift(gate_up, weight, eps, *meaning(length, fp8), Launch(words, warps))


@norm_quantise_lift_op.register_fake
def _(
    x: torch.Tensor, weight: torch.Tensor, eps: float, length: int, fp8: bool, words: int, warps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(x, weight, length, fp8)


@add_norm_quantise_lift_op.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    length: int,
    fp8: bool,
    words: int,
    warps: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return *_results(x, weight, length, fp8), torch.empty_like(x)


@gate_norm_quantise_lift_op.register_fake
def _(
    gate_up: torch.Tensor, weight: torch.Tensor, eps: float, length: int, fp8: bool, words: int, warps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    return _results(gate_up, weight, length, fp8)


def _results(x: torch.Tensor, weight: torch.Tensor, length: int, fp8: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scale as tracing sees them. K is the layer's, a plain number; M may be a symbol."""
    dtype, sparsity = meaning(length, fp8)
    width = lifted_width(int(weight.shape[0]), dtype, sparsity)
    return x.new_empty((x.shape[0], width), dtype=dtype.torch), x.new_empty((x.shape[0], 1), dtype=torch.float32)
