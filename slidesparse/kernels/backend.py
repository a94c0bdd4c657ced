"""What a backend is: a GEMM with several algorithms, the activation kernels around it, and its registry.

A GPU backend plugs in by implementing `Backend` (and `Activations` if its kernels differ) and one line in
`backend()`. Nothing else knows names of backends.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import reference, verify
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.machine import Machine
from slidesparse.pattern import Sparsity
from slidesparse.plan import AUTO, STOCK

ActivationOperation = Literal["quantise", "quantise_lift", "dequantise_bias"]
Encoder = Callable[
    [torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, torch.Tensor, torch.Tensor], torch.Tensor | None
]
"""(x, residual, norm weight, eps, codes!, scale!) -> x + residual, or None where nothing is added.

x bfloat16 [M, K] ([M, 2 K] before a gate); residual like x, where one is added; norm weight [K], where x is normed.
Writes codes [M, K'] and scale [M, 1].
"""


def operation_name(before: BitNetOperation | None, lift: bool) -> str:
    """What a tuning store and the records call the step before a GEMM: `add_norm_quantise_lift`, `quantise`."""
    fused = "" if before is None else {"norm": "norm_", "add": "add_norm_", "gate": "gate_norm_"}[before]
    return f"{fused}quantise_lift" if lift else f"{fused}quantise"


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

    def copy(self) -> Weight:
        """The same weight elsewhere in memory (GPU backends: `data` is one tensor)."""
        return replace(self, data=self.data.clone())


class Activations(ABC):
    """The kernels before and after the GEMM. Every algorithm of one operation gives the same bits."""

    name: ClassVar[str]

    @property
    def revision(self) -> str:
        """See `own_revision`."""
        return own_revision(self.name)

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

    @property
    def norm_family(self) -> str:
        """What a tuning store calls the fused BitNet kernels: they have sources of their own."""
        return f"{self.name}_bitnet"

    @abstractmethod
    def norm_algorithms(self, k: int) -> tuple[Algorithm, ...]:
        """Candidates of the fused BitNet kernels for rows of K values, the default first.

        Raises ValueError for rows that none can hold.
        """

    @abstractmethod
    def encoder(
        self, before: BitNetOperation | None, dtype: DType, sparsity: Sparsity | None, k: int, algorithm: Algorithm
    ) -> Encoder:
        """What makes codes of x, ready to be called at any M: `quantise`, or a BitNet operation (`bitnet_reference`)
        that does so as well. It is called directly, not as an operator of torch: the caller is one.

        Raises ValueError where it cannot take rows of K values.
        """


class Backend(ABC):
    """A GEMM of 8-bit codes. Stateless; safe to share."""

    name: ClassVar[str]
    sparse: ClassVar[bool]
    """True: `pack` takes lifted 2:4 weights and `gemm` lifted activations."""
    emulation: ClassVar[bool]
    """True: its time says nothing about tensor cores."""
    device: ClassVar[Literal["cpu", "cuda"]]
    """Where its operands lie."""
    activations: Activations
    scaled_only: ClassVar[bool] = False
    """True: there is `gemm_scaled` and no `gemm`."""
    exact_epilogue: ClassVar[bool] = True
    """False: `gemm_scaled` applies scales and bias in another order than `reference.dequantise_bias`."""

    @property
    def form(self) -> str:
        """Backends of one form pack a weight alike: dense ones keep its codes as they are."""
        return self.name if self.sparse else "codes"

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
        """out[m, n] = sum_k x[m, k] w[n, k]: codes [M, K] -> `output(dtype)` [M, N], all overwritten."""

    def output(self, dtype: DType) -> torch.dtype:
        """Type that `gemm` writes. INT8: int32, the narrowest that keeps every sum exact."""
        return reference.accumulator(dtype)

    def accumulation_error(self, dtype: DType, terms: int) -> tuple[float, str]:
        """c of |sum - exact| <= c * sum|a||w| for sums of `terms` products, and its formula in words.

        Default: float32 additions in any order (`verify.gamma`). Not used for INT8, whose sums are exact.
        """
        return verify.gamma(terms), f"gamma({terms})"

    def norm_error(self, dtype: DType) -> float:
        """Largest ||out - exact|| / ||exact|| of a whole output on random data; infinite where the bound is sharp."""
        return float("inf")

    def scaled_algorithms(self, dtype: DType, m: int, n: int, k: int, bias: bool) -> tuple[Algorithm, ...]:
        """Candidates of `gemm_scaled`; empty where scales cannot be fused."""
        return ()

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
        """The whole epilogue in the GEMM: out bfloat16 [M, N]; scales float32 [M, 1] and [N, 1], bias bfloat16 [N]."""
        raise NotImplementedError(f"{self.name} fuses no scales")

    @abstractmethod
    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        """Name of the code that `gemm` runs, for the records."""


ACTIVATION_SOURCES = {
    "cpu": ("cpu_activations", "e4m3"),
    "triton": ("triton_activations", "triton_dequantise", "triton_launch"),
    "cpu_bitnet": ("bitnet_reference", "reference"),
    "triton_bitnet": ("triton_bitnet", "triton_bf16", "triton_lift", "triton_activations", "triton_launch"),
}
"""Modules of this folder that hold the kernels of a family of activations."""


def own_revision(family: str) -> str:
    """Hash over the kernels of ours that a family runs, source or library: what was tuned with others is tuned again.

    Empty for a library's GEMM.
    """
    if family == "fused":
        from slidesparse.kernels import fused_library

        return fused_library.revision()
    return source_hash(*ACTIVATION_SOURCES[family]) if family in ACTIVATION_SOURCES else ""


def source_hash(*modules: str) -> str:
    """8 hex digits over the source files of modules of this folder."""
    folder = Path(__file__).parent
    content = b"".join((folder / f"{module}.py").read_bytes() for module in modules)
    return hashlib.sha256(content).hexdigest()[:8]


def named(algorithms: tuple[Algorithm, ...], name: str) -> Algorithm | None:
    """The algorithm of that name, if it is among the candidates."""
    return next((algorithm for algorithm in algorithms if algorithm.name == name), None)


def require(name: str, machine: Machine, dtype: DType) -> None:
    """Raises UnsupportedHere where this machine cannot run a backend of a profile on `dtype`.

    Those that only an engine has run where any GPU backend of ours does: without FP8 tensor cores an engine would
    compute something else (weights alone in FP8), which is no like for like.
    """
    if name in (STOCK, AUTO):
        from slidesparse.kernels import gpu

        gpu.require(name, machine, dtype)
    else:
        backend(name).require(machine, dtype)


@lru_cache(maxsize=8)
def backend(name: str) -> Backend:
    """The backend of that name. Raises UnsupportedHere for those that this version does not have."""
    if name == "cpu_dense":
        from slidesparse.kernels.cpu_dense import CpuDense

        return CpuDense()
    if name == "cpu_sparse":
        from slidesparse.kernels.cpu_sparse import CpuSparse

        return CpuSparse()
    if name == "cublaslt":
        from slidesparse.kernels.cublaslt import CublasLt

        return CublasLt()
    if name == "cusparselt":
        from slidesparse.kernels.cusparselt import CusparseLt

        return CusparseLt()
    if name == "cutlass":
        from slidesparse.kernels.cutlass import Cutlass

        return Cutlass()
    if name == "fused":
        from slidesparse.kernels.fused import Fused

        return Fused()
    raise UnsupportedHere(
        f"backend {name} is not in this version, which has cublaslt, cusparselt, cutlass, fused, cpu_dense, cpu_sparse"
    )
