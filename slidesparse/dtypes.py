"""The 8-bit types of a W8A8 linear: their names in files, their range, their torch types."""

from __future__ import annotations

from enum import StrEnum

import torch


class DType(StrEnum):
    """Operand type of a W8A8 GEMM. The value is the name used in result tags (`..._INT8_py312_...`)."""

    INT8 = "INT8"
    FP8 = "FP8E4M3"

    @property
    def suffix(self) -> str:
        """Ending of model names: `BitNet-2B-INT8`, `BitNet-2B-FP8`."""
        return "INT8" if self is DType.INT8 else "FP8"

    @property
    def torch(self) -> torch.dtype:
        return torch.int8 if self is DType.INT8 else torch.float8_e4m3fn

    @property
    def limit(self) -> float:
        """Largest magnitude that quantisation produces: 127 (symmetric) or 448 (e4m3)."""
        return 127.0 if self is DType.INT8 else 448.0
