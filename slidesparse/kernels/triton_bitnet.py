"""The fused kernels of a BitNet layer: norm, quantise and lift in one pass over a row, in Triton.

    norm    x [M, K]                  sub-norm of the attention output; the first norm of a model
    add     x, residual [M, K]        input and post-attention norm: also writes x + residual, bfloat16 [M, K]
    gate    gate_up [M, 2 K]          max(gate, 0)**2 * up and its sub-norm: what goes into down_proj

each -> codes [M, K'] (K without a pattern), scale float32 [M, 1]. Formulas, roundings and how far the results may be
from the reference: `bitnet_reference`. Bytes of one row, K' columns of codes, the weights not counted (2 K, once):

            fused, the floor    a kernel each for gate, norm (with addition), quantise (with lift)
    norm    2 K + K' + 4        6 K + K' + 4
    add     6 K + K' + 4        10 K + K' + 4
    gate    4 K + K' + 4        12 K + K' + 4

    Layout. One program a row, as 32-bit pairs of bfloat16. Every lane loads its share of the weights and of the row
    (accesses of 8 or 16 bytes, all of them before the first is needed) and keeps it in registers: values, then normed
    values, then codes. Between them are two reductions over the row, sum of squares and largest magnitude. From the
    normed values on it is `triton_activations`, whose device functions these are: y is bfloat16, so that codes take one
    or two operations a value and equal the quotient's.
    Lifting. Without a pattern, and for 2:4, codes leave the registers in order. Else the row's codes (K bytes) go to
    shared memory once, where every window finds its two pairs: nothing is normed or quantised twice, and no second read
    of the row depends on the L1 cache.

All offsets are 64-bit. Programmatic dependent launch as in `triton_launch`, except that weights are read before the
wait, which hides their latency. So the kernel right before must not both write them and let this one start early:
torch's and copies do not, nor do ours.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slidesparse.dtypes import DType
from slidesparse.kernels import triton_bf16 as bf16
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.triton_activations import WARP, _larger, _row_scale, _sizes, _word, lifted_width
from slidesparse.kernels.triton_launch import Launch, early_launch, output, turn
from slidesparse.kernels.triton_lift import store_lifted
from slidesparse.pattern import Sparsity

NORM_LAUNCHES = tuple(
    Launch(words, warps)
    for words, warps in ((128, 4), (256, 4), (64, 2), (128, 2), (256, 8), (512, 8), (512, 16), (1024, 16), (2048, 32))
)
"""Candidates of tuning. `words`: words of 4 values that one access of all lanes loads, 32 * warps or twice as many."""
AT_EASE, HELD = 16, 32
"""Pairs that a lane holds: up to AT_EASE of three operands in 64 registers, never more than HELD."""
MOST_TILES = 8
"""Accesses a lane that are worth tuning: more take seconds to compile, and a launch of twice the words has half."""


def launches(k: int) -> tuple[Launch, ...]:
    """Candidates for rows of K values, the default first. Raises ValueError for rows that no launch can hold."""
    able = [one for one in NORM_LAUNCHES if k <= min(2 * HELD * WARP * one.warps, 4 * MOST_TILES * one.words)]
    if not able:
        raise ValueError(f"norm and quantise: K={k} is more than the {2 * HELD * WARP * 32} that a program can hold")
    return tuple(sorted(able, key=lambda launch: k > 2 * AT_EASE * WARP * launch.warps))


def norm_quantise_lift(
    x: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None = None,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """RMSNorm of x bfloat16 [M, K], quantised: codes [M, K'] (K without a pattern), scale float32 [M, 1].

    Args:
        weight: bfloat16 or float32 [K].
        dtype: INT8 or FP8.
        launch: one of `launches(K)`; the first if None.
        codes, scale: where the results go; allocated if None.

    Raises:
        ValueError: an operand has another type, shape or layout; K is no multiple of 4 (2 with a pattern), or too long
            for the launch; dtype is not quantised.
    """
    return _launch("norm", x, x, x, weight, eps, dtype, sparsity, launch, codes, scale)


def add_norm_quantise_lift(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None = None,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    total: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`norm_quantise_lift` of x + residual, both bfloat16 [M, K]; their sum, bfloat16, comes last.

    `total` is where the sum goes: allocated if None; may be `residual` (or `x`) itself.
    """
    _check(residual, x.shape, "residual")
    total = output(total, (x.shape[0], x.shape[1]), torch.bfloat16, x.device, "total")
    return *_launch("add", x, residual, total, weight, eps, dtype, sparsity, launch, codes, scale), total


def gate_norm_quantise_lift(
    gate_up: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None = None,
    codes: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_quantise_lift` of max(gate, 0)**2 * up, from gate_up bfloat16 [M, 2 K], gate first."""
    return _launch("gate", gate_up, gate_up, gate_up, weight, eps, dtype, sparsity, launch, codes, scale)


def _check(x: torch.Tensor, shape: torch.Size, name: str) -> None:
    if x.shape != shape or x.dtype != torch.bfloat16 or not x.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous bfloat16 {list(shape)}, not {x.dtype} {list(x.shape)} with strides {x.stride()}"
        )


def _launch(
    operation: BitNetOperation,
    x: torch.Tensor,
    other: torch.Tensor,
    total: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None,
    codes: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape[0], weight.numel()
    _check(x, torch.Size((m, 2 * k if operation == "gate" else k)), "gate_up" if operation == "gate" else "x")
    if weight.shape != (k,) or weight.dtype not in (torch.bfloat16, torch.float32) or not weight.is_contiguous():
        raise ValueError(
            f"weight must be contiguous bfloat16 or float32 [K], not {weight.dtype} {list(weight.shape)} with strides "
            f"{weight.stride()}"
        )
    sizes = _sizes(k, dtype, sparsity)
    launch = launches(k)[0] if launch is None else launch
    if k > 2 * HELD * WARP * launch.warps:
        raise ValueError(f"norm and quantise: K={k} is too long for {launch}: take one of launches({k})")
    codes = output(codes, (m, lifted_width(k, dtype, sparsity)), dtype.torch, x.device, "codes")
    scale = output(scale, (m, 1), torch.float32, x.device, "scale")
    if m:
        wide = weight.dtype == torch.float32
        # A row of codes in order may end in padding.
        words = max(triton.cdiv(k, 4), int(sizes["OUT"]) if sizes["WINDOWS"] == 1 else 0)
        _norm_quantise_lift[(m,)](
            x.view(torch.int32), other.view(torch.int32), weight if wide else weight.view(torch.int32),
            total.view(torch.int32), codes.view(torch.int32), scale, eps, OPERATION=operation, WIDE=wide, **sizes,
            PTX=not triton.knobs.runtime.interpret, WORDS=launch.words, TILES=triton.cdiv(words, launch.words),
            num_warps=launch.warps, **early_launch(x.device),
        )  # fmt: skip
    return codes, scale


@triton.jit
def _norm_quantise_lift(
    x_ptr, other_ptr, weight_ptr, total_ptr, codes_ptr, scale_ptr, eps,
    OPERATION: tl.constexpr,
    WIDE: tl.constexpr,  # weights are float32
    PAIRS: tl.constexpr, OUT: tl.constexpr, WINDOWS: tl.constexpr, INSIDE: tl.constexpr, SMALL: tl.constexpr,
    FP8: tl.constexpr, LIMIT: tl.constexpr, FLOOR: tl.constexpr,
    PTX: tl.constexpr,  # False in the interpreter
    WORDS: tl.constexpr,  # of a tile: what one access of every lane loads
    TILES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = 2 * WORDS
    # NOTES: after the wait, ptxas (CUDA 12.8, sm_90) puts these loads behind the arrival of the row: a second latency.
    weights = ()
    for tile in tl.static_range(TILES):
        weights += (_load_weights(weight_ptr, tile * SPAN, SPAN, PAIRS, WIDE),)
    turn(EARLY)
    row = tl.program_id(0).to(tl.int64)
    if OPERATION == "gate":
        x_ptr += row * (2 * PAIRS)
        other_ptr = x_ptr + PAIRS
    else:
        x_ptr += row * PAIRS
        other_ptr += row * PAIRS
    total_ptr += row * PAIRS
    codes_ptr += row * OUT

    # All loads first: stores are not passed by later loads.
    firsts, seconds = (), ()
    for tile in tl.static_range(TILES):
        firsts += (_load(x_ptr, tile * SPAN, SPAN, PAIRS, "evict_first"),)
        if OPERATION == "norm":
            seconds = firsts
        else:
            seconds += (_load(other_ptr, tile * SPAN, SPAN, PAIRS, "evict_first"),)

    values = ()
    squares = tl.zeros((SPAN,), tl.float32)
    for tile in tl.static_range(TILES):
        value = _combined(firsts[tile], seconds[tile], OPERATION, PTX)
        values += (value,)
        low, high = bf16.floats(value)
        squares += low * low
        squares += high * high
    if OPERATION == "add":
        for tile in tl.static_range(TILES):
            _store(total_ptr, values[tile], tile * SPAN, SPAN, PAIRS)
    inverse_rms = tl.rsqrt(tl.sum(squares) * (0.5 / PAIRS) + eps)

    normed = ()
    largest = tl.zeros((SPAN,), tl.int32)
    for tile in tl.static_range(TILES):
        low, high = bf16.floats(values[tile])
        value = _weighted(bf16.rounded(low * inverse_rms, high * inverse_rms, PTX), weights[tile], WIDE, PTX)
        normed += (value,)
        largest = _larger(largest, value, PTX)
    inverse, error, keep = _row_scale(largest, scale_ptr, row, FP8, LIMIT, FLOOR)

    words = ()
    for tile in tl.static_range(TILES):
        left, right = tl.split(tl.reshape(normed[tile], (WORDS, 2)))
        words += (_word(left, right, inverse, error, FP8, LIMIT, PTX) & keep,)
    if WINDOWS == 1:
        for tile in tl.static_range(TILES):
            _store(codes_ptr, words[tile], tile * WORDS, WORDS, OUT)
    else:
        store_lifted(codes_ptr, words, TILES, WORDS, PAIRS, OUT, WINDOWS, OUT > INSIDE, SMALL)


@triton.jit
def _combined(first, second, OPERATION: tl.constexpr, PTX: tl.constexpr):
    """What is normalised: first, their sum, or the gate's squared ReLU times up."""
    if OPERATION == "add":
        value = bf16.total(first, second, PTX)
    elif OPERATION == "gate":
        gate = bf16.positive(first, PTX)
        value = bf16.product(bf16.product(gate, gate, PTX), second, PTX)
    else:
        value = first
    return value


@triton.jit
def _load(ptr, START: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr, EVICTION: tl.constexpr):
    index = START + tl.arange(0, COUNT)
    if START + COUNT <= SIZE:
        values = tl.load(ptr + index, eviction_policy=EVICTION)
    else:
        values = tl.load(ptr + index, mask=index < SIZE, other=0, eviction_policy=EVICTION)
    return values


@triton.jit
def _store(ptr, values, START: tl.constexpr, COUNT: tl.constexpr, SIZE: tl.constexpr):
    index = START + tl.arange(0, COUNT)
    if START + COUNT <= SIZE:
        tl.store(ptr + index, values)
    else:
        tl.store(ptr + index, values, mask=index < SIZE)


@triton.jit
def _load_weights(ptr, START: tl.constexpr, COUNT: tl.constexpr, PAIRS: tl.constexpr, WIDE: tl.constexpr):
    """Pairs of bfloat16, or low and high float32 of such pairs."""
    if WIDE:
        both = _load(ptr, 2 * START, 2 * COUNT, 2 * PAIRS, "evict_last")
        weights = tl.split(tl.reshape(both, (COUNT, 2)))
    else:
        weights = _load(ptr, START, COUNT, PAIRS, "evict_last")
    return weights


@triton.jit
def _weighted(pair, weights, WIDE: tl.constexpr, PTX: tl.constexpr):
    if WIDE:
        low, high = bf16.floats(pair)
        y = bf16.rounded(low * weights[0], high * weights[1], PTX)
    else:
        y = bf16.product(pair, weights, PTX)
    return y
