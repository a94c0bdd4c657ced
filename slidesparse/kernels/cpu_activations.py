"""Quantise, quantise + lift, dequantise + bias on the CPU: each as torch operations and as one fused kernel.

Formulas: `kernels/reference.py`. The fused kernels read x once, write codes once and give the same bits as the
reference: IEEE float32 division, no contraction to fused multiply-add, round to nearest even.
"""

from __future__ import annotations

import numba
import numpy as np
import numpy.typing as npt
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import bitnet_reference, reference
from slidesparse.kernels.backend import ActivationOperation, Activations, Algorithm, Encoder
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.e4m3 import encode_bits
from slidesparse.pattern import Sparsity

TORCH = Algorithm(0, "torch", "separate torch operations; a lift comes before quantising")
FUSED = Algorithm(1, "fused", "one numba kernel, a row a thread")


class CpuActivations(Activations):
    """Shared by both CPU backends."""

    name = "cpu"

    def algorithms(self, operation: ActivationOperation, dtype: DType) -> tuple[Algorithm, ...]:
        return (FUSED, TORCH)

    def quantise(
        self, x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, algorithm: Algorithm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        m, k = x.shape
        columns = _EMPTY if sparsity is None else _column_map(sparsity, k)
        if algorithm.name == TORCH.name:
            return _quantise_torch(x, dtype, None if sparsity is None else torch.from_numpy(columns))
        out = np.empty((m, columns.size or k), dtype=np.uint8)
        stored = np.empty(m, dtype=np.float32)
        kernel = _quantise_int8 if dtype is DType.INT8 else _quantise_e4m3
        kernel(_float_bits(x), columns, np.float32(dtype.limit), np.float32(reference.SCALE_FLOOR), out, stored)
        return torch.from_numpy(out).view(dtype.torch), torch.from_numpy(stored).unsqueeze(1)

    def dequantise_bias(
        self,
        acc: torch.Tensor,
        scale_token: torch.Tensor,
        scale_channel: torch.Tensor,
        bias: torch.Tensor | None,
        out_dtype: torch.dtype,
        algorithm: Algorithm,
    ) -> torch.Tensor:
        if algorithm.name == TORCH.name or out_dtype is not torch.bfloat16:
            y = acc.to(torch.float32, copy=True).mul_(scale_token).mul_(scale_channel.reshape(-1))
            return (y if bias is None else y.add_(bias)).to(out_dtype)
        out = np.empty(tuple(acc.shape), dtype=np.uint16)
        added = np.empty(0, dtype=np.float32) if bias is None else bias.float().numpy()
        _dequantise(acc.numpy(), scale_token.reshape(-1).numpy(), scale_channel.reshape(-1).numpy(), added, out)
        return torch.from_numpy(out.view(np.int16)).view(torch.bfloat16)

    def norm_algorithms(self, k: int) -> tuple[Algorithm, ...]:
        return (TORCH,)

    def encoder(
        self, before: BitNetOperation | None, dtype: DType, sparsity: Sparsity | None, k: int, algorithm: Algorithm
    ) -> Encoder:
        """`quantise`, or `bitnet_reference` itself."""

        def run(
            x: torch.Tensor,
            residual: torch.Tensor | None,
            weight: torch.Tensor | None,
            eps: float,
            codes: torch.Tensor,
            scale: torch.Tensor,
        ) -> torch.Tensor | None:
            total: torch.Tensor | None = None
            if weight is None:
                found, token_scale = self.quantise(x, dtype, sparsity, algorithm)
            elif residual is not None:
                found, token_scale, total = bitnet_reference.add_norm_quantise_lift(
                    x, residual, weight, eps, dtype, sparsity
                )
            elif before == "gate":
                found, token_scale = bitnet_reference.gate_norm_quantise_lift(x, weight, eps, dtype, sparsity)
            else:
                found, token_scale = bitnet_reference.norm_quantise_lift(x, weight, eps, dtype, sparsity)
            codes.copy_(found)
            scale.copy_(token_scale)
            return total

        return run


def _quantise_torch(x: torch.Tensor, dtype: DType, columns: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Lift x first, then quantise K' columns: duplicates change no maximum. Padding is zero, and so is its code."""
    scale = torch.linalg.vector_norm(x.float(), ord=float("inf"), dim=1, keepdim=True).div_(dtype.limit)
    bad = scale.isfinite().logical_not_()
    scale.clamp_(min=reference.SCALE_FLOOR)
    if columns is not None:
        x = x.index_select(1, columns.clamp(min=0)).masked_fill_(columns < 0, 0)
    scaled = x.float().div(scale).clamp_(-dtype.limit, dtype.limit).masked_fill_(bad, 0)
    codes = scaled.round_() if dtype is DType.INT8 else scaled
    return codes.to(dtype.torch), scale.masked_fill_(bad, float("nan"))


_EMPTY = np.empty(0, dtype=np.int32)
_maps: dict[tuple[Sparsity, int], npt.NDArray[np.int32]] = {}


def _column_map(sparsity: Sparsity, k: int) -> npt.NDArray[np.int32]:
    key = (sparsity, k)
    if key not in _maps:
        _maps[key] = sparsity.column_map(k)
    return _maps[key]


def _float_bits(x: torch.Tensor) -> npt.NDArray[np.generic]:
    """x as bits: uint16 [M, K] for bfloat16, uint32 [M, K] for anything else (as float32)."""
    x = x.detach()
    if x.dtype is torch.bfloat16:
        array: npt.NDArray[np.generic] = x.contiguous().view(torch.int16).numpy().view(np.uint16)
        return array
    return x.float().contiguous().view(torch.int32).numpy().view(np.uint32)


@numba.njit(inline="always")
def _scaled_row(bits, limit, floor, row):  # type: ignore[no-untyped-def] # pragma: no cover
    """Divide one row by its scale into `row` (float32 [K]); returns the scale, NaN if the row is not finite."""
    wide = row.view(np.uint32)
    shift = np.uint32(16 if bits.itemsize == 2 else 0)
    largest = np.uint32(0)
    for j in range(bits.size):
        value = np.uint32(bits[j]) << shift
        wide[j] = value
        largest = max(largest, value & np.uint32(0x7FFFFFFF))  # magnitudes order like their bits, NaN above all
    if largest >= np.uint32(0x7F800000):
        row[:] = 0
        return np.float32(np.nan)
    one = np.empty(1, np.uint32)
    one[0] = largest
    scale = max(one.view(np.float32)[0] / limit, floor)
    for j in range(bits.size):
        row[j] = min(max(row[j] / scale, -limit), limit)
    return scale


@numba.njit(parallel=True, cache=True, nogil=True)
def _quantise_int8(x, columns, limit, floor, out, stored):  # type: ignore[no-untyped-def] # pragma: no cover
    m, k = x.shape
    for i in numba.prange(m):
        row = np.empty(k, np.float32)
        stored[i] = _scaled_row(x[i], limit, floor, row)
        if columns.size == 0:
            for j in range(k):
                out[i, j] = np.uint8(np.int8(np.rint(row[j])))
        else:
            codes = np.empty(k, np.uint8)
            for j in range(k):
                codes[j] = np.uint8(np.int8(np.rint(row[j])))
            for j in range(columns.size):
                out[i, j] = codes[columns[j]] if columns[j] >= 0 else np.uint8(0)


@numba.njit(parallel=True, cache=True, nogil=True)
def _quantise_e4m3(x, columns, limit, floor, out, stored):  # type: ignore[no-untyped-def] # pragma: no cover
    m, k = x.shape
    for i in numba.prange(m):
        row = np.empty(k, np.float32)
        stored[i] = _scaled_row(x[i], limit, floor, row)
        bits = row.view(np.uint32)
        if columns.size == 0:
            for j in range(k):
                out[i, j] = encode_bits(bits[j])
        else:
            codes = np.empty(k, np.uint8)
            for j in range(k):
                codes[j] = encode_bits(bits[j])
            for j in range(columns.size):
                out[i, j] = codes[columns[j]] if columns[j] >= 0 else np.uint8(0)


@numba.njit(parallel=True, cache=True, nogil=True)
def _dequantise(acc, scale_token, scale_channel, bias, out):  # type: ignore[no-untyped-def] # pragma: no cover
    m, n = acc.shape
    for i in numba.prange(m):
        row = np.empty(n, np.float32)
        for j in range(n):
            row[j] = np.float32(acc[i, j]) * scale_token[i] * scale_channel[j]
        if bias.size:
            for j in range(n):
                row[j] = row[j] + bias[j]
        bits = row.view(np.uint32)
        for j in range(n):
            value = bits[j]
            if (value & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000):
                out[i, j] = np.uint16(0x7FC0)
            else:
                odd = (value >> np.uint32(16)) & np.uint32(1)
                out[i, j] = np.uint16((value + np.uint32(0x7FFF) + odd) >> np.uint32(16))
