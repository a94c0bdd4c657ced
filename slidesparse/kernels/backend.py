"""What a backend is: a GEMM with several algorithms, the activation kernels around it, and its registry.

A GPU backend plugs in by implementing `Backend` (and `Activations` if its kernels differ) and one line in
`backend()`. Nothing else knows names of backends.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar, Literal

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.machine import Machine
from slidesparse.pattern import Sparsity

ActivationOperation = Literal["quantise", "quantise_lift", "dequantise_bias"]


@dataclass(frozen=True)
class Algorithm:
    """One way to run an operation. `name` is what the tuning store keeps; `alg_id` goes into the tables."""

    alg_id: int
    name: str
    config: str = ""
    """Its parameters, in words."""
    split_k: int = 1
    workspace: int = 0
    """Bytes of scratch memory that the caller must count with."""


@dataclass(frozen=True)
class Weight:
    """A weight in the form that a backend multiplies. `data` is the backend's own."""

    n: int
    k: int
    """Columns of the operand: K' for a sparse backend."""
    dtype: DType
    data: Any
    nbytes: int


class Activations(ABC):
    """The kernels before and after the GEMM. Every algorithm of one operation gives the same bits."""

    name: ClassVar[str]

    @abstractmethod
    def algorithms(self, operation: ActivationOperation, dtype: DType) -> tuple[Algorithm, ...]:
        """Candidates, the default first."""

    @abstractmethod
    def quantise(
        self, x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, algorithm: Algorithm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x [M, K] (bfloat16 or float32) -> codes [M, K] or, with a pattern, [M, K'], and scale float32 [M, 1]."""

    @abstractmethod
    def dequantise_bias(
        self,
        acc: torch.Tensor,
        scale_token: torch.Tensor,
        scale_channel: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        algorithm: Algorithm,
    ) -> torch.Tensor:
        """acc [M, N], scales float32 [M, 1] and [N, 1], bias float32 [N] -> [M, N] of `out_dtype`."""


class Backend(ABC):
    """A GEMM of 8-bit codes. Stateless; safe to share."""

    name: ClassVar[str]
    sparse: ClassVar[bool]
    """True: `pack` takes lifted 2:4 weights and `gemm` lifted activations."""
    emulation: ClassVar[bool]
    """True: its time says nothing about tensor cores."""
    activations: Activations

    @abstractmethod
    def require(self, machine: Machine, dtype: DType) -> None:
        """Raises UnsupportedHere, with the reason, where this machine cannot run it."""

    @abstractmethod
    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        """Candidates for one size, the default first. k is the operand's K (K' if sparse)."""

    @abstractmethod
    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        """Codes [N, K] (lifted [N, K'] if sparse) of `dtype.torch` -> the form that `gemm` takes.

        Raises CheckpointError when a sparse backend is given a weight that is not 2:4.
        """

    @abstractmethod
    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        """out[m, n] = sum_k x[m, k] w[n, k]: codes [M, K] -> int32 (INT8) or float32 (FP8) [M, N], all overwritten."""

    @abstractmethod
    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        """Name of the code that `gemm` runs, for the records."""


def named(algorithms: tuple[Algorithm, ...], name: str) -> Algorithm | None:
    """The algorithm of that name, if it is among the candidates."""
    return next((algorithm for algorithm in algorithms if algorithm.name == name), None)


@lru_cache(maxsize=8)
def backend(name: str) -> Backend:
    """The backend of that name. Raises UnsupportedHere for those that this version does not have."""
    if name == "cpu_dense":
        from slidesparse.kernels.cpu_dense import CpuDense

        return CpuDense()
    if name == "cpu_sparse":
        from slidesparse.kernels.cpu_sparse import CpuSparse

        return CpuSparse()
    raise UnsupportedHere(
        f"backend {name} needs an NVIDIA GPU and CUDA kernels; this version has CPU backends only "
        f"(cpu_dense, cpu_sparse)"
    )
