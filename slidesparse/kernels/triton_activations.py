"""Quantise and lift, in one pass over a row, in Triton: what comes before a sparse GEMM.

x [M, K] -> codes [M, K'], scale float32 [M, 1]; `reference.quantise` and `reference.lift`
bit for bit, but for the sign of FP8 zeros.

    Layout. A row is read as 32-bit pairs of 16-bit values, once from memory for its largest magnitude and once from the
    L1 cache for its codes. Lifted window w of 4 codes is pair p and p + 1 with p = w + w // windows (a group of L/2
    pairs has L/2 - 1 windows), stored as one 32-bit word. One program a row; neighbouring lanes hold neighbouring
    windows, so that every access of a warp is one run of memory, of one or two cache lines.
    INT8 codes take one operation a value: fma(x, r, 1.5 * 2**23) rounds x * r to the nearest even integer in its low
    byte. With x and the row's largest magnitude of 8 bits, 127 * x / amax is either half-way between two integers or
    2**-17 away from it, so that any r within 2**-21 of 1 / s rounds as the quotient does, but for exact ties. Ties are
    x = amax / 2 alone, unless s is a power of two; r is moved by 4 units in the last place to that side on which the
    quotient of this tie falls. (s a power of two: r and x * r are exact.)
    FP8 codes take two: fma(x, r, x * e), e = (1 - s * r) * r the error of r, is the quotient to one float32 rounding.
    Both hold for all pairs of mantissas: tests/test_triton_activations.py tries every one.
    Not finite. The largest magnitude is found on pairs of bfloat16 bits, where NaN and infinity are above all numbers:
    such a row gets codes 0 and scale NaN.

All offsets are 64-bit: M * K' may exceed 2**31.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from slidesparse.dtypes import DType
from slidesparse.kernels.reference import SCALE_FLOOR
from slidesparse.kernels.triton_launch import Launch, early_launch, output, turn
from slidesparse.pattern import WINDOW, Sparsity

# NOTES: constants of device functions are local to them. Triton 3.6 puts a module's into the cache key of a kernel that
# uses them through a function only if that function happens to have been hashed before: keys, and so hits, would depend
# on which kernel a process launches first.
WARP = 32
UNROLLED = 64
"""Windows a lane up to which the second pass is unrolled: beyond, compiling takes many seconds."""
SMALL_ROW = 1 << 15
"""Up to so many windows a row, dividing by the windows of a group is one multiplication and a shift."""


QUANTISE_LAUNCHES = tuple(
    Launch(words, warps)
    for words, warps in ((1024, 4), (1024, 8), (2048, 8), (512, 4), (640, 4), (512, 2), (256, 2), (1024, 16))
)
"""Candidates of tuning; the first is taken where nothing was tuned."""


@lru_cache(maxsize=1024)
def _sizes(k: int, dtype: DType, sparsity: Sparsity | None) -> dict[str, int | float | bool]:
    """Compile-time constants of the quantise kernel for rows of K values. Raises ValueError: see `quantise_lift`."""
    width = k if sparsity is None else sparsity.lifted_k(k)
    if k == 0 or width % WINDOW or k % 2:
        raise ValueError(f"quantise: K={k} must be a multiple of {WINDOW if sparsity is None else 2}")
    pairs, words = k // 2, width // WINDOW
    if sparsity is None or sparsity.l == WINDOW:
        windows, inside = 1, pairs // 2
    elif sparsity.l is None:
        windows, inside = 0, pairs - 1
    else:
        windows = sparsity.windows_per_group(k)
        inside = pairs // (windows + 1) * windows + max(0, pairs % (windows + 1) - 1)
    return {
        "PAIRS": pairs, "OUT": words, "WINDOWS": windows, "INSIDE": inside, "SMALL": words <= SMALL_ROW,
        "FP8": dtype is DType.FP8, "LIMIT": dtype.limit, "FLOOR": SCALE_FLOOR,
    }  # fmt: skip


def lifted_width(k: int, dtype: DType, sparsity: Sparsity | None) -> int:
    """Columns of the codes: K', or K without a pattern. Raises ValueError as `quantise_lift` does."""
    return int(_sizes(k, dtype, sparsity)["OUT"]) * WINDOW


def quantise_lift(
    x: torch.Tensor,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch = QUANTISE_LAUNCHES[0],
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x bfloat16 [M, K] contiguous -> codes [M, K'] (K without a pattern), scale float32 [M, 1].

    Args:
        dtype: INT8 or FP8.
        codes, scale: where the results go; allocated if None.

    Raises:
        ValueError: x or an output has another type, shape or layout; K is no multiple of 4 (2 with a pattern): pad the
            layer; dtype is not quantised.
    """
    m, k = x.shape
    if x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(f"quantise: x must be contiguous bfloat16 [M, K], not {x.dtype} with strides {x.stride()}")
    sizes = _sizes(k, dtype, sparsity)
    codes = output(codes, (m, lifted_width(k, dtype, sparsity)), dtype.torch, x.device, "codes")
    scale = output(scale, (m, 1), torch.float32, x.device, "scale")
    if m:
        lanes = WARP * launch.warps
        looped = 0 if sizes["OUT"] <= UNROLLED * lanes else sizes["INSIDE"] // launch.words * launch.words
        _quantise_lift[(m,)](
            x.view(torch.int32), codes.view(torch.int32), scale, **sizes, PTX=not triton.knobs.runtime.interpret,
            LANES=lanes, STEPS=launch.words // lanes, LOOPED=looped, num_warps=launch.warps, **early_launch(x.device),
        )  # fmt: skip
    return codes, scale


@triton.jit
def _quantise_lift(
    x_ptr, codes_ptr, scale_ptr,
    PAIRS: tl.constexpr,  # of a row
    OUT: tl.constexpr,  # words of a lifted row
    WINDOWS: tl.constexpr,  # of a group; 1: they do not overlap; 0: 2:inf, one group of all
    INSIDE: tl.constexpr,  # leading windows that lie in the row with both pairs
    SMALL: tl.constexpr,
    FP8: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    PTX: tl.constexpr,  # False in the interpreter
    LANES: tl.constexpr,
    STEPS: tl.constexpr,  # windows a lane whose loads are under way together, in the second pass
    LOOPED: tl.constexpr,  # leading windows that a loop writes; the rest is unrolled
    EARLY: tl.constexpr,
):  # fmt: skip
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    x_ptr += row * PAIRS
    codes_ptr += row * OUT

    # Unrolled, so that all loads are under way before the first is needed: 16 bytes a lane.
    largest = tl.zeros((4 * LANES,), tl.int32)
    for start in tl.static_range(0, PAIRS, 4 * LANES):
        index = start + tl.arange(0, 4 * LANES)
        if start + 4 * LANES <= PAIRS:
            pair = tl.load(x_ptr + index, eviction_policy="evict_last")
        else:
            pair = tl.load(x_ptr + index, mask=index < PAIRS, other=0, eviction_policy="evict_last")
        largest = _larger(largest, pair, PTX)
    inverse, error, keep = _row_scale(largest, scale_ptr, row, FP8, LIMIT, FLOOR)

    for start in tl.range(0, LOOPED, STEPS * LANES):
        _write(
            x_ptr, codes_ptr, start, inverse, error, keep, STEPS, False, False,
            PAIRS, OUT, WINDOWS, SMALL, FP8, LIMIT, PTX, LANES,
        )  # fmt: skip
    for start in tl.static_range(LOOPED, OUT, LANES):
        if start >= INSIDE // LANES * LANES:
            _write(
                x_ptr, codes_ptr, start, inverse, error, keep, 1, start + LANES > INSIDE, start + LANES > OUT,
                PAIRS, OUT, WINDOWS, SMALL, FP8, LIMIT, PTX, LANES,
            )  # fmt: skip
        elif (start - LOOPED) % (STEPS * LANES) == 0:
            # The last of these may have fewer steps.
            _write(
                x_ptr, codes_ptr, start, inverse, error, keep, min(STEPS, (INSIDE - start) // LANES), False, False,
                PAIRS, OUT, WINDOWS, SMALL, FP8, LIMIT, PTX, LANES,
            )  # fmt: skip


@triton.jit
def _write(
    x_ptr, codes_ptr, start, inverse, error, keep,
    STEPS: tl.constexpr,
    BORDER: tl.constexpr,  # some windows reach past the row
    END: tl.constexpr,  # some windows are past the lifted row
    PAIRS: tl.constexpr, OUT: tl.constexpr, WINDOWS: tl.constexpr, SMALL: tl.constexpr, FP8: tl.constexpr,
    LIMIT: tl.constexpr, PTX: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Second pass over STEPS * LANES windows of a row. All loads come first: stores are not passed by later loads."""
    lane = tl.arange(0, LANES)
    lefts, rights = (), ()
    for step in tl.static_range(STEPS):
        left, right = _window(x_ptr, start + step * LANES, lane, PAIRS, WINDOWS, BORDER, SMALL, LANES)
        lefts += (left,)
        rights += (right,)
    for step in tl.static_range(STEPS):
        window = start + step * LANES + lane
        word = _word(lefts[step], rights[step], inverse, error, FP8, LIMIT, PTX) & keep
        if END:
            tl.store(codes_ptr + window, word, mask=window < OUT)
        else:
            tl.store(codes_ptr + window, word)


@triton.jit
def _larger(most, pair, PTX: tl.constexpr):
    """Larger magnitudes of two pairs of bfloat16, NaN above all: one word of two magnitudes."""
    if PTX:
        larger = tl.inline_asm_elementwise(
            """{
            .reg .b32 magnitude;
            and.b32 magnitude, $2, 0x7fff7fff;
            max.NaN.bf16x2 $0, $1, magnitude;
            }""",
            "=r,r,r", [most, pair], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        larger = tl.maximum(most & 0xFFFF, pair & 0x7FFF) | tl.maximum(most >> 16, (pair >> 16) & 0x7FFF) << 16
    return larger


@triton.jit
def _row_scale(largest, scale_ptr, row, FP8: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr):
    """Store a row's scale, from the pairs that `_larger` gave. What `_word` takes, and a mask of its words."""
    top = tl.max(tl.maximum(largest & 0xFFFF, largest >> 16))
    # bfloat16 magnitude bits of infinity; NaNs are above.
    NOT_FINITE: tl.constexpr = 0x7F80
    finite = top < NOT_FINITE
    amax = (tl.where(finite, top, 0) << 16).to(tl.float32, bitcast=True)
    scale = tl.maximum(tl.div_rn(amax, LIMIT), FLOOR)
    tl.store(scale_ptr + row, tl.where(finite, scale, float("nan")))
    inverse, error = _inverse(amax, scale, FP8)
    return inverse, error, tl.where(finite, -1, 0)


@triton.jit
def _inverse(amax, scale, FP8: tl.constexpr):
    """1 / scale for `_scaled`: see the head of this file."""
    inverse = tl.div_rn(1.0, scale)
    if FP8:
        error = tl.fma(-scale, inverse, 1.0) * inverse
    else:
        power_of_two = (scale.to(tl.int32, bitcast=True) & 0x7FFFFF) == 0
        units = tl.where(power_of_two, 0, tl.where(tl.div_rn(amax * 0.5, scale) >= 63.5, 4, -4))
        inverse = (inverse.to(tl.int32, bitcast=True) + units).to(tl.float32, bitcast=True)
        error = inverse  # unused
    return inverse, error


@triton.jit
def _scaled(bits, inverse, error, FP8: tl.constexpr):
    """Float32 bits / scale: FP8 the quotient, INT8 a float whose low byte is its nearest even integer."""
    x = bits.to(tl.float32, bitcast=True)
    # 1.5 * 2**23: a float32 of this size has no fraction bits.
    ROUND: tl.constexpr = 12582912.0
    return tl.fma(x, inverse, x * error if FP8 else ROUND)


@triton.jit
def _first_pair(window, WINDOWS: tl.constexpr, SMALL: tl.constexpr):
    """Number of the left pair of a window."""
    if WINDOWS == 0:
        pair = window
    elif WINDOWS == 1:
        pair = window * 2
    elif WINDOWS == 2 or WINDOWS == 4 or not SMALL:
        pair = window + window // WINDOWS
    else:
        # Exact below 2**18 / 6: the factor is too large by at most 6/7.
        factor: tl.constexpr = (2**18 + WINDOWS - 1) // WINDOWS
        pair = window + ((window.to(tl.uint32) * factor) >> 18).to(tl.int32)
    return pair


@triton.jit
def _window(
    x_ptr, start, lane, PAIRS: tl.constexpr, WINDOWS: tl.constexpr, BORDER: tl.constexpr, SMALL: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """The two pairs of windows start + lane; 0 past the row."""
    window = start + lane
    pair = _first_pair(window, WINDOWS, SMALL)
    if BORDER:
        left = tl.load(x_ptr + pair, mask=pair < PAIRS, other=0)
        right = tl.load(x_ptr + pair + 1, mask=pair + 1 < PAIRS, other=0)
    elif WINDOWS == 1:
        both = tl.load(x_ptr + 2 * start + tl.arange(0, 2 * LANES), eviction_policy="evict_first")
        left, right = tl.split(tl.reshape(both, (LANES, 2)))
    else:
        left = tl.load(x_ptr + pair, eviction_policy="evict_first")
        right = tl.load(x_ptr + pair + 1, eviction_policy="evict_first")
    return left, right


@triton.jit
def _word(left, right, inverse, error, FP8: tl.constexpr, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """The four codes of a window."""
    a = _scaled(left << 16, inverse, error, FP8)
    b = _scaled(left & -65536, inverse, error, FP8)
    c = _scaled(right << 16, inverse, error, FP8)
    d = _scaled(right & -65536, inverse, error, FP8)
    return _pack(a, b, c, d, FP8, LIMIT, PTX)


@triton.jit
def _pack(a, b, c, d, FP8: tl.constexpr, LIMIT: tl.constexpr, PTX: tl.constexpr):
    """Four results of `_scaled` -> four codes in one int32, `a` in its low byte."""
    if FP8 and PTX:
        # NOTES: joining the halves by `mov.b32 $0, {low, high}` gave constant high halves in some unrolled kernels
        # (ptxas of CUDA 12.8 as in Triton 3.6, sm_90); widening both and shifting does not.
        word = tl.inline_asm_elementwise(
            """{
            .reg .b16 low, high;
            .reg .b32 x, y;
            cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
            cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
            cvt.u32.u16 x, low;
            cvt.u32.u16 y, high;
            shl.b32 y, y, 16;
            or.b32 $0, x, y;
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
            "=r,r,r,r,r", [_bits(a), _bits(b), _bits(c), _bits(d)], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
    else:
        word = _bits(a) & 0xFF | (_bits(b) & 0xFF) << 8 | (_bits(c) & 0xFF) << 16 | _bits(d) << 24
    return word


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _e4m3(q, LIMIT: tl.constexpr):
    return tl.clamp(q, -LIMIT, LIMIT).to(tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
