"""GPU backends stood in for by the CPU: same names, a packed weight is one tensor, 2:4 is proved."""

from __future__ import annotations

from typing import Any

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import cutlass
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.kernels.compress import compress
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.cpu_dense import CpuDense
from slidesparse.kernels.reference import accumulator, dequantise_bias
from slidesparse.machine import Machine


class Double(CpuDense):
    """Keeps a lifted weight as it is, after proof that it is 2:4."""

    def __init__(self, name: str, sparse: bool) -> None:
        self.name, self.sparse = name, sparse  # type: ignore[misc]
        self.rows: list[int] = []
        """M of each product."""

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        if self.sparse:
            compress(codes, layer)  # raises where the lifted weight is not 2:4
        return super().pack(codes, dtype, layer)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Any, out: torch.Tensor) -> torch.Tensor:
        self.rows.append(x.shape[0])
        return super().gemm(x, weight, algorithm, out)


class FusedDouble(Double):
    """A sparse backend that never runs without its epilogue. `off`: by what one element is wrong, by algorithm."""

    scaled_only = True

    def __init__(self) -> None:
        super().__init__("fused", True)
        self.off: dict[str, float] = {}

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        raise AssertionError("it has none without scales")

    def scaled_algorithms(self, dtype: DType, m: int, n: int, k: int, bias: bool) -> tuple[Algorithm, ...]:
        return super().algorithms(dtype, m, n, k)

    def gemm_scaled(
        self,
        x: torch.Tensor,
        scale_token: torch.Tensor,
        weight: Weight,
        scale_channel: torch.Tensor,
        bias: torch.Tensor | None,
        algorithm: Algorithm,
        out: torch.Tensor,
    ) -> torch.Tensor:
        acc = torch.empty(out.shape, dtype=accumulator(weight.dtype))
        super().gemm(x, weight, algorithm, acc)
        out.copy_(dequantise_bias(acc, scale_token, scale_channel, bias))
        out.view(-1)[-1] *= 1 + self.off.get(algorithm.name, 0.0)
        return out

    def output(self, dtype: DType) -> torch.dtype:
        return torch.bfloat16


def scaled_product(
    out: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale_a: torch.Tensor,
    scale_b: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """vLLM's `_C::cutlass_scaled_mm` in plain PyTorch: its demands on layouts, and its order of operations."""
    assert a.stride(1) == out.stride(1) == b.stride(0) == 1, "a and out by rows, b by columns"
    assert out.stride(0) % 16 == b.stride(1) % 16 == 0
    assert scale_a.shape == (a.shape[0], 1)
    assert scale_b.shape == (b.shape[1], 1)
    assert scale_a.is_contiguous()
    assert scale_b.is_contiguous()
    acc = (a.double() @ b.double()).float()
    y = (acc * scale_b.T).double() * scale_a.double()  # exact: 48 bits
    if bias is not None:
        assert bias.dtype is out.dtype
        y += bias.double()
    out.copy_(y.float())  # one rounding of product and sum, as fused


class CutlassDouble(cutlass.Cutlass):
    """The backend itself, on the CPU. `cutlass._scaled_product` must be made to give `scaled_product`."""

    device = "cpu"
    activations = CpuActivations()

    def require(self, machine: Machine, dtype: DType) -> None:
        pass
