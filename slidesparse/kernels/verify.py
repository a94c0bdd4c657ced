"""Checks of kernels against the reference: what is compared, with which bound, and what was seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.rows import Verified

FLOAT32_UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""
BFLOAT16_UNIT = 2.0**-8
POISON_INT32 = 0x5A5A5A5A
"""Outputs are filled with this (float types: NaN) before a check, so that what a kernel leaves out is seen."""
_ORDER: tuple[Verified, ...] = ("failed", "not_checked", "within_bound", "exact")


@dataclass(frozen=True)
class Check:
    """The `verified` and `check` columns of a row."""

    verified: Verified
    text: str

    @property
    def ok(self) -> bool:
        return self.verified in ("exact", "within_bound")


def worst(checks: Iterable[Check]) -> Check:
    """The least trusted of several checks (of two equal ones the first)."""
    return min(checks, key=lambda check: _ORDER.index(check.verified))


def poison(out: torch.Tensor) -> torch.Tensor:
    """Fill an output so that untouched elements fail every check."""
    return out.fill_(float("nan") if out.dtype.is_floating_point else POISON_INT32)


def gamma(terms: int) -> float:
    """Bound of n float32 roundings: n u / (1 - n u) (Higham, Accuracy and Stability, section 3.1)."""
    return terms * FLOAT32_UNIT / (1 - terms * FLOAT32_UNIT)


def check_gemm(
    out: torch.Tensor, exact: torch.Tensor, magnitude: torch.Tensor | None, dtype: DType, terms: int
) -> Check:
    """Compare an accumulator [M, N] with the exact product (float64 [M, N]).

    INT8: every element equal. FP8: products of two e4m3 numbers are exact in float32, so a sum of `terms` of them,
    in any order, is off by at most gamma(terms) * sum|a||w|; `magnitude` is that sum (`reference.magnitude`).
    """
    if dtype is DType.INT8:
        return check_same(out, exact, "exact integer product")
    assert magnitude is not None
    error = (out.double() - exact).abs()
    bound = gamma(terms) * magnitude
    good = error <= bound  # false for NaN
    if not bool(good.all()):
        m, n = _first(~good)
        return Check(
            "failed",
            f"{int((~good).sum())} of {good.numel()} elements out of bound; [{m}, {n}] is {out[m, n].item():.8g}, "
            f"exact {exact[m, n].item():.8g}, allowed +-{bound[m, n].item():.3g}",
        )
    share = float((error / bound.clamp(min=torch.finfo(torch.float64).tiny)).max())
    return Check("within_bound", f"float64 product, error at most {share:.2g} of gamma({terms})*sum|a||w|")


def check_same(out: torch.Tensor, expected: torch.Tensor, what: str) -> Check:
    """Every element equal (NaN equals NaN; compared as values, in the type of `expected`)."""
    if out.shape != expected.shape:
        return Check("failed", f"{what}: shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
    if out.dtype.itemsize == 1:
        different = out.view(torch.uint8) != expected.view(torch.uint8)
    else:
        result = out.to(expected.dtype)
        different = (result != expected) & ~(result.isnan() & expected.isnan())
    count = int(different.sum())
    if count:
        place = _first(different)
        got, wanted = out[place].float().item(), expected[place].float().item()
        return Check(
            "failed", f"{what}: {count} of {different.numel()} differ; {list(place)} is {got:g}, expected {wanted:g}"
        )
    return Check("exact", f"equal to {what}")


def check_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: DType,
    terms: int,
) -> Check:
    """A whole layer: x [M, K] -> y [M, N] against unlifted codes [N, K], scale float32 [N, 1].

    INT8: equal to the reference bit for bit. FP8: within the accumulation bound of `check_gemm`, plus 4 float32
    roundings of the epilogue and the final rounding to y's type.
    """
    if dtype is DType.INT8:
        return check_same(y, reference.linear(x, codes, scale, bias, dtype, y.dtype), "integer reference layer")
    a, token = reference.quantise(x, dtype)
    scales = token.double() * scale.double().reshape(1, -1)
    product = reference.gemm(a, codes) * scales
    exact = product if bias is None else product + bias.double()
    unit = BFLOAT16_UNIT if y.dtype is torch.bfloat16 else FLOAT32_UNIT
    bound = gamma(terms + 4) * reference.magnitude(a, codes) * scales + (unit + gamma(4)) * exact.abs()
    if bias is not None:
        bound += gamma(4) * bias.double().abs()
    error = (y.double() - exact).abs()
    good = (error <= bound * (1 + unit)) | (exact.isnan() & y.isnan())
    if not bool(good.all()):
        m, n = _first(~good)
        return Check(
            "failed",
            f"layer output [{m}, {n}] is {y[m, n].item():.6g}, float64 reference {exact[m, n].item():.6g}, "
            f"allowed +-{bound[m, n].item():.3g}; {int((~good).sum())} of {good.numel()} such",
        )
    return Check("within_bound", "float64 reference layer, accumulation bound and one final rounding")


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
