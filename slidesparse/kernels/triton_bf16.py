"""Arithmetic on pairs of bfloat16 in 32-bit words, device functions in Triton: every result is rounded once, to nearest
even, as torch rounds it.

A product or sum by `fma.bf16x2` (compute capability 8.0 on) is exact before its one rounding. torch goes through
float32, which changes nothing: the product of two bfloat16 is a float32; so is their sum, unless one of them is below
2**-16 of the other, and then both ways give the larger one. (Products below 2**-126 may be rounded twice by torch.)
Triton's interpreter has no PTX and cuts where it should round: there the rounding is spelt out.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floats(pair):
    """The low and the high value of a pair, float32."""
    return (pair << 16).to(tl.float32, bitcast=True), (pair & -65536).to(tl.float32, bitcast=True)


@triton.jit
def rounded(low, high, PTX: tl.constexpr):
    """Two float32 -> a pair."""
    if PTX:
        pair = tl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,f,f", [low, high], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        pair = _rounded_bits(low) | _rounded_bits(high) << 16
    return pair


@triton.jit
def _rounded_bits(x):
    bits = x.to(tl.int32, bitcast=True)
    nearest_even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, nearest_even, 0x7FFF) & 0xFFFF


@triton.jit
def product(a, b, PTX: tl.constexpr):
    """a * b of pairs."""
    if PTX:
        # Adding -0 keeps the sign of a zero.
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0x80008000; fma.rn.bf16x2 $0, $1, $2, zero; }",
            "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a_low, a_high = floats(a)
        b_low, b_high = floats(b)
        pair = rounded(a_low * b_low, a_high * b_high, PTX)
    return pair


@triton.jit
def total(a, b, PTX: tl.constexpr):
    """a + b of pairs."""
    if PTX:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 one; mov.b32 one, 0x3f803f80; fma.rn.bf16x2 $0, $1, one, $2; }",
            "=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        a_low, a_high = floats(a)
        b_low, b_high = floats(b)
        pair = rounded(a_low + b_low, a_high + b_high, PTX)
    return pair


@triton.jit
def positive(a, PTX: tl.constexpr):
    """max(a, 0) of a pair; NaN stays NaN."""
    if PTX:
        pair = tl.inline_asm_elementwise(
            "{ .reg .b32 zero; mov.b32 zero, 0; max.NaN.bf16x2 $0, $1, zero; }",
            "=r,r", [a], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        low, high = floats(a)
        pair = tl.where(low <= 0, 0, a & 0xFFFF) | tl.where(high <= 0, 0, a & -65536)
    return pair
