"""The activation kernels of a sparse linear layer on a GPU: quantise (+ lift), dequantise + bias, in Triton.

quantise (+ lift): x [M, K] -> codes [M, K'], scale float32 [M, 1]; `reference.quantise` and `reference.lift`
bit for bit, but for the sign of FP8 zeros.

    Layout. A row is read as 32-bit pairs of 16-bit values. Lifted window w of 4 codes is pair p and p + 1 with
    p = (w // windows) * (L / 2) + w % windows: a duplicated column is read again from the L1 cache, not from memory,
    and each window is stored as one 32-bit word, four neighbouring words a thread as one 16-byte store.
    Division. q = x * (1 / s) and one correction q + (x - q * s) * (1 / s) give the correctly rounded quotient
    (Markstein, IBM J. Res. Dev. 34, 1990) in 3 operations; IEEE division in software takes about 10.
    Rounding. Adding 1.5 * 2**23 rounds to the nearest even integer and leaves it in the low byte of the float.
    Packing. The kernel is bound by instructions, not by memory, unless four codes become a word in 3 of them: byte
    permutes for INT8, the paired e4m3 conversion for FP8. Measured on an H200, M = 16384, K = 2560, 2:8: 50.6 us
    with shifts and masks, 40.8 us so; the bytes alone take 34.7 us at the copy bandwidth of that run.
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


QUANTISE_LAUNCHES = tuple(
    Launch(words, warps) for words, warps in ((128, 1), (256, 1), (512, 2), (512, 4), (1024, 4), (1024, 8))
)
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
            x.view(torch.int32), codes.view(torch.int32), scale,
            PAIRS=k // 2, USED=used, OUT=width // WINDOW, WINDOWS=windows, PAIRS_PER_GROUP=stride,
            FP8=dtype is DType.FP8, LIMIT=dtype.limit, FLOOR=SCALE_FLOOR, PTX=not triton.knobs.runtime.interpret,
            WORDS=launch.words, num_warps=launch.warps,
        )  # fmt: skip
    return codes, scale


@triton.jit
def _quantise_lift(
    x_ptr, codes_ptr, scale_ptr,
    PAIRS: tl.constexpr, USED: tl.constexpr, OUT: tl.constexpr, PTX: tl.constexpr, WINDOWS: tl.constexpr,
    PAIRS_PER_GROUP: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * PAIRS
    codes_ptr += row * OUT
    lane = tl.arange(0, WORDS)

    largest = tl.zeros((WORDS,), tl.int32)
    # Unrolled, because the loads of all steps are then under way together.
    for step in tl.static_range(0, (PAIRS + WORDS - 1) // WORDS):
        index = step * WORDS + lane
        pair = tl.load(x_ptr + index, mask=index < PAIRS, other=0)
        largest = tl.maximum(largest, tl.maximum(pair & 0x7FFF, (pair >> 16) & 0x7FFF))
    top = tl.max(largest, axis=0)
    finite = top < NOT_FINITE
    amax = (tl.where(finite, top, 0) << 16).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, LIMIT), FLOOR)
    inverse = tl.div_rn(1.0, scale)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    keep = tl.where(finite, -1, 0)

    for step in tl.static_range(0, (OUT + WORDS - 1) // WORDS):
        window = step * WORDS + lane
        pair = (window // WINDOWS) * PAIRS_PER_GROUP + window % WINDOWS
        left = tl.load(x_ptr + pair, mask=(window < USED) & (pair < PAIRS), other=0) & keep
        right = tl.load(x_ptr + pair + 1, mask=(window < USED) & (pair + 1 < PAIRS), other=0) & keep
        word = _pack(
            _divide(left << 16, scale, inverse),
            _divide(left & -65536, scale, inverse),
            _divide(right << 16, scale, inverse),
            _divide(right & -65536, scale, inverse),
            FP8, LIMIT, PTX,
        )  # fmt: skip
        tl.store(codes_ptr + window, word, mask=window < OUT)


@triton.jit
def _divide(bits, scale, inverse):
    """Float32 bits / scale, correctly rounded."""
    x = bits.to(tl.float32, bitcast=True)
    q = x * inverse
    return tl.fma(tl.fma(-q, scale, x), inverse, q)


@triton.jit
def _pack(a, b, c, d, FP8: tl.constexpr, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """Four quotients -> four codes in one int32, `a` in its low byte."""
    if FP8 and PTX:
        # NOTES: joining the halves by `mov.b32 $0, {low, high}` gave constant high halves in some unrolled kernels
        # (ptxas of CUDA 12.8 as in Triton 3.6, sm_90); widening both and permuting does not.
        word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 x, y;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            cvt.u32.u16 x, low;
            cvt.u32.u16 y, high;
            prmt.b32 $0, x, y, 0x5410;
            }""",
            "=r,f,f,f,f", [a, b, c, d], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    elif FP8:
        word = _e4m3(a, LIMIT) | _e4m3(b, LIMIT) << 8 | _e4m3(c, LIMIT) << 16 | _e4m3(d, LIMIT) << 24
    elif PTX:
        word = tl.inline_asm_elementwise(
            """{
            .reg .b32 low, high;
            prmt.b32 low, $1, $2, 0x0040;
            prmt.b32 high, $3, $4, 0x0040;
            prmt.b32 $0, low, high, 0x5410;
            }""",
            "=r,r,r,r,r", [_rounded(a), _rounded(b), _rounded(c), _rounded(d)],
            dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = _rounded(a) & 0xFF | (_rounded(b) & 0xFF) << 8 | (_rounded(c) & 0xFF) << 16 | _rounded(d) << 24
    return word


@triton.jit
def _rounded(q):
    """Nearest even integer in the low byte. |q| <= 127 but for the rounding of the scale, which this takes away."""
    return (q + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def _e4m3(q, LIMIT: tl.constexpr):
    return tl.clamp(q, -LIMIT, LIMIT).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)


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
