"""The GEMMs as torch operators: opaque to torch.compile, safe in CUDA graphs.

    slidesparse::dense_gemm(x, w, out!, opaque, workspace)
    slidesparse::dense_gemm_scaled(x, scale_token, w, scale_channel, bias?, out!, opaque, workspace)
    slidesparse::sparse_gemm(x, compressed, out!, alg_id, split_k, workspace)
    slidesparse::fused_gemm(x, scale_token, packed, scale_channel, bias?, out!, name, numbers, family)

An algorithm travels as plain numbers: no pointer and no plan handle ends up in a compiled graph. A plan is made at an
algorithm's first call, so call once before capturing. The functions of this file are these operators where something
is traced, and go straight to the library elsewhere: an operator that writes to an operand costs about 40 us of Python.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import torch

from slidesparse.kernels import fused_library, gemm_library
from slidesparse.kernels.fused_library import Config, Family
from slidesparse.kernels.gemm_library import PLAIN, SCALED, SCALED_BIAS, GemmAlgorithm, Problem

NAMESPACE = "slidesparse"
_OPAQUE = struct.Struct("<8q")


def opaque_numbers(algorithm: GemmAlgorithm) -> list[int]:
    """cuBLASLt's own description of an algorithm as 8 integers."""
    return list(_OPAQUE.unpack(algorithm.opaque))


def _algorithm(opaque: list[int], workspace: int) -> GemmAlgorithm:
    return GemmAlgorithm(-1, 1, workspace, _OPAQUE.pack(*opaque), -1, -1, -1)


def _workspace(x: torch.Tensor, count: int) -> torch.Tensor:
    """Scratch memory from torch's allocator, which knows streams and graph captures."""
    return torch.empty(count, dtype=torch.uint8, device=x.device)


def _dense_gemm(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, opaque: list[int], workspace: int) -> None:
    problem = Problem(x.shape[0], w.shape[0], x.shape[1], x.dtype, out.dtype, PLAIN)
    gemm_library.load().dense_gemm(problem, _algorithm(opaque, workspace), x, w, out, _workspace(x, workspace))


def _dense_gemm_scaled(
    x: torch.Tensor,
    scale_token: torch.Tensor,
    w: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    opaque: list[int],
    workspace: int,
) -> None:
    epilogue = SCALED if bias is None else SCALED_BIAS
    problem = Problem(x.shape[0], w.shape[0], x.shape[1], x.dtype, out.dtype, epilogue)
    gemm_library.load().dense_gemm(
        problem, _algorithm(opaque, workspace), x, w, out, _workspace(x, workspace), scale_token, scale_channel, bias
    )


def _sparse_gemm(
    x: torch.Tensor, compressed: torch.Tensor, out: torch.Tensor, alg_id: int, split_k: int, workspace: int
) -> None:
    problem = Problem(x.shape[0], out.shape[1], x.shape[1], x.dtype, out.dtype, PLAIN)
    algorithm = GemmAlgorithm(alg_id, split_k, workspace, bytes(64), -1, -1, -1)
    gemm_library.load().sparse_gemm(problem, algorithm, x, compressed, out, _workspace(x, workspace))


def _fused_gemm(
    x: torch.Tensor,
    scale_token: torch.Tensor,
    packed: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    name: str,
    numbers: list[int],
    family: int,
) -> None:
    config, n, k = Config(name, *numbers), out.shape[1], x.shape[1]
    fused_library.load().gemm(config, x, packed, scale_token, scale_channel, bias, out, family=Family(family), n=n, k=k)


def _fits(x: torch.Tensor, n: int, out: torch.Tensor) -> None:
    torch._check(
        out.shape[0] == x.shape[0] and out.shape[1] == n,
        lambda: f"out is {tuple(out.shape)}, expected {(x.shape[0], n)}",
    )


def _fits_dense(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor) -> None:
    _fits(x, w.shape[0], out)
    torch._check(x.shape[1] == w.shape[1], lambda: f"x has {x.shape[1]} columns, w {w.shape[1]}")


def _operator(name: str, body: Callable[..., None], fake: Callable[..., None]) -> Any:
    """fake: what tracing runs instead."""
    operator = torch.library.custom_op(f"{NAMESPACE}::{name}", body, mutates_args=("out",), device_types="cuda")
    operator.register_fake(fake)
    return operator


dense_gemm_op = _operator("dense_gemm", _dense_gemm, lambda x, w, out, opaque, workspace: _fits_dense(x, w, out))
dense_gemm_scaled_op = _operator(
    "dense_gemm_scaled", _dense_gemm_scaled, lambda x, token, w, channel, bias, out, *rest: _fits_dense(x, w, out)
)
fused_gemm_op = _operator(
    "fused_gemm", _fused_gemm, lambda x, token, packed, channel, bias, out, *rest: _fits(x, channel.shape[0], out)
)
sparse_gemm_op = _operator("sparse_gemm", _sparse_gemm, lambda x, compressed, out, *rest: _fits(x, out.shape[1], out))


def dense_gemm(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, opaque: list[int], workspace: int) -> None:
    """x [M, K], w [N, K] of one type -> out [M, N]."""
    run = dense_gemm_op if torch.compiler.is_compiling() else _dense_gemm
    run(x, w, out, opaque, workspace)


def dense_gemm_scaled(
    x: torch.Tensor,
    scale_token: torch.Tensor,
    w: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    opaque: list[int],
    workspace: int,
) -> None:
    """As `dense_gemm`, with float32 scales [M, 1], [N, 1] and bfloat16 bias [N] in its epilogue; out bfloat16."""
    run = dense_gemm_scaled_op if torch.compiler.is_compiling() else _dense_gemm_scaled
    run(x, scale_token, w, scale_channel, bias, out, opaque, workspace)


def sparse_gemm(
    x: torch.Tensor, compressed: torch.Tensor, out: torch.Tensor, alg_id: int, split_k: int, workspace: int
) -> None:
    """x [M, K'], compressed 2:4 weight -> out [M, N]."""
    run = sparse_gemm_op if torch.compiler.is_compiling() else _sparse_gemm
    run(x, compressed, out, alg_id, split_k, workspace)


def fused_gemm(
    x: torch.Tensor,
    scale_token: torch.Tensor,
    packed: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    config: Config,
    family: Family,
) -> None:
    """x [M, K'], packed 2:4 weight, float32 scales [M, 1], [N, 1], bfloat16 bias [N] -> out bfloat16 [M, N]."""
    run = fused_gemm_op if torch.compiler.is_compiling() else _fused_gemm
    name, *numbers = astuple(config)
    run(x, scale_token, packed, scale_channel, bias, out, name, numbers, int(family))
