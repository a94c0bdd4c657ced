"""The Triton kernels as the activations of a backend; every launch of theirs is an algorithm."""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels.backend import ActivationOperation, Activations, Algorithm, Encoder
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.pattern import Sparsity


class TritonActivations(Activations):
    """Shared by the GPU backends. Triton is imported when first used: without it everything else still runs.

    The kernels are operators of torch where something is traced, and called directly elsewhere, as in `gemm_ops`.
    """

    name = "triton"

    def algorithms(self, operation: ActivationOperation, dtype: DType) -> tuple[Algorithm, ...]:
        from slidesparse.kernels.triton_activations import QUANTISE_LAUNCHES
        from slidesparse.kernels.triton_dequantise import DEQUANTISE_LAUNCHES

        launches = DEQUANTISE_LAUNCHES if operation == "dequantise_bias" else QUANTISE_LAUNCHES
        return tuple(Algorithm(place, str(launch)) for place, launch in enumerate(launches))

    def quantise(
        self, x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, algorithm: Algorithm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from slidesparse.kernels import activation_ops as operators
        from slidesparse.kernels import triton_activations as kernels

        run = operators.quantise_lift if torch.compiler.is_compiling() else kernels.quantise_lift
        return run(x, dtype, sparsity, kernels.QUANTISE_LAUNCHES[algorithm.alg_id])

    def dequantise_bias(
        self,
        acc: torch.Tensor,
        scale_token: torch.Tensor,
        scale_channel: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        algorithm: Algorithm,
    ) -> torch.Tensor:
        from slidesparse.kernels import activation_ops as operators
        from slidesparse.kernels import triton_dequantise as kernels

        if out_dtype is not torch.bfloat16:
            raise ValueError(f"the Triton kernel writes bfloat16, not {out_dtype}")
        run = operators.dequantise_bias if torch.compiler.is_compiling() else kernels.dequantise_bias
        return run(acc, scale_token, scale_channel, bias, kernels.DEQUANTISE_LAUNCHES[algorithm.alg_id])

    def norm_algorithms(self, k: int) -> tuple[Algorithm, ...]:
        from slidesparse.kernels.triton_bitnet import launches

        return tuple(Algorithm(place, f"{one.words}x{one.warps}") for place, one in enumerate(launches(k)))

    def encoder(
        self, before: BitNetOperation | None, dtype: DType, sparsity: Sparsity | None, k: int, algorithm: Algorithm
    ) -> Encoder:
        from slidesparse.kernels import triton_activations as plain
        from slidesparse.kernels import triton_bitnet as fused

        plain.lifted_width(k, dtype, sparsity)  # raises
        known = plain.QUANTISE_LAUNCHES if before is None else fused.launches(k)
        launch = known[algorithm.alg_id]

        def run(
            x: torch.Tensor,
            residual: torch.Tensor | None,
            weight: torch.Tensor | None,
            eps: float,
            codes: torch.Tensor,
            scale: torch.Tensor,
        ) -> torch.Tensor | None:
            if weight is None:
                plain.quantise_lift(x, dtype, sparsity, launch, codes, scale)
                return None
            if residual is not None:
                *_, total = fused.add_norm_quantise_lift(
                    x, residual, weight, eps, dtype, sparsity, launch, codes, scale
                )
                return total
            kernel = fused.gate_norm_quantise_lift if before == "gate" else fused.norm_quantise_lift
            kernel(x, weight, eps, dtype, sparsity, launch, codes, scale)
            return None

        return run
