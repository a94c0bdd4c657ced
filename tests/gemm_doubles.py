"""GPU backends stood in for by the CPU: same names, a packed weight is one tensor, 2:4 is proved."""

from __future__ import annotations

from typing import Any

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels.backend import Weight
from slidesparse.kernels.compress import compress
from slidesparse.kernels.cpu_dense import CpuDense


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
