"""One W8A8 linear layer in plain PyTorch: the oracle that every kernel is checked against.

    scale_token[m] = max(max_k |x[m, k]| / limit, SCALE_FLOOR)          float32, the scale that is stored
    a[m, k]        = round(x[m, k] / scale_token[m])                    int8: nearest even; e4m3: nearest even
    acc[m, n]      = sum_k a[m, k] * w[n, k]                            exact
    y[m, n]        = ((float32(acc) * scale_token[m]) * scale_channel[n]) + bias[n], then one rounding

It shares no code with the kernels: no lifting, no compressed form, no look-up tables. Division is by the
scale that is stored, floor included, so that codes times scale always gives x back. A row of zeros has
codes 0 and scale SCALE_FLOOR. A row that holds NaN or an infinity has codes 0 and scale NaN: its whole
output is NaN, which no later step can mistake for a result.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.pattern import Sparsity

SCALE_FLOOR = torch.finfo(torch.float32).tiny
"""Smallest normal float32. Below it float32 division loses bits or, where denormals are flushed, everything."""
CHUNK_ELEMENTS = 1 << 24
"""float64 temporaries hold at most this many elements (128 MiB)."""


def accumulator(dtype: DType) -> torch.dtype:
    """Type that holds a GEMM's sum: int32 for INT8 (exact for K up to 133,144), float32 for the others."""
    return torch.int32 if dtype is DType.INT8 else torch.float32


def quantise(x: torch.Tensor, dtype: DType) -> tuple[torch.Tensor, torch.Tensor]:
    """Per-token symmetric quantisation: [M, K] of any float type -> codes [M, K] of `dtype`, scale float32 [M, 1]."""
    values = x.float()
    finite = values.isfinite().all(dim=1, keepdim=True)
    largest = values.abs().amax(dim=1, keepdim=True)
    # A tensor, not a number: on CUDA torch multiplies by the reciprocal of a number, which is not this quotient.
    scale = (largest / torch.full_like(largest, dtype.limit)).clamp(min=SCALE_FLOOR)
    scaled = torch.where(finite, values / scale, 0.0).clamp(-dtype.limit, dtype.limit)
    codes = scaled.round() if dtype is DType.INT8 else scaled
    return codes.to(dtype.torch), torch.where(finite, scale, float("nan"))


def lift(codes: torch.Tensor, sparsity: Sparsity) -> torch.Tensor:
    """Lift activation codes (or 16-bit values): [M, K] -> [M, K'] along the column map, 0 in padding."""
    columns = torch.from_numpy(sparsity.column_map(codes.shape[1])).long().to(codes.device)
    bits = codes.view(torch.uint8 if codes.itemsize == 1 else torch.int16)
    lifted = bits[:, columns.clamp(min=0)]
    lifted[:, columns < 0] = 0
    return lifted.view(codes.dtype)


def gemm(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Exact product of codes [M, K] and [N, K] -> float64 [M, N], on their device.

    INT8: integers below 2**53. FP8: every product of two e4m3 numbers is a multiple of 2**-18 and at most
    448**2 < 2**17.62, so any sum of up to 2**17 of them has at most 53 bits: exact as well. 16-bit types: the products
    are exact, their sum is rounded to float64.
    """
    weight = w.to(torch.float64)
    out = torch.empty(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    rows = max(1, CHUNK_ELEMENTS // max(a.shape[1], w.shape[0], 1))
    for first in range(0, a.shape[0], rows):
        torch.matmul(a[first : first + rows].to(torch.float64), weight.T, out=out[first : first + rows])
    return out


def magnitude(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """sum_k |a[m, k]| |w[n, k]|, float64 [M, N]: what rounding errors of a dot product are proportional to."""
    absolute = w.to(torch.float64).abs()
    out = torch.empty(a.shape[0], w.shape[0], dtype=torch.float64, device=a.device)
    rows = max(1, CHUNK_ELEMENTS // max(a.shape[1], w.shape[0], 1))
    for first in range(0, a.shape[0], rows):
        torch.matmul(a[first : first + rows].to(torch.float64).abs(), absolute.T, out=out[first : first + rows])
    return out


def dequantise_bias(
    acc: torch.Tensor,
    scale_token: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """acc [M, N], scales float32 [M, 1] and [N, 1], bias [N] -> [M, N]: float32 arithmetic, one final rounding."""
    y = acc.to(torch.float32) * scale_token * scale_channel.reshape(1, -1)
    if bias is not None:
        y = y + bias.float()
    return y.to(out_dtype)


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: DType,
    out_dtype: torch.dtype = torch.bfloat16,
) -> torch.Tensor:
    """The whole layer: x [M, K], unlifted codes [N, K], scales float32 [N, 1], bias [N] -> [M, N]."""
    codes, scale = quantise(x, dtype)
    return dequantise_bias(gemm(codes, weight), scale, scale_channel, bias, out_dtype)
