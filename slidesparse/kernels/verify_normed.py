"""Checks of the fused BitNet kernels: every row as the reference computes it, but for r = 1 / rms.

A kernel sums a row's squares in another order than torch and takes its root in another way, so that its r may be
another float32; everything behind r is fixed to the bit. So each row must be what the reference gives for one r within
STEPS of torch's. That says more than the bounds in `bitnet_reference`, which hold for each code by itself: with them,
every code of a row could be off by one.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import bitnet_reference, verify
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.verify import Check, row_blocks
from slidesparse.pattern import Sparsity

STEPS = 16
"""Neighbouring float32 numbers. In the tests of the kernels no row needed more than 8; the worst case, 2**-17 of r, is
128, and tells wrong kernels from right ones less well."""
MINUS_ZERO = 0x80
"""Of e4m3: the same code as 0 to every product."""


class ExpectedNormed:
    """What a fused operation must give for one set of operands, ready to be compared with many kernels' results.

    x bfloat16 [M, K] ([M, 2 K] before a gate), residual like x (operation `add`) or None, weight [K].
    """

    def __init__(
        self,
        operation: BitNetOperation,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        weight: torch.Tensor,
        eps: float,
        dtype: DType,
        sparsity: Sparsity | None,
    ) -> None:
        self._operation, self._weight, self._dtype, self._sparsity = operation, weight, dtype, sparsity
        if operation == "gate":
            blocks = row_blocks((x.shape[0], x.shape[1]))
            self._t = torch.cat([bitnet_reference.squared_relu_gate(x[rows]) for rows in blocks])
        else:
            self._t = x if residual is None else bitnet_reference.add(x, residual)
        blocks = row_blocks((self._t.shape[0], self._t.shape[1]))
        self._inverse = torch.cat([bitnet_reference.inverse_rms(self._t[rows], eps) for rows in blocks])
        self._codes, self._scale = self._quantised(self._t, self._inverse)

    def check(self, codes: torch.Tensor, scale: torch.Tensor, total: torch.Tensor | None) -> Check:
        """codes [M, K'] (K without a pattern), scale float32 [M, 1], total like x where a residual was added."""
        if self._operation == "add":
            assert total is not None
            same_total = verify.check_same(total, self._t, "x + residual")
            if not same_total.ok:
                return same_total
        got = _plain(codes)
        wrong = _different(got, scale, self._codes, self._scale).nonzero().flatten()
        moved, farthest = len(wrong), 0
        for step in sorted(range(-STEPS, STEPS + 1), key=abs)[1:]:
            if not len(wrong):
                break
            inverse = (self._inverse[wrong].view(torch.int32) + step).view(torch.float32)
            expected = self._quantised(self._t[wrong], inverse)
            wrong = wrong[_different(got[wrong], scale[wrong], *expected)]
            farthest = abs(step)
        if len(wrong):
            return Check("failed", self._explain(got, scale, wrong))
        if not moved:
            return Check("exact", "equal to the reference")
        rows = f"{moved} of {len(self._t)} rows"
        return Check("within_bound", f"equal to the reference, {rows} with 1/rms up to {farthest} float32 steps off")

    def _quantised(self, t: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as comparable bytes [M, K'], scale [M, 1]; in blocks of rows, whose float32 temporaries stay small."""
        parts = []
        for rows in row_blocks((t.shape[0], t.shape[1])):
            y = bitnet_reference.normalise(t[rows], inverse[rows], self._weight)
            codes, scale = bitnet_reference.quantise_lift(y, self._dtype, self._sparsity)
            parts.append((_plain(codes), scale))
        return torch.cat([codes for codes, _ in parts]), torch.cat([scale for _, scale in parts])

    def _explain(self, codes: torch.Tensor, scale: torch.Tensor, wrong: torch.Tensor) -> str:
        row = int(wrong[0])
        count = int((codes[row] != self._codes[row]).sum())
        return (
            f"{len(wrong)} of {len(self._t)} rows are the reference's for no 1/rms within {STEPS} float32 steps; row "
            f"{row}: {count} of {codes.shape[1]} codes differ, scale {scale[row].item():.8g}, expected "
            f"{self._scale[row].item():.8g}"
        )


def _plain(codes: torch.Tensor) -> torch.Tensor:
    """Codes as bytes that are equal where the codes are."""
    plain = codes.view(torch.uint8)
    return torch.where(plain == MINUS_ZERO, 0, plain) if codes.dtype == torch.float8_e4m3fn else plain


def _different(
    codes: torch.Tensor, scale: torch.Tensor, expected: torch.Tensor, expected_scale: torch.Tensor
) -> torch.Tensor:
    """Which rows are not the expected ones, bool [M]; codes as `_plain` bytes. NaN scales equal each other."""
    same_scale = (scale == expected_scale) | (scale.isnan() & expected_scale.isnan())
    return (codes != expected).any(dim=1) | ~same_scale.flatten()
