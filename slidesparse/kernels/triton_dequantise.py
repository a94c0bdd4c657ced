"""Dequantise and add the bias, in Triton: what comes after a GEMM that fuses no scales.

acc [M, N] -> bf16((acc * scale_token[m]) * scale_channel[n] + bias[n]), one rounding.

A program takes some rows of a run of columns, whose scales and biases it loads once. Where M is no multiple of
the rows, the last program starts earlier and writes some rows again, with the same bytes: no row needs a mask.

All offsets are 64-bit: M * N may exceed 2**31.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from slidesparse.kernels.triton_launch import Launch, early_launch, output, turn

DEQUANTISE_LAUNCHES = tuple(
    Launch(words, warps, rows)
    for words, warps, rows in (
        (1024, 8, 2), (512, 4, 2), (512, 4, 4), (1024, 4, 2), (2048, 8, 1), (2048, 8, 2), (256, 2, 4),
    )
)  # fmt: skip
"""Candidates of tuning; the first is taken where nothing was tuned."""


def dequantise_bias(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    launch: Launch = DEQUANTISE_LAUNCHES[0],
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """acc [M, N] int32, float32 or bfloat16, scales float32 [M, 1] and [N, 1], bias [N] -> bfloat16 [M, N].

    All contiguous. `out` is where the result goes; allocated if None. Raises ValueError when it does not fit.
    """
    m, n = acc.shape
    out = output(out, (m, n), torch.bfloat16, acc.device, "out")
    if m:
        rows = min(launch.rows, m)
        columns = triton.cdiv(n, launch.words)
        _dequantise_bias[(triton.cdiv(m, rows) * columns,)](
            acc, scale_token, scale_channel, acc if bias is None else bias, out, m,
            N=n, COLUMNS=columns, BIAS=bias is not None, WORDS=launch.words, ROWS=rows,
            num_warps=launch.warps, enable_fp_fusion=False, **early_launch(acc.device),
        )  # fmt: skip
    return out


@triton.jit
def _dequantise_bias(
    acc_ptr, token_ptr, channel_ptr, bias_ptr, out_ptr, m,
    N: tl.constexpr,
    COLUMNS: tl.constexpr,  # programs side by side
    BIAS: tl.constexpr, WORDS: tl.constexpr, ROWS: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    turn(EARLY)
    row = tl.program_id(0) // COLUMNS * ROWS
    if ROWS > 1:
        row = tl.minimum(row, m - ROWS)
    column = tl.program_id(0) % COLUMNS * WORDS + tl.arange(0, WORDS)
    inside = column < N
    acc_ptr += row.to(tl.int64) * N
    out_ptr += row.to(tl.int64) * N

    # All loads first: stores are not passed by later loads.
    sums, tokens = (), ()
    for r in tl.static_range(ROWS):
        sums += (_columns(acc_ptr + r * N, column, inside, N, WORDS),)
    for r in tl.static_range(ROWS):
        tokens += (tl.load(token_ptr + row + r),)
    channel = _columns(channel_ptr, column, inside, N, WORDS)
    if BIAS:
        bias = _columns(bias_ptr, column, inside, N, WORDS).to(tl.float32)
    for r in tl.static_range(ROWS):
        y = sums[r].to(tl.float32) * tokens[r] * channel
        if BIAS:
            y += bias
        if N % WORDS:
            tl.store(out_ptr + (r * N + column), y.to(tl.bfloat16), mask=inside)
        else:
            tl.store(out_ptr + (r * N + column), y.to(tl.bfloat16))


@triton.jit
def _columns(ptr, column, inside, N: tl.constexpr, WORDS: tl.constexpr):
    return tl.load(ptr + column, mask=inside, other=0) if N % WORDS else tl.load(ptr + column)
