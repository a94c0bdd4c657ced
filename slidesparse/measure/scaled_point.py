"""A GEMM with its whole epilogue at one size: both scales applied and bfloat16 written, in one kernel or in two.

`gemm_point.GemmPoint` says how operands, checks and candidates work; here only what runs differs.
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

import torch

from slidesparse.kernels import verify
from slidesparse.kernels.backend import Algorithm, Backend, Weight
from slidesparse.kernels.verify import Check
from slidesparse.measure.clocks import clock_of
from slidesparse.measure.gemm_point import GemmPoint, LayerWeight, Product
from slidesparse.measure.timer import Call, leading
from slidesparse.pattern import Sparsity

Scales = tuple[torch.Tensor, torch.Tensor]
"""Of tokens float32 [M, 1], of channels [N, 1]."""


class ScaledPoint(GemmPoint):
    """Scales in the GEMM's own epilogue."""

    scaled: ClassVar[bool] = True

    @property
    def written(self) -> torch.dtype:
        return torch.bfloat16

    def algorithms(self) -> tuple[Algorithm, ...]:
        x, packed, _ = self._sets[0]
        return self.side.scaled_algorithms(packed.dtype, x.shape[0], packed.n, packed.k, bias=False)

    def run(
        self, x: torch.Tensor, packed: Weight, scales: Scales, algorithm: Algorithm, out: torch.Tensor
    ) -> torch.Tensor:
        return self.side.gemm_scaled(x, scales[0], packed, scales[1], None, algorithm, out)

    def path(self, algorithm: Algorithm) -> str:
        return f"{super().path(algorithm)}, scales fused"


class TwoKernelPoint(GemmPoint):
    """A GEMM that writes its sums, then a kernel that scales them: what a library without fused scales needs."""

    scaled: ClassVar[bool] = True

    def __init__(self, side: Backend, weight: LayerWeight, product: Product, sparsity: Sparsity | None) -> None:
        """Chooses the second kernel's launch by a quick look."""
        super().__init__(side, weight, product, sparsity)
        launches = side.activations.algorithms("dequantise_bias", product.dtype)
        calls: list[list[Call]] = [[partial(self._scale, out, product.scales, launch) for *_, out in self._sets]
                                   for launch in launches]  # fmt: skip
        for *_, out in self._sets:
            out.zero_()
        self._launch = launches[leading(calls, clock_of(side), count=1)[0]]

    def run(
        self, x: torch.Tensor, packed: Weight, scales: Scales, algorithm: Algorithm, out: torch.Tensor
    ) -> torch.Tensor:
        return self._scale(self.side.gemm(x, packed, algorithm, out), scales, self._launch)

    def check(self, algorithm: Algorithm, figures: bool = True) -> Check:
        with verify.poisoned_memory():  # the second kernel's output is not among the buffers
            return super().check(algorithm, figures)

    def path(self, algorithm: Algorithm) -> str:
        return f"{super().path(algorithm)} > dequantise {self._launch.name}"

    def _scale(self, sums: torch.Tensor, scales: Scales, launch: Algorithm) -> torch.Tensor:
        return self.side.activations.dequantise_bias(sums, *scales, None, torch.bfloat16, launch)


def whole_point(side: Backend, weight: LayerWeight, product: Product, sparsity: Sparsity | None) -> GemmPoint:
    """With the whole epilogue: in one kernel where the backend has one for this size, else in two."""
    n, k, m = weight.packed.n, weight.packed.k, product.codes.shape[0]
    fused = side.scaled_only or side.scaled_algorithms(product.dtype, m, n, k, bias=False)
    return (ScaledPoint if fused else TwoKernelPoint)(side, weight, product, sparsity)


def point_of(side: Backend, weight: LayerWeight, product: Product, sparsity: Sparsity | None) -> GemmPoint:
    """What a backend's GEMM is: alone, or with its epilogue where it never runs without."""
    return (ScaledPoint if side.scaled_only else GemmPoint)(side, weight, product, sparsity)
