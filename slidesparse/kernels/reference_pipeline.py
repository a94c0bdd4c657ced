"""A yardstick: the activation kernels structured as in the reference implementation. No backend uses them.

What we compare with when we say "the same three-kernel pipeline as the reference implementation" (repository
bcacdwk/vllmbench, commit 92a8ca495): quantise (+ slide), library GEMM, dequantise + bias. The code is ours, its
structure is theirs, so that its speed stands for theirs:

    quantise_slide: outputs filled with zeros (codes) and ones (scale) first, each by its own kernel, the rows padded to
        a multiple of 16; then one program a row, whose first pass finds the largest magnitude in masked blocks of
        16-bit loads, and whose second takes blocks of windows: four masked 16-bit loads a window, each value times the
        inverse scale, clamped, rounded and converted by itself, four codes joined by shifts, one masked 32-bit store.
        Without a pattern the same, values in their places.
    dequantise_bias: two-dimensional blocks, masked on both sides, offsets by strides.

The block sizes are theirs as well: `QUANTISE_LAUNCHES` and `DEQUANTISE_LAUNCHES` are those that their tuning chose most
on an H100; the best of them stands for a tuned table.

What they compute differs from `kernels/reference.py` where theirs does: values are multiplied by limit / amax instead
of divided by the stored scale, so that codes next to a tie may be one step off; the scale, but not its inverse, has a
floor of 1 / (512 * limit); NaN and infinity are not looked for. Offsets are 64-bit, unlike theirs, which overflow at
M=65536, N=37888, and cost no more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from slidesparse.dtypes import DType
from slidesparse.pattern import WINDOW, Sparsity, align

ROW_ALIGNMENT = 16
SMALLEST_AMAX = 1e-12
SCALE_STEPS = 512.0
"""The scale is at least 1 / (limit * 512)."""


@dataclass(frozen=True)
class QuantiseLaunch:
    """block_out: windows a step; block_k: values a step of the first pass."""

    block_out: int
    block_k: int
    warps: int

    def __str__(self) -> str:
        return f"block_out={self.block_out} block_k={self.block_k} warps={self.warps}"


@dataclass(frozen=True)
class DequantiseLaunch:
    block_m: int
    block_n: int
    warps: int

    def __str__(self) -> str:
        return f"block_m={self.block_m} block_n={self.block_n} warps={self.warps}"


QUANTISE_LAUNCHES = (
    QuantiseLaunch(512, 4096, 8),
    QuantiseLaunch(256, 4096, 4),
    QuantiseLaunch(512, 4096, 16),
    QuantiseLaunch(1024, 8192, 16),
)
DEQUANTISE_LAUNCHES = (
    DequantiseLaunch(128, 128, 8),
    DequantiseLaunch(64, 128, 8),
    DequantiseLaunch(128, 64, 4),
    DequantiseLaunch(32, 64, 4),
)


def quantise_slide(
    x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, launch: QuantiseLaunch = QUANTISE_LAUNCHES[0]
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bfloat16 [M, K] contiguous -> codes [M, K'] (K without a pattern), scale float32 [M, 1].

    Views of the first M rows of outputs that are padded to a multiple of 16. Raises ValueError when K is no multiple
    of 4 (2 with a pattern) or x is not contiguous bfloat16.
    """
    m, k = x.shape
    width = k if sparsity is None else sparsity.lifted_k(k)
    if x.dtype != torch.bfloat16 or not x.is_contiguous() or width % WINDOW or k % 2:
        raise ValueError(f"quantise: x must be contiguous bfloat16 [M, K] with K a multiple of 4, not {x.dtype} K={k}")
    padded = align(m, ROW_ALIGNMENT)
    codes = torch.zeros((padded, width), dtype=dtype.torch, device=x.device)
    scale = torch.ones((padded, 1), dtype=torch.float32, device=x.device)
    if m == 0:
        return codes, scale
    if sparsity is None:
        _quantise[(m,)](
            x, codes, scale, k, FP8=dtype is DType.FP8, LIMIT=dtype.limit, STEPS=SCALE_STEPS, SMALLEST=SMALLEST_AMAX,
            BLOCK_K=launch.block_k, num_warps=launch.warps,
        )  # fmt: skip
    else:
        # 2:inf: every pair of columns opens a window, as if groups of 2 had one each.
        group, windows = (2, 1) if sparsity.l is None else (sparsity.l, sparsity.windows_per_group(k))
        _quantise_slide[(m,)](
            x, codes.view(torch.int32), scale, k, width // WINDOW, triton.cdiv(k, group) * windows,
            L=group, WINDOWS=windows, FP8=dtype is DType.FP8, LIMIT=dtype.limit, STEPS=SCALE_STEPS,
            SMALLEST=SMALLEST_AMAX, BLOCK_OUT=launch.block_out, BLOCK_K=launch.block_k, num_warps=launch.warps,
        )  # fmt: skip
    return codes[:m], scale[:m]


@triton.jit
def _inverse_scale(
    x_row, scale_ptr, k, LIMIT: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """First pass over a row; stores its scale."""
    amax = tl.zeros((), tl.float32)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        values = tl.load(x_row + column, mask=column < k, other=0.0).to(tl.float32)
        amax = tl.maximum(amax, tl.max(tl.abs(values)))
    amax = tl.maximum(amax, SMALLEST)
    tl.store(scale_ptr + tl.program_id(0), tl.maximum(amax / LIMIT, 1.0 / (LIMIT * STEPS)))
    return LIMIT / amax


@triton.jit
def _quantise(
    x_ptr, codes_ptr, scale_ptr, k,
    FP8: tl.constexpr, LIMIT: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    inverse = _inverse_scale(x_ptr + row * k, scale_ptr, k, LIMIT, STEPS, SMALLEST, BLOCK_K)
    for start in range(0, k, BLOCK_K):
        column = start + tl.arange(0, BLOCK_K)
        value = tl.load(x_ptr + row * k + column, mask=column < k, other=0.0).to(tl.float32) * inverse
        if FP8:
            code = tl.clamp(value, -LIMIT, LIMIT).to(tl.float8e4nv)
        else:
            code = tl.clamp(_nearest(value), -LIMIT - 1, LIMIT).to(tl.int8)
        tl.store(codes_ptr + row * k + column, code, mask=column < k)


@triton.jit
def _quantise_slide(
    x_ptr, codes_ptr, scale_ptr, k, out_words, windows,
    L: tl.constexpr, WINDOWS: tl.constexpr, FP8: tl.constexpr, LIMIT: tl.constexpr, STEPS: tl.constexpr,
    SMALLEST: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * k
    inverse = _inverse_scale(x_row, scale_ptr, k, LIMIT, STEPS, SMALLEST, BLOCK_K)
    for start in range(0, windows, BLOCK_OUT):
        window = start + tl.arange(0, BLOCK_OUT)
        inside = window < windows
        column = window // WINDOWS * L + window % WINDOWS * 2
        a = _code(x_row, column, inside, k, inverse, FP8, LIMIT)
        b = _code(x_row, column + 1, inside, k, inverse, FP8, LIMIT)
        c = _code(x_row, column + 2, inside, k, inverse, FP8, LIMIT)
        d = _code(x_row, column + 3, inside, k, inverse, FP8, LIMIT)
        tl.store(codes_ptr + row * out_words + window, a | b << 8 | c << 16 | d << 24, mask=inside)


@triton.jit
def _code(x_row, column, inside, k, inverse, FP8: tl.constexpr, LIMIT: tl.constexpr):
    """The byte of one value in an int32."""
    value = tl.load(x_row + column, mask=inside & (column < k), other=0.0).to(tl.float32) * inverse
    if FP8:
        code = tl.clamp(value, -LIMIT, LIMIT).to(tl.float8e4nv).to(tl.int8, bitcast=True).to(tl.int32)
    else:
        code = tl.clamp(_nearest(value), -LIMIT - 1, LIMIT).to(tl.int32)
    return code & 0xFF


@triton.jit
def _nearest(value):
    """Nearest even integer as a float, |value| below 2**22."""
    # 1.5 * 2**23: a float32 of this size has no fraction bits.
    ROUND: tl.constexpr = 12582912.0
    return (value + ROUND) - ROUND


def dequantise_bias(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor,
    launch: DequantiseLaunch = DEQUANTISE_LAUNCHES[0],
) -> torch.Tensor:
    """acc [M, N] int32, float32 or bfloat16, scales float32 [M, 1] and [N, 1], bias bfloat16 [N] -> bfloat16 [M, N].

    The bias is not optional: theirs adds zeros where a layer has none.
    """
    m, n = acc.shape
    out = torch.empty((m, n), dtype=torch.bfloat16, device=acc.device)
    if m:
        grid = (triton.cdiv(m, launch.block_m), triton.cdiv(n, launch.block_n))
        _dequantise_bias[grid](
            acc, scale_token, scale_channel, bias, out, m, n, *acc.stride(), *out.stride(),
            BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, num_warps=launch.warps,
        )  # fmt: skip
    return out


@triton.jit
def _dequantise_bias(
    acc_ptr, token_ptr, channel_ptr, bias_ptr, out_ptr, m, n, acc_row, acc_column, out_row, out_column,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (row < m)[:, None] & (column < n)[None, :]
    token = tl.load(token_ptr + row, mask=row < m, other=1.0)
    channel = tl.load(channel_ptr + column, mask=column < n, other=1.0)
    bias = tl.load(bias_ptr + column, mask=column < n, other=0.0).to(tl.float32)
    acc = tl.load(acc_ptr + row[:, None] * acc_row + column[None, :] * acc_column, mask=inside, other=0)
    y = acc.to(tl.float32) * token[:, None] * channel[None, :] + bias[None, :]
    tl.store(out_ptr + row[:, None] * out_row + column[None, :] * out_column, y.to(tl.bfloat16), mask=inside)
