"""Dense GEMM of 8-bit codes on the CPU: torch's integer product, and BLAS on exactly decoded codes."""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.backend import Activations, Algorithm, Backend, Weight
from slidesparse.kernels.cpu_activations import CpuActivations
from slidesparse.kernels.e4m3 import decode
from slidesparse.machine import Machine

EXACT_COLUMNS = 1024
"""Products of int8 codes that float32 adds exactly: 1024 * 127**2 < 2**24."""
DECODED_ELEMENTS = 1 << 21
"""Decoded weights are made in tiles of about this many elements, so that memory stays that of the codes."""

INT_MM = Algorithm(0, "int_mm", "torch._int_mm (oneDNN: AMX, VNNI)")
FLOAT32_BLOCKS = Algorithm(1, "float32_k1024", "float32 BLAS on blocks of 1024 columns, each exact, added in int32")
FLOAT64 = Algorithm(2, "float64", "float64 BLAS of decoded codes, exact")
FLOAT32 = Algorithm(3, "float32", "float32 BLAS of decoded codes")


class CpuDense(Backend):
    """Weights stay 8-bit in memory; algorithms that need wider numbers decode tiles inside the product."""

    name = "cpu_dense"
    sparse = False
    emulation = True
    device = "cpu"
    activations: Activations = CpuActivations()

    def require(self, machine: Machine, dtype: DType) -> None:
        """Runs everywhere, 8-bit types only."""
        if not dtype.quantised:
            raise UnsupportedHere(f"backend {self.name} has no {dtype.value}: it emulates the 8-bit types")

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        return (INT_MM, FLOAT32_BLOCKS, FLOAT64) if dtype is DType.INT8 else (FLOAT32, FLOAT64)

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        n, k = codes.shape
        return Weight(n, k, dtype, codes.contiguous(), codes.numel())

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        codes: torch.Tensor = weight.data
        if algorithm.name == INT_MM.name:
            torch._int_mm(x, codes.T, out=out)
            return out
        wide = torch.float64 if algorithm.name == FLOAT64.name else torch.float32
        block = EXACT_COLUMNS if algorithm.name == FLOAT32_BLOCKS.name else weight.k
        rows = max(1, DECODED_ELEMENTS // max(weight.k, 1))
        decoded_x = decode(x, weight.dtype, wide)
        for first in range(0, weight.n, rows):
            tile = out[:, first : first + rows]
            decoded_w = decode(codes[first : first + rows], weight.dtype, wide)
            tile.copy_(decoded_x[:, :block] @ decoded_w[:, :block].T)
            for column in range(block, weight.k, block):
                part = decoded_x[:, column : column + block] @ decoded_w[:, column : column + block].T
                tile += part.to(out.dtype)
        return out

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        return f"cpu_dense {algorithm.name} ({algorithm.config})"
