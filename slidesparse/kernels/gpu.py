"""What the library backends of NVIDIA GPUs share: what they need, what they write, how exactly tensor cores add."""

from __future__ import annotations

import importlib.util

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import gemm_library, verify
from slidesparse.kernels.backend import Activations, Algorithm, Backend
from slidesparse.kernels.gpu_activations import TritonActivations
from slidesparse.machine import Machine
from slidesparse.pattern import KEPT, WINDOW

FP8_CAPABILITY = (8, 9)
SPARSE_CAPABILITY = (8, 0)
FP8_STEP = 32
FP8_STEP_ERROR = 2.0**-10
"""Bound of what one step of 32 products loses, relative to sum|a||w|: stated, not derived. FP8 tensor cores up to
Hopper keep about 13 bits below the largest term and cut the rest (DeepSeek-V3 report, arXiv 2412.19437, section 3.3.2).
Seen on an H200 where all products are positive, the worst case: 3 * 2^-13 a step. That is far more than random data
needs, so two sharper checks stand beside it: `FP8_NORM_ERROR`, and products of signs, whose sums are exact."""
FP8_NORM_ERROR = 2.0**-7
"""Largest relative L2 error of a whole output on random data (rounding to bf16 alone: about 0.0017)."""


def require(name: str, machine: Machine, dtype: DType) -> None:
    """Raises UnsupportedHere where this machine has no GPU, or one without what `dtype` needs."""
    if machine.gpu is None:
        raise UnsupportedHere(f"backend {name} needs an NVIDIA GPU, and torch sees none")
    capability = machine.gpu.compute_capability
    text = "{}.{}".format(*capability)
    if capability < SPARSE_CAPABILITY:
        raise UnsupportedHere(f"backend {name} needs compute capability 8.0 (Ampere), this is {text}")
    if dtype is DType.FP8 and capability < FP8_CAPABILITY:
        raise UnsupportedHere(f"FP8E4M3 needs compute capability 8.9 (Ada), this is {text}")
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedHere(f"backend {name} needs triton for the kernels around its GEMM; install triton")


def output(dtype: DType) -> torch.dtype:
    """Type that a library GEMM writes: INT8 int32 (bf16 would round the sum), FP8 bf16, 16-bit types their own."""
    return {DType.INT8: torch.int32, DType.FP8: torch.bfloat16}.get(dtype, dtype.torch)


class LibraryBackend(Backend):
    """What `cublaslt` and `cusparselt` have in common."""

    emulation = False
    device = "cuda"
    activations: Activations = TritonActivations()

    def require(self, machine: Machine, dtype: DType) -> None:
        require(self.name, machine, dtype)
        gemm_library.load()

    def output(self, dtype: DType) -> torch.dtype:
        return output(dtype)

    def accumulation_error(self, dtype: DType, terms: int) -> tuple[float, str]:
        """Only kept positions are added. 16-bit types: float32 sums that may cut instead of round: twice gamma."""
        if self.sparse:
            terms = terms * KEPT // WINDOW
        if dtype is DType.FP8:
            steps = -(-terms // FP8_STEP)
            return steps * FP8_STEP_ERROR, f"{steps}*2^-10"
        return 2 * verify.gamma(terms), f"2*gamma({terms})"

    def norm_error(self, dtype: DType) -> float:
        return FP8_NORM_ERROR if dtype is DType.FP8 else float("inf")

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        written = str(output(dtype)).removeprefix("torch.")
        return f"{self.name} {algorithm.name} ({algorithm.config}), {dtype.value} -> {written}"
