"""Checks of kernels against the reference: what is compared, with which bound, and what was seen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.rows import Verified

FLOAT32_UNIT = 2.0**-24
"""Largest relative error of one rounding to float32."""
BFLOAT16_UNIT = 2.0**-8
OUTPUT_UNIT = {torch.bfloat16: BFLOAT16_UNIT, torch.float16: 2.0**-11}
"""One rounding of a product to the GEMM's output type; float32 and int32 hold the accumulator itself."""
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

    @property
    def wrong(self) -> bool:
        """It was compared and differs; what could not be compared is neither `ok` nor `wrong`."""
        return self.verified == "failed"


def worst(checks: Iterable[Check]) -> Check:
    """The least trusted of several checks (of two equal ones the first)."""
    return min(checks, key=lambda check: _ORDER.index(check.verified))


def poison(out: torch.Tensor) -> torch.Tensor:
    """Fill an output so that untouched elements fail every check."""
    return out.fill_(float("nan") if out.dtype.is_floating_point else POISON_INT32)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """For kernels that allocate their outputs: memory that torch hands out holds NaN, or the type's largest integer.

    Else it holds what the kernel before left there, which is the right result if that one computed the same.
    """
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("warn")  # it fills by default, and refuses nothing
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def gamma(terms: int) -> float:
    """Bound of n float32 roundings: n u / (1 - n u) (Higham, Accuracy and Stability, section 3.1)."""
    return terms * FLOAT32_UNIT / (1 - terms * FLOAT32_UNIT)


class Expected:
    """What a GEMM must give for one pair of operands, ready to be compared with the outputs of many algorithms.

    INT8: all elements equal. Others: |out - exact| <= slack + unit(out) * (|exact| + slack), slack = error * sum|a||w|.
    `error` bounds the accumulation (`Backend.accumulation_error`), unit(out) is the rounding to a 16-bit output.
    With `scales` out is bf16((acc * token) * channel): INT8 then equals the reference bit for bit, or, where the
    epilogue has another order of operations (`exact_epilogue` false), slack is that of 4 float32 roundings; the others'
    slack is scaled too and has those 4 roundings beside it. Limits are kept in float32, rounded outwards.
    """

    def __init__(
        self,
        codes: torch.Tensor,
        weight: torch.Tensor,
        dtype: DType,
        error: tuple[float, str],
        out_dtype: torch.dtype,
        norm: float = float("inf"),
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        exact_epilogue: bool = True,
    ) -> None:
        """codes [M, K] and unlifted weight [N, K] on one device; error: factor and its formula in words; norm: largest
        ||out - exact|| / ||exact|| over the whole output; scales: float32 [M, 1] and [N, 1]."""
        integer = dtype is DType.INT8
        self._same, self._norm = integer and (scales is None or exact_epilogue), norm
        self._what = "exact integer product" if scales is None else "integer reference with both scales"
        rounding = {torch.bfloat16: " and one rounding to bf16", torch.float16: " and one rounding to fp16"}
        epilogue = "" if scales is None else " and 4 float32 roundings"
        accumulation = "exact sum" if integer else f"{error[1]}*sum|a||w|"
        self._text = f"{accumulation}{epilogue}{rounding.get(out_dtype, '')}"
        shape, unit = (codes.shape[0], weight.shape[0]), OUTPUT_UNIT.get(out_dtype, 0.0)
        kind = torch.float32 if not self._same else torch.int32 if scales is None else out_dtype
        self._low = torch.empty(shape, dtype=kind, device=codes.device)
        self._high = self._low if self._same else torch.empty_like(self._low)
        for rows in row_blocks(shape):
            exact = reference.gemm(codes[rows], weight)
            if self._same:
                if scales is not None:
                    exact = reference.dequantise_bias(exact, scales[0][rows], scales[1], None, out_dtype)
                self._low[rows] = exact
                continue
            slack = torch.zeros_like(exact) if integer else error[0] * reference.magnitude(codes[rows], weight)
            if scales is not None:
                both = scales[0][rows].double() * scales[1].double().reshape(1, -1)
                exact, slack = exact * both, slack * both
                slack += gamma(4) * (exact.abs() + slack)
            bound = slack + unit * (exact.abs() + slack)
            self._low[rows] = _outwards(exact - bound, -1)
            self._high[rows] = _outwards(exact + bound, +1)

    def holds(self, out: torch.Tensor) -> bool:
        """The verdict of `check` on each element, without its figures and its norm: fast."""
        if self._same:
            return torch.equal(out, self._low)
        blocks = row_blocks((out.shape[0], out.shape[1]))
        return all(bool(((out[rows] >= self._low[rows]) & (out[rows] <= self._high[rows])).all()) for rows in blocks)

    def check(self, out: torch.Tensor) -> Check:
        """Compare an output [M, N]."""
        if self._same:
            return check_same(out, self._low, self._what)
        share, wrong, example = 0.0, 0, ""
        for rows in row_blocks((out.shape[0], out.shape[1])):
            low, high, got = self._low[rows].double(), self._high[rows].double(), out[rows].double()
            good = (got >= low) & (got <= high)  # false for NaN
            if not bool(good.all()):
                m, n = _first(~good)
                middle, half = (high[m, n] + low[m, n]) / 2, (high[m, n] - low[m, n]) / 2
                where = f"[{m + rows.start}, {n}] is {got[m, n].item():.8g}, exact {middle.item():.8g}"
                example = example or f"{where}, allowed +-{half.item():.3g}"
                wrong += int((~good).sum())
                continue
            half = ((high - low) / 2).clamp_(min=torch.finfo(torch.float64).tiny)
            share = max(share, float((got.sub_((high + low) / 2).abs_() / half).max()))
        if wrong:
            return Check("failed", f"{wrong} of {out.numel()} elements out of bound; {example}")
        norm = self._relative_norm(out)
        if norm > self._norm:
            return Check("failed", f"relative L2 error {norm:.3g}, allowed {self._norm:.3g}")
        return Check("within_bound", f"float64 product, error at most {share:.2g} of {self._text}, L2 {norm:.2g}")

    def _relative_norm(self, out: torch.Tensor) -> float:
        """||out - exact|| / ||exact||, with the middle of the limits for the exact product."""
        error, size = 0.0, 0.0
        for rows in row_blocks((out.shape[0], out.shape[1])):
            middle = (self._low[rows].double() + self._high[rows]) / 2
            size += float(torch.linalg.vector_norm(middle)) ** 2
            error += float(torch.linalg.vector_norm(middle.sub_(out[rows]))) ** 2
        return (error / size) ** 0.5 if size else float(error > 0)


def row_blocks(shape: tuple[int, int]) -> Iterator[slice]:
    """Slices of rows whose float64 temporaries stay small."""
    rows = max(1, reference.CHUNK_ELEMENTS // max(shape[1], 1))
    for first in range(0, shape[0], rows):
        yield slice(first, min(first + rows, shape[0]))


def _outwards(limit: torch.Tensor, direction: int) -> torch.Tensor:
    """The nearest float32 on the outer side of a float64 limit."""
    single = limit.float()
    moved = torch.nextafter(single, torch.full_like(single, direction * float("inf")))
    return torch.where(single.double() * direction < limit * direction, moved, single)


def check_same(out: torch.Tensor, expected: torch.Tensor, what: str) -> Check:
    """Every element equal (NaN equals NaN; compared as values, in the type of `expected`)."""
    if out.shape != expected.shape:
        return Check("failed", f"{what}: shape {tuple(out.shape)}, expected {tuple(expected.shape)}")
    if out.dtype.itemsize == 1:
        different = out.view(torch.uint8) != expected.view(torch.uint8)
    else:
        result = out.to(expected.dtype)
        if torch.equal(result, expected):
            return Check("exact", f"equal to {what}")
        different = (result != expected) & ~(result.isnan() & expected.isnan())
    count = int(different.sum())
    if count:
        place = _first(different)
        got, wanted = out[place].float().item(), expected[place].float().item()
        return Check(
            "failed", f"{what}: {count} of {different.numel()} differ; {list(place)} is {got:g}, expected {wanted:g}"
        )
    return Check("exact", f"equal to {what}")


def check_same_codes(codes: torch.Tensor, expected: torch.Tensor, what: str) -> Check:
    """Equal byte for byte, but for the sign of e4m3 zeros: -0 and 0 are one code to every product."""
    if codes.dtype is not torch.float8_e4m3fn or codes.shape != expected.shape:
        return check_same(codes, expected, what)
    got, wanted = codes.view(torch.uint8), expected.view(torch.uint8)
    minus_zero = 0x80
    return check_same(got.where(got != minus_zero, 0), wanted.where(wanted != minus_zero, 0), what)


def check_linear(
    x: torch.Tensor,
    y: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: DType,
    error: float,
    roundings: float = 0.0,
    exact: bool = True,
    norm: float = float("inf"),
) -> Check:
    """A whole layer: x [M, K] -> y [M, N] against unlifted codes [N, K], scale float32 [N, 1]: `check_product`."""
    return check_product(reference.quantise(x, dtype), y, codes, scale, bias, dtype, error, roundings, exact, norm)


def check_product(
    given: tuple[torch.Tensor, torch.Tensor],
    y: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: DType,
    error: float,
    roundings: float = 0.0,
    exact: bool = True,
    norm: float = float("inf"),
) -> Check:
    """A layer from its quantised activations on: given codes [M, K] and their scale float32 [M, 1] -> y [M, N].

    INT8: equal to the reference bit for bit. Where the epilogue has another order of operations (`exact` false, see
    `Backend.exact_epilogue`): one rounding to y's type of a number within 4 float32 roundings of the exact one.
    FP8: within `error` * sum|a||w| of the accumulation, 4 float32 roundings of the epilogue, `roundings` of the
    accumulator on its way (`OUTPUT_UNIT`), and the last one to y's type; and ||y - exact|| within `norm` * ||exact||.
    """
    if dtype is DType.INT8:
        expected = reference.dequantise_bias(reference.gemm(given[0], codes), given[1], scale, bias, y.dtype)
        same = check_same(y, expected, "integer reference layer")
        return same if exact or same.ok else _check_rounded_once(given, y, codes, scale, bias)
    a, token = given
    scales = token.double() * scale.double().reshape(1, -1)
    product = reference.gemm(a, codes) * scales
    whole = product if bias is None else product + bias.double()
    unit = BFLOAT16_UNIT if y.dtype is torch.bfloat16 else FLOAT32_UNIT
    slack = (error + gamma(4)) * reference.magnitude(a, codes) * scales
    bound = slack + roundings * (product.abs() + slack) + (unit + gamma(4)) * whole.abs()
    if bias is not None:
        bound += gamma(4) * bias.double().abs()
    seen = (y.double() - whole).abs()
    good = (seen <= bound * (1 + unit)) | (whole.isnan() & y.isnan())
    if not bool(good.all()):
        m, n = _first(~good)
        return Check(
            "failed",
            f"layer output [{m}, {n}] is {y[m, n].item():.6g}, float64 reference {whole[m, n].item():.6g}, "
            f"allowed +-{bound[m, n].item():.3g}; {int((~good).sum())} of {good.numel()} such",
        )
    distance = float((y.double() - whole).nan_to_num().norm() / whole.nan_to_num().norm())
    if distance > norm:
        return Check("failed", f"layer output: relative L2 error {distance:.3g}, allowed {norm:.3g}")
    return Check("within_bound", "float64 reference layer, accumulation bound and one final rounding")


def _check_rounded_once(
    given: tuple[torch.Tensor, torch.Tensor],
    y: torch.Tensor,
    codes: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> Check:
    """INT8, y bfloat16: the scales and the bias in float32 in any order, then one rounding."""
    a, token = given
    product = reference.gemm(a, codes) * token.double() * scale.double().reshape(1, -1)
    added = torch.zeros(1, dtype=torch.float64, device=y.device) if bias is None else bias.double()
    slack = gamma(4) * (product.abs() + added.abs())
    exact = product + added
    low, high = (_outwards(exact + side * slack, side).to(y.dtype) for side in (-1, 1))  # rounding keeps the order
    good = ((y >= low) & (y <= high)) | (exact.isnan() & y.isnan())
    if not bool(good.all()):
        m, n = _first(~good)
        return Check(
            "failed",
            f"layer output [{m}, {n}] is {y[m, n].item():.6g}, exact {exact[m, n].item():.6g}; "
            f"{int((~good).sum())} of {good.numel()} are more than one rounding from it",
        )
    return Check("within_bound", "integer reference layer, scales in any order and one final rounding")


def _first(mask: torch.Tensor) -> tuple[int, ...]:
    return tuple(int(i) for i in mask.nonzero()[0])
