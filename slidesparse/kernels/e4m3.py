"""The FP8 format e4m3fn on the CPU: decode by table, encode by bits. Both equal to torch's casts, bit for bit.

Torch's own FP8 casts run at about 120 M values/s on a CPU core; the table decodes several times as fast.
Format: sign, 4 exponent bits (bias 7), 3 mantissa bits, no infinities, NaN = 0x7F and 0xFF, largest 448.
"""

from __future__ import annotations

from functools import lru_cache

import numba
import numpy as np
import numpy.typing as npt
import torch

from slidesparse.dtypes import DType


@lru_cache(maxsize=2)
def decode_table(dtype: DType) -> npt.NDArray[np.float32] | npt.NDArray[np.int32]:
    """Number behind each of the 256 byte values: float32 [256] for FP8, int32 [256] for INT8. Read-only.

    One table type a dtype lets the sparse kernels serve both with the same source: the table's type is
    the type they accumulate in.
    """
    codes = torch.arange(256, dtype=torch.uint8).view(dtype.torch)
    table: npt.NDArray[np.float32] | npt.NDArray[np.int32]
    table = codes.to(torch.int32).numpy() if dtype is DType.INT8 else codes.float().numpy()
    table.setflags(write=False)
    return table


def as_bytes(codes: torch.Tensor) -> npt.NDArray[np.uint8]:
    """A view of 8-bit codes (int8 or float8_e4m3fn) as NumPy bytes, same shape."""
    array: npt.NDArray[np.uint8] = codes.detach().contiguous().view(torch.uint8).numpy()
    return array


def decode(codes: torch.Tensor, dtype: DType, to: torch.dtype) -> torch.Tensor:
    """8-bit codes of any shape -> numbers of type `to` (float32 or float64). Exact: 8 bits fit in both."""
    if dtype is DType.INT8:
        return codes.to(to)
    decoded = torch.from_numpy(decode_table(dtype).take(as_bytes(codes)))
    return decoded.to(to)


@numba.njit(inline="always")
def encode_bits(bits):  # type: ignore[no-untyped-def] # pragma: no cover
    """float32 bits (|value| <= 448) -> e4m3 byte, round to nearest, ties to even.

    Below 2**-6 a code counts steps of 2**-9. Adding 2**14 (whose float32 spacing is 2**-9) rounds to them.
    """
    sign = (bits >> np.uint32(24)) & np.uint32(0x80)
    magnitude = bits & np.uint32(0x7FFFFFFF)
    exponent = magnitude >> np.uint32(23)
    if exponent >= np.uint32(121):  # 2**-6 and above: normal in e4m3
        odd = (magnitude >> np.uint32(20)) & np.uint32(1)
        code = ((magnitude + np.uint32(0x7FFFF) + odd) >> np.uint32(20)) - np.uint32(120 << 3)
    elif exponent < np.uint32(116):  # below 2**-11: less than a quarter of a step
        code = np.uint32(0)
    else:
        shift = np.uint32(141) - exponent  # value / 2**-9 = mantissa >> (141 - exponent)
        mantissa = (magnitude & np.uint32(0x7FFFFF)) | np.uint32(0x800000)
        code = mantissa >> shift
        rest = mantissa & ((np.uint32(1) << shift) - np.uint32(1))
        half = np.uint32(1) << (shift - np.uint32(1))
        if rest > half or (rest == half and (code & np.uint32(1)) == np.uint32(1)):
            code += np.uint32(1)
    return np.uint8(sign | code)
