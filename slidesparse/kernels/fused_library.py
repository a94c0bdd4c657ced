"""Python side of `csrc/fused`: our own sparse GEMM with the whole epilogue in it, on torch tensors.

    out[m, n] = bf16((float(acc[m, n]) * token_scale[m]) * channel_scale[n] + bias[n])

Weights are packed for a family (`fused_pack_wgmma`, `fused_pack_mma`). Every error is one line.
"""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import astuple, dataclass
from enum import IntEnum
from functools import lru_cache
from pathlib import Path

import torch

from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels.gemm_library import TYPES, UNSUPPORTED
from slidesparse.kernels.native import open_library

ABI_VERSION = 1
LIBRARY = "libslidesparse_fused.so"
MAX_CONFIGS = 256


class Family(IntEnum):
    """Which instructions multiply, and so how weights are packed."""

    WGMMA = 0
    """sm_90 alone."""
    MMA = 1
    """sm_80 and later; FP8 from sm_89."""


class _Problem(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("m", "n", "k")),
        *((name, ctypes.c_int32) for name in ("type", "family")),
    )


class _Config(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char * 64),
        *((name, ctypes.c_int32) for name in ("index", "channels", "tokens", "k", "stages")),
        *((name, ctypes.c_int32) for name in ("cluster_channels", "cluster_tokens", "split_k", "group", "head_start")),
    )


class _Operands(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("x", "packed", "token_scale", "channel_scale", "bias", "out"))


@dataclass(frozen=True)
class Config:
    """One way to run a problem. Sizes in elements; `slidesparse_fused.h` says what they mean."""

    name: str
    index: int
    channels: int
    tokens: int
    k: int
    stages: int
    cluster_channels: int
    cluster_tokens: int
    split_k: int
    group: int
    head_start: int


class FusedLibrary:
    """The loaded library. Use `load()`. Methods raise SlideSparseError, UnsupportedHere where that is the reason."""

    def __init__(self, path: Path) -> None:
        self._c = open_library(path, "ss_fused", "csrc/fused", ABI_VERSION)

    def configs(
        self, capability: tuple[int, int], m: int, n: int, k: int, dtype: torch.dtype, family: Family
    ) -> list[Config]:
        """The ways to run [m, k] by [n, k] on a GPU of this compute capability, a good guess first. Needs no GPU.

        Raises UnsupportedHere where there is none.
        """
        room, found = (_Config * MAX_CONFIGS)(), ctypes.c_int(0)
        number, problem = capability[0] * 10 + capability[1], _Problem(m, n, k, TYPES[dtype], family)
        self._call("ss_fused_configs", number, ctypes.byref(problem), room, MAX_CONFIGS, ctypes.byref(found))
        return [_config(entry) for entry in room[: found.value]]

    def gemm(
        self,
        config: Config,
        x: torch.Tensor,
        packed: torch.Tensor,
        token_scale: torch.Tensor,
        channel_scale: torch.Tensor,
        bias: torch.Tensor | None,
        out: torch.Tensor,
        *,
        family: Family,
        n: int,
        k: int,
    ) -> None:
        """Launch on torch's current stream and device, without waiting.

        x [M, k] int8 or float8_e4m3fn; packed uint8, an [n, k] weight packed for the family; token_scale float32 of M
        and channel_scale float32 of n values, bias bfloat16 of n or None; out bfloat16 [M, n]. All contiguous, on one
        GPU; that, types and sizes are the caller's to know: a launch is to cost little.
        """
        problem = _Problem(x.shape[0], n, k, TYPES[x.dtype], family)
        operands = _Operands(
            x.data_ptr(), packed.data_ptr(), token_scale.data_ptr(), channel_scale.data_ptr(),
            None if bias is None else bias.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        chosen = ctypes.byref(_c_config(config))
        self._call("ss_fused_gemm", ctypes.byref(problem), chosen, ctypes.byref(operands), stream)

    def _call(self, name: str, *arguments: object) -> None:
        status = getattr(self._c, name)(*arguments)
        if status != 0:
            kind = UnsupportedHere if status == UNSUPPORTED else SlideSparseError
            raise kind(str(self._c.ss_fused_error().decode()))


@lru_cache(maxsize=1)
def load(folder: Path | None = None) -> FusedLibrary:
    """The library built from csrc/fused.

    Raises:
        UnsupportedHere: not built (says what to do).
        SlideSparseError: the file there is another library, or of another version.
    """
    path = (folder or Path(__file__).parent / "lib") / LIBRARY
    if not path.exists():
        raise UnsupportedHere(f"{path}: not built; run `python -m slidesparse.kernels.build` where there is an nvcc")
    return FusedLibrary(path)


def _config(c: _Config) -> Config:
    name, *sizes = (getattr(c, field) for field, *_ in _Config._fields_)
    return Config(name.decode(), *sizes)


@lru_cache(maxsize=4096)
def _c_config(config: Config) -> _Config:
    name, *sizes = astuple(config)
    return _Config(name.encode(), *sizes)


@lru_cache(maxsize=1)
def revision() -> str:
    """8 hex digits over the library beside the package; empty where it is not built."""
    path = Path(__file__).parent / "lib" / LIBRARY
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8] if path.exists() else ""
