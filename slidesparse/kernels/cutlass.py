"""Backend `cutlass`: dense GEMMs by vLLM's own CUTLASS kernel, the one that its stock INT8 and FP8 layers run.

    y[m, n] = bf16(scale_token[m] * (scale_channel[n] * float32(acc[m, n])) + bias[n])

Scales and bias are always in its epilogue (with a bias the outer product and the sum are one fused operation), so that
there is no GEMM alone to tune or to time: it runs in whole layers. INT8 sums are exact in int32; float32 products in
another order than the reference's may fall to the other side of a tie when they are rounded, so its INT8 layers are
checked as `verify.check_linear(exact=False)` does. vLLM chooses tiles by M, N and K itself: one algorithm here.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable
from functools import lru_cache

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import gpu
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.kernels.gpu import LibraryBackend
from slidesparse.machine import Machine

ALIGNMENT = 16
"""N and K must be multiples of it (16-byte rows); M may be anything."""
INT8_BEFORE = (10, 0)
"""vLLM compiles no INT8 kernel for Blackwell."""
ScaledProduct = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], None
]
"""(out!, a [M, K], b [K, N] by columns, scale_a [M, 1], scale_b [N, 1], bias [N])."""


class Cutlass(LibraryBackend):
    """`Weight.data`: codes [N, K] as they are; the kernel takes their transposed view."""

    name = "cutlass"
    sparse = False
    scaled_only = True
    exact_epilogue = False

    def require(self, machine: Machine, dtype: DType) -> None:
        gpu.require(self.name, machine, dtype)
        assert machine.gpu is not None
        if dtype is DType.INT8 and machine.gpu.compute_capability >= INT8_BEFORE:
            raise UnsupportedHere("backend cutlass: vLLM has no INT8 kernel for compute capability 10.0 and above")
        _scaled_product()

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        """Raises UnsupportedHere: there is no GEMM without scales."""
        raise UnsupportedHere("backend cutlass has no GEMM without scales: it runs in whole layers only")

    def scaled_algorithms(self, dtype: DType, m: int, n: int, k: int, bias: bool) -> tuple[Algorithm, ...]:
        if not dtype.quantised or n % ALIGNMENT or k % ALIGNMENT:
            return ()
        return (Algorithm(0, "cutlass_scaled_mm", f"vLLM {_version()}"),)

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        n, k = codes.shape
        on_gpu = codes.to(self.device).contiguous()
        return Weight(n, k, dtype, on_gpu, on_gpu.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        """Raises UnsupportedHere, as `algorithms` does."""
        raise UnsupportedHere("backend cutlass has no GEMM without scales: it runs in whole layers only")

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
        _scaled_product()(out, x, weight.data.t(), scale_token, scale_channel, bias)
        return out

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        return f"{self.name} {algorithm.name} ({algorithm.config}), {dtype.value} -> bfloat16"


def _version() -> str:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


@lru_cache(maxsize=1)
def _scaled_product() -> ScaledProduct:
    """vLLM's operator. Raises UnsupportedHere where its compiled extension is not there."""
    try:
        importlib.import_module("vllm._custom_ops")  # loads the extensions; where it cannot, it only logs
        found: ScaledProduct = torch.ops._C.cutlass_scaled_mm.default
    except (ImportError, OSError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UnsupportedHere(
            f"backend cutlass needs vLLM with its compiled extension in this environment ({reason}); install vllm, or "
            f"choose cublaslt"
        ) from None
    return found
