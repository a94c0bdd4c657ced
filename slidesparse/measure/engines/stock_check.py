"""A linear of vLLM's own kernels against the reference, within the roundings that its formula has and ours has not.

Stock kernels quantise by multiplying with the reciprocal of a token's scale, where the reference divides: a quotient
that lies within those roundings of the middle between two codes may get either. They apply the scales in another order.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.kernels.backend import backend
from slidesparse.kernels.verify import BFLOAT16_UNIT, Check, gamma

QUOTIENT_ROUNDINGS = 6
"""float32 roundings of both ways to a quotient together: scale, reciprocal and product; scale and quotient."""
HARDWARE = "cublaslt"
"""Whose bounds of the accumulation hold for FP8: the tensor cores, in whichever library's kernel."""


def check_stock(x: torch.Tensor, y: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor, dtype: DType) -> Check:
    """x bfloat16 [M, K] -> y bfloat16 [M, N], no bias, against unlifted codes [N, K] and scale float32 [N, 1].

    |y - exact| <= ties + accumulation + 4 float32 roundings + the last one to bfloat16, where ties is the sum over the
    ambiguous codes of a token of the distance to the neighbouring code, times |w| and the scales. The bound of FP8's
    accumulation is wide; its relative L2 error must be within `norm_error` as well.
    """
    a, token = reference.quantise(x, dtype)
    scales = token.double() * scale.double().reshape(1, -1)
    exact = reference.gemm(a, codes) * scales
    error = 0.0 if dtype is DType.INT8 else backend(HARDWARE).accumulation_error(dtype, x.shape[1])[0]
    slack = error * reference.magnitude(a, codes) * scales
    slack += _ambiguous(x, token, dtype) @ codes.double().abs().T * scales
    bound = slack + (BFLOAT16_UNIT + gamma(4)) * (exact.abs() + slack)
    seen = (y.double() - exact).abs()
    good = seen <= bound  # false for NaN
    if not bool(good.all()):
        m, n = (int(i) for i in (~good).nonzero()[0])
        return Check(
            "failed",
            f"layer output [{m}, {n}] is {y[m, n].item():.6g}, float64 reference {exact[m, n].item():.6g}, "
            f"allowed +-{bound[m, n].item():.3g}; {int((~good).sum())} of {good.numel()} such",
        )
    allowed = backend(HARDWARE).norm_error(dtype)
    distance = float((y.double() - exact).norm() / exact.norm())
    if distance > allowed:
        return Check("failed", f"layer output: relative L2 error {distance:.3g}, allowed {allowed:.3g}")
    return Check("within_bound", "vLLM's own kernel: float64 reference layer, ties of its quantisation and roundings")


def _ambiguous(x: torch.Tensor, token: torch.Tensor, dtype: DType) -> torch.Tensor:
    """float64 [M, K]: distance to the neighbouring code where a quotient may get either, else 0."""
    quotient = x.double() / token.double()
    moved = quotient.abs() * gamma(QUOTIENT_ROUNDINGS)
    low, high = (_codes(quotient + side * moved, dtype) for side in (-1, 1))
    return (high - low).abs()


def _codes(quotient: torch.Tensor, dtype: DType) -> torch.Tensor:
    """The code's value, float64."""
    clamped = quotient.clamp(-dtype.limit, dtype.limit)
    return clamped.round() if dtype is DType.INT8 else clamped.float().to(dtype.torch).double()
