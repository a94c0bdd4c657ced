"""BF16 weights -> 8-bit codes and one float32 scale for every output channel. w is about codes * scale.

BitNet (`bitnet_ternary`), as its authors do it: s = max(mean|W|, 1e-5) over the whole tensor,
codes = clamp(round(W * (1/s)), -1, 1), half to even; all channels get the scale s. In FP8 the same ternary
codes are stored as e4m3 values.

`absmax_per_channel`: scale = max|W[n]| / 127 (INT8) or / 448 (FP8), codes = round(W / scale), half to even.
The division uses the scale that is stored, so no weight is off by more than its rounding. A row of zeros gets
codes 0 and scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from slidesparse.checkpoint.lift import NEGATIVE_ZERO, Codes
from slidesparse.checkpoint.prune import Bf16Bits
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels.e4m3 import decode_table, encode_bits

SMALLEST_MEAN = np.float32(1e-5)
"""BitNet's clamp of mean|W|."""
_SMALLEST_SCALE = np.finfo(np.float32).tiny
_E4M3_ONE = np.int8(0x38)
_EXPONENT = np.uint16(0x7F80)
"""All exponent bits of a BF16 value: set in NaN and infinity, and in nothing else."""


@dataclass(frozen=True)
class Quantised:
    """One quantised weight."""

    codes: Codes
    """[N, K], int8 or e4m3 bytes."""
    scale: npt.NDArray[np.float32]
    """[N, 1]."""
    error: float
    """Sum of (W - codes * scale)**2."""
    energy: float
    """Sum of W**2."""


def ternary(weight: Bf16Bits, layer: str) -> Quantised:
    """BitNet codes -1, 0, 1 as int8. `weight` holds the bits of a BF16 tensor [N, K].

    Raises:
        CheckpointError: NaN or infinity among the weights (names layer, row and column).
    """
    check_finite(weight, layer)
    n, _ = weight.shape
    magnitudes = np.zeros(n, dtype=np.float64)
    _magnitude_sums(weight, magnitudes)
    mean = max(np.float32(magnitudes.sum() / weight.size), SMALLEST_MEAN)
    codes = np.empty(weight.shape, dtype=np.int8)
    sums = np.zeros((n, 2), dtype=np.float64)
    _ternary(weight, mean, np.float32(1) / mean, codes, sums)
    return Quantised(codes, np.full((n, 1), mean, dtype=np.float32), *_totals(sums))


def ternary_as_e4m3(codes: Codes) -> Codes:
    """The same values -1, 0, 1 as e4m3 bytes, any shape."""
    table = np.zeros(256, dtype=np.int8)
    table[1], table[255] = _E4M3_ONE, _E4M3_ONE | NEGATIVE_ZERO
    out = np.empty_like(codes)
    _translate(codes.view(np.uint8).reshape(-1), table, out.reshape(-1))
    return out


def absmax_per_channel(weight: Bf16Bits, dtype: DType, layer: str) -> Quantised:
    """Symmetric codes of either type. `weight` holds the bits of a BF16 tensor [N, K].

    Raises:
        CheckpointError: as `ternary`.
    """
    check_finite(weight, layer)
    n, _ = weight.shape
    largest = np.zeros(n, dtype=np.float32)
    _largest(weight, largest)
    scale = np.maximum(largest / np.float32(dtype.limit), _SMALLEST_SCALE)
    scale[largest == 0] = 1
    codes = np.empty(weight.shape, dtype=np.int8)
    sums = np.zeros((n, 2), dtype=np.float64)
    if dtype is DType.INT8:
        _absmax_int8(weight, scale, codes, sums)
    else:
        _absmax_e4m3(weight, scale, decode_table(DType.FP8), codes, sums)
    return Quantised(codes, scale[:, None], *_totals(sums))


def check_finite(bits: Bf16Bits, name: str) -> None:
    """Raises CheckpointError naming the first NaN or infinity of a BF16 tensor given as bits [N, K]."""
    bad = np.full(bits.shape[0], -1, dtype=np.int64)
    _first_not_finite(bits, bad)
    rows = np.flatnonzero(bad >= 0)
    if rows.size:
        raise CheckpointError(
            f"{name}: row {rows[0]}, column {bad[rows[0]]} is NaN or infinite ({rows.size} such rows); "
            "the base model is damaged: fetch it again"
        )


def _totals(sums: npt.NDArray[np.float64]) -> tuple[float, float]:
    error, energy = (float(value) for value in sums.sum(axis=0))
    return error, energy


@numba.njit
def _values(bits):  # type: ignore[no-untyped-def] # pragma: no cover
    """BF16 bits [K] -> float32 [K]."""
    wide = np.empty(bits.size, dtype=np.uint32)
    for c in range(bits.size):
        wide[c] = np.uint32(bits[c]) << np.uint32(16)
    return wide.view(np.float32)


@numba.njit(fastmath={"reassoc"})
def _magnitude_sum(values):  # type: ignore[no-untyped-def] # pragma: no cover
    total = 0.0
    for value in values:
        total += np.float64(abs(value))
    return total


@numba.njit(fastmath={"reassoc"})
def _square_sums(values, decoded, step):  # type: ignore[no-untyped-def] # pragma: no cover
    """Squared error of decoded * step, and squared values. In float64 the product is exact."""
    error, energy = 0.0, 0.0
    for c in range(values.size):
        value = np.float64(values[c])
        off = value - np.float64(decoded[c]) * np.float64(step)
        error += off * off
        energy += value * value
    return error, energy


@numba.njit(cache=True, nogil=True)
def _first_not_finite(bits, bad):  # type: ignore[no-untyped-def] # pragma: no cover
    for row in range(bits.shape[0]):
        source = bits[row]
        count = 0
        for c in range(source.size):
            count += (source[c] & _EXPONENT) == _EXPONENT
        if count:
            for c in range(source.size):
                if (source[c] & _EXPONENT) == _EXPONENT:
                    bad[row] = c
                    break


@numba.njit(cache=True, nogil=True)
def _magnitude_sums(bits, out):  # type: ignore[no-untyped-def] # pragma: no cover
    for row in range(bits.shape[0]):
        out[row] = _magnitude_sum(_values(bits[row]))


@numba.njit(cache=True, nogil=True)
def _ternary(bits, mean, inverse, codes, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    """round() of at most half is 0, half to even; everything above is clamped to 1."""
    for row in range(bits.shape[0]):
        values, target = _values(bits[row]), codes[row]
        decoded = np.empty(values.size, dtype=np.float32)
        for c in range(values.size):
            scaled = values[c] * inverse
            code = np.int8(scaled > np.float32(0.5)) - np.int8(scaled < np.float32(-0.5))
            target[c] = code
            decoded[c] = np.float32(code)
        sums[row, 0], sums[row, 1] = _square_sums(values, decoded, mean)


@numba.njit(cache=True, nogil=True)
def _translate(source, table, out):  # type: ignore[no-untyped-def] # pragma: no cover
    for i in range(source.size):
        out[i] = table[source[i]]


@numba.njit(cache=True, nogil=True)
def _largest(bits, out):  # type: ignore[no-untyped-def] # pragma: no cover
    for row in range(bits.shape[0]):
        source = bits[row]
        top = np.uint16(0)
        for c in range(source.size):
            top = max(top, source[c] & np.uint16(0x7FFF))
        one = np.empty(1, dtype=np.uint32)
        one[0] = np.uint32(top) << np.uint32(16)
        out[row] = one.view(np.float32)[0]


@numba.njit(cache=True, nogil=True)
def _absmax_int8(bits, scale, codes, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    for row in range(bits.shape[0]):
        values, target, step = _values(bits[row]), codes[row], scale[row]
        decoded = np.empty(values.size, dtype=np.float32)
        for c in range(values.size):
            code = np.int8(min(max(np.rint(values[c] / step), np.float32(-127)), np.float32(127)))
            target[c] = code
            decoded[c] = np.float32(code)
        sums[row, 0], sums[row, 1] = _square_sums(values, decoded, step)


@numba.njit(cache=True, nogil=True)
def _absmax_e4m3(bits, scale, table, codes, sums):  # type: ignore[no-untyped-def] # pragma: no cover
    """-0 is written as +0, so that a code is zero exactly when its byte is."""
    for row in range(bits.shape[0]):
        values, target, step = _values(bits[row]), codes[row], scale[row]
        scaled = np.empty(values.size, dtype=np.float32)
        for c in range(values.size):
            scaled[c] = min(max(values[c] / step, np.float32(-448)), np.float32(448))
        pattern = scaled.view(np.uint32)
        decoded = np.empty(values.size, dtype=np.float32)
        for c in range(values.size):
            byte = encode_bits(pattern[c])
            byte = np.uint8(0) if byte == np.uint8(0x80) else byte
            target[c] = np.int8(byte)
            decoded[c] = table[byte]
        sums[row, 0], sums[row, 1] = _square_sums(values, decoded, step)
