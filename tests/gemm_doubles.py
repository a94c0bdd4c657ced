"""GPU backends stood in for by the CPU: same names, a packed weight is one tensor, 2:4 is proved."""

from __future__ import annotations

from typing import Any

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import cutlass
from slidesparse.kernels.backend import Weight
from slidesparse.kernels.compress import compress
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.cpu_dense import CpuDense
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
