"""Backend `fused`: our own 2:4 GEMM, with both scales, the bias and bfloat16 in its epilogue.

    y[m, n] = bf16((float32(acc[m, n]) * scale_token[m]) * scale_channel[n] + bias[n])

There is no form without the epilogue. INT8 equals `reference.dequantise_bias` bit for bit. The kernels are those of
csrc/fused, wgmma's on Hopper and mma.sp's on all other GPUs; `kernels/fused_library.py` loads them, docs/fused-gemm.md
says what was tried and measured.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, UnsupportedHere
from slidesparse.kernels import fused_library, fused_pack_mma, fused_pack_wgmma, gpu
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.kernels.fused_library import Config, Family
from slidesparse.kernels.gpu import LibraryBackend
from slidesparse.machine import Machine
from slidesparse.pattern import K_ALIGNMENT

HOPPER = 9
N_ALIGNMENT = 8
"""Rows of out are stored in pieces of 16 bytes."""


class Fused(LibraryBackend):
    """`Weight.data`: our own packed form, uint8 (`fused_pack_wgmma`, `fused_pack_mma`)."""

    name = "fused"
    sparse = True
    scaled_only = True

    def require(self, machine: Machine, dtype: DType) -> None:
        gpu.require(self.name, machine, dtype)
        assert machine.gpu is not None
        if not dtype.quantised:
            raise UnsupportedHere(f"backend fused has INT8 and FP8E4M3, not {dtype.value}")
        fused_library.load()

    def output(self, dtype: DType) -> torch.dtype:
        return torch.bfloat16

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        """Raises UnsupportedHere: there is no GEMM without scales."""
        raise UnsupportedHere("backend fused has no GEMM without scales")

    def scaled_algorithms(self, dtype: DType, m: int, n: int, k: int, bias: bool) -> tuple[Algorithm, ...]:
        if not dtype.quantised or n % N_ALIGNMENT or k % K_ALIGNMENT:
            return ()
        return tuple(_described(config) for config in _listed(m, n, k, dtype.torch).values())

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        n, k = codes.shape
        if k % K_ALIGNMENT:
            raise CheckpointError(f"{layer}: {k} columns; 2:4 needs a multiple of {K_ALIGNMENT}: lift the weight first")
        pack = fused_pack_wgmma.pack if family_of(_capability()) is Family.WGMMA else fused_pack_mma.pack
        packed = pack(codes.to(self.device), layer)
        return Weight(n, k, dtype, packed, packed.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        """Raises UnsupportedHere, as `algorithms` does."""
        raise UnsupportedHere("backend fused has no GEMM without scales")

    def gemm_scaled(
        self,
        x: torch.Tensor,
        scale_token: torch.Tensor,
        weight: Weight,
        scale_channel: torch.Tensor,
        bias: torch.Tensor | None,
        algorithm: Algorithm,
        out: torch.Tensor,
    ) -> torch.Tensor:
        from slidesparse.kernels import gemm_ops

        size = x.shape[0], weight.n, weight.k
        config = _listed(*size, weight.dtype.torch).get(algorithm.name)
        if config is None:
            m, n, k = size
            raise UnsupportedHere(f"fused has no algorithm {algorithm.name} for M={m} N={n} K={k} {weight.dtype.value}")
        gemm_ops.fused_gemm(x, scale_token, weight.data, scale_channel, bias, out, config, family_of(_capability()))
        return out

    def path(self, dtype: DType, algorithm: Algorithm) -> str:
        return f"{self.name} {algorithm.name} ({algorithm.config}), {dtype.value} -> bfloat16"


def family_of(capability: tuple[int, int]) -> Family:
    """The kernels of a GPU: wgmma is Hopper's alone."""
    return Family.WGMMA if capability[0] == HOPPER else Family.MMA


@lru_cache(maxsize=1)
def _capability() -> tuple[int, int]:
    return torch.cuda.get_device_capability()


@lru_cache(maxsize=4096)
def _listed(m: int, n: int, k: int, dtype: torch.dtype) -> dict[str, Config]:
    found = fused_library.load().configs(_capability(), m, n, k, dtype, family_of(_capability()))
    return {config.name: config for config in found}


def _described(config: Config) -> Algorithm:
    parts = [f"tile {config.channels}x{config.tokens}x{config.k}", f"stages {config.stages}"]
    parts.append(f"cluster {config.cluster_channels}x{config.cluster_tokens}")
    parts.append(f"split-K {config.split_k}, group {config.group}, head start {config.head_start}")
    return Algorithm(config.index, config.name, ", ".join(parts), config.split_k)
