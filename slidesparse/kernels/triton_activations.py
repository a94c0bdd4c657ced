"""The activation kernels of a sparse linear layer on a GPU: quantise (+ lift), dequantise + bias, in Triton.

quantise (+ lift): x [M, K] -> codes [M, K'], scale float32 [M, 1]; `reference.quantise` and `reference.lift`
bit for bit, but that a negative zero becomes zero.

    Layout. A row is read as 32-bit pairs of 16-bit values. Lifted window w of 4 codes is pair p and p + 1 with
    p = (w // windows) * (L / 2) + w % windows: a duplicated column is read again from the L1 cache, not from memory,
    and each window is stored as one 32-bit word, four neighbouring words a thread as one 16-byte store.
    Division. q = x * (1 / s) and one correction q + (x - q * s) * (1 / s) give the correctly rounded quotient
    (Markstein, IBM J. Res. Dev. 34, 1990) in 3 operations; IEEE division in software takes about 10.
    Rounding. Adding 1.5 * 2**23 rounds to the nearest even integer and leaves it in the low byte of the float.
    Not finite. The largest magnitude is found on the integer bits, where NaN and infinity are above all numbers:
    such a row gets codes 0 and scale NaN.

dequantise + bias: acc [M, N] -> bf16((acc * scale_token[m]) * scale_channel[n] + bias[n]), one rounding.

All offsets are 64-bit: M * N may exceed 2**31.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from slidesparse.dtypes import DType
from slidesparse.kernels.reference import SCALE_FLOOR
from slidesparse.pattern import WINDOW, Sparsity

ROUND = tl.constexpr(12582912.0)
"""1.5 * 2**23: a float32 of this size has no fraction bits."""
NOT_FINITE = tl.constexpr(0x7F80)
"""bfloat16 magnitude bits of infinity; NaNs are above."""


@dataclass(frozen=True)
class Launch:
    """Tuned parameters of one launch: `words` is 32-bit words (pairs read, windows written) a step."""

    words: int
    warps: int

    def __str__(self) -> str:
        return f"words={self.words} warps={self.warps}"


QUANTISE_LAUNCHES = tuple(Launch(words, warps) for words in (512, 1024, 2048) for warps in (2, 4, 8))
"""Candidates of tuning."""
DEFAULT_LAUNCH = Launch(1024, 4)


def quantise_lift(
    x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, launch: Launch = DEFAULT_LAUNCH
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bfloat16 [M, K] contiguous -> codes [M, K'] (K without a pattern), scale float32 [M, 1].

    Raises ValueError when K is no multiple of 4 (2 with a pattern): pad the layer.
    """
    m, k = x.shape
    if x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(f"quantise: x must be contiguous bfloat16 [M, K], not {x.dtype} with strides {x.stride()}")
    width = k if sparsity is None else sparsity.lifted_k(k)
    if width % WINDOW or k % 2:
        raise ValueError(f"quantise: K={k} must be a multiple of {WINDOW if sparsity is None else 2}")
    codes = torch.empty((m, width), dtype=dtype.torch, device=x.device)
    scale = torch.empty((m, 1), dtype=torch.float32, device=x.device)
    if m:
        # Without a pattern (and for 2:4) windows do not overlap: one window of two pairs a group.
        windows = 1 if sparsity is None else sparsity.windows_per_group(k)
        stride = 2 if sparsity is None or sparsity.l is None else sparsity.l // 2
        used = width // WINDOW if sparsity is None else sparsity.groups(k) * windows
        _quantise_lift[(m,)](
            x.view(torch.int32), codes.view(torch.int32), scale, k // 2, width // WINDOW, used,
            WINDOWS=windows, PAIRS_PER_GROUP=stride, FP8=dtype is DType.FP8, LIMIT=dtype.limit, FLOOR=SCALE_FLOOR,
            WORDS=launch.words, num_warps=launch.warps,
        )  # fmt: skip
    return codes, scale


@triton.jit
def _quantise_lift(
    x_ptr, codes_ptr, scale_ptr, pairs, words, used,
    WINDOWS: tl.constexpr, PAIRS_PER_GROUP: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr,
    FLOOR: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * pairs
    codes_ptr += row * words
    lane = tl.arange(0, WORDS)

    largest = tl.zeros((WORDS,), tl.int32)
    for first in range(0, pairs, WORDS):
        pair = tl.load(x_ptr + first + lane, mask=first + lane < pairs, other=0)
        largest = tl.maximum(largest, tl.maximum(pair & 0x7FFF, (pair >> 16) & 0x7FFF))
    top = tl.max(largest, axis=0)
    finite = top < NOT_FINITE
    amax = (tl.where(finite, top, 0) << 16).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, LIMIT), FLOOR)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    inverse = tl.where(finite, inverse, 0.0)

    for first in range(0, words, WORDS):
        window = first + lane
        pair = (window // WINDOWS) * PAIRS_PER_GROUP + window % WINDOWS
        left = tl.load(x_ptr + pair, mask=(window < used) & (pair < pairs), other=0)
        right = tl.load(x_ptr + pair + 1, mask=(window < used) & (pair + 1 < pairs), other=0)
        left = tl.where(finite, left, 0)
        right = tl.where(finite, right, 0)
        word = _code(left << 16, scale, inverse, FP8, LIMIT)
        word |= _code(left & -65536, scale, inverse, FP8, LIMIT) << 8
        word |= _code(right << 16, scale, inverse, FP8, LIMIT) << 16
        word |= _code(right & -65536, scale, inverse, FP8, LIMIT) << 24
        tl.store(codes_ptr + window, word, mask=window < words)


@triton.jit
def _code(bits, scale, inverse, FP8: tl.constexpr, LIMIT: tl.constexpr):
    """Float32 bits -> one code in the low byte of an int32."""
    x = bits.to(tl.float32, bitcast=True)
    q = x * inverse
    q = tl.fma(tl.fma(-q, scale, x), inverse, q)
    if FP8:
        q = tl.clamp(q, -LIMIT, LIMIT)
        return q.to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    # |q| <= 127 but for the rounding of the scale, which rounding to an integer takes away again.
    return (q + ROUND).to(tl.int32, bitcast=True) & 0xFF


DEQUANTISE_LAUNCHES = tuple(Launch(words, warps) for words in (1024, 2048, 4096) for warps in (4, 8))


def dequantise_bias(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    launch: Launch = DEFAULT_LAUNCH,
) -> torch.Tensor:
    """acc [M, N] int32, float32 or bfloat16, scales float32 [M, 1] and [N, 1], bias [N] -> bfloat16 [M, N]."""
    m, n = acc.shape
    out = torch.empty((m, n), dtype=torch.bfloat16, device=acc.device)
    if m:
        grid = (m, triton.cdiv(n, launch.words))
        _dequantise_bias[grid](
            acc, scale_token, scale_channel, acc if bias is None else bias, out, n,
            BIAS=bias is not None, WORDS=launch.words, num_warps=launch.warps, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@triton.jit
def _dequantise_bias(
    acc_ptr, token_ptr, channel_ptr, bias_ptr, out_ptr, n, BIAS: tl.constexpr, WORDS: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WORDS + tl.arange(0, WORDS)
    inside = column < n
    acc = tl.load(acc_ptr + row * n + column, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
    y = acc * tl.load(token_ptr + row) * tl.load(channel_ptr + column, mask=inside, other=0)
    if BIAS:
        y += tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float32)
    tl.store(out_ptr + row * n + column, y.to(tl.bfloat16), mask=inside)
