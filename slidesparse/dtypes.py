"""Operand types of a GEMM: their names in files, their range, their torch types."""

from __future__ import annotations

from enum import StrEnum

import torch


class DType(StrEnum):
    """Operand type of a GEMM. The value is the name used in result tags (`..._INT8_py312_...`).

    Models are prepared in the 8-bit types. The 16-bit ones have kernel points only: what sparsity buys without
    quantisation.
    """

    INT8 = "INT8"
    FP8 = "FP8E4M3"
    BF16 = "BF16"
    FP16 = "FP16"

    @property
    def suffix(self) -> str:
        """Ending of model names: `BitNet-2B-INT8`, `BitNet-2B-FP8`."""
        return "FP8" if self is DType.FP8 else self.value

    @property
    def torch(self) -> torch.dtype:
        return {
            DType.INT8: torch.int8,
            DType.FP8: torch.float8_e4m3fn,
            DType.BF16: torch.bfloat16,
            DType.FP16: torch.float16,
        }[self]

    @property
    def quantised(self) -> bool:
        """True for the 8-bit types, which need scales."""
        return self in (DType.INT8, DType.FP8)

    @property
    def limit(self) -> float:
        """Largest magnitude that quantisation produces: 127 (symmetric) or 448 (e4m3). Raises ValueError."""
        if not self.quantised:
            raise ValueError(f"{self.value} is not a quantised type")
        return 127.0 if self is DType.INT8 else 448.0


QUANTISED = (DType.INT8, DType.FP8)
"""The types that models are prepared in."""
