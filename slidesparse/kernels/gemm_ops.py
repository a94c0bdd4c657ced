"""The library GEMMs as torch operators: opaque to torch.compile, safe in CUDA graphs.

    slidesparse::dense_gemm(x, w, out!, opaque, workspace)
    slidesparse::dense_gemm_scaled(x, scale_token, w, scale_channel, bias?, out!, opaque, workspace)
    slidesparse::sparse_gemm(x, compressed, out!, alg_id, split_k, workspace)

An algorithm travels as plain numbers: no pointer and no plan handle ends up in a compiled graph. A plan is made at an
algorithm's first call, so call once before capturing.
"""

from __future__ import annotations

import struct

import torch

from slidesparse.kernels import gemm_library
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


@torch.library.custom_op(f"{NAMESPACE}::dense_gemm", mutates_args=("out",), device_types="cuda")
def dense_gemm(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, opaque: list[int], workspace: int) -> None:
    """x [M, K], w [N, K] of one type -> out [M, N]."""
    problem = Problem(x.shape[0], w.shape[0], x.shape[1], x.dtype, out.dtype, PLAIN)
    gemm_library.load().dense_gemm(problem, _algorithm(opaque, workspace), x, w, out, _workspace(x, workspace))


@torch.library.custom_op(f"{NAMESPACE}::dense_gemm_scaled", mutates_args=("out",), device_types="cuda")
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
    epilogue = SCALED if bias is None else SCALED_BIAS
    problem = Problem(x.shape[0], w.shape[0], x.shape[1], x.dtype, out.dtype, epilogue)
    gemm_library.load().dense_gemm(
        problem, _algorithm(opaque, workspace), x, w, out, _workspace(x, workspace), scale_token, scale_channel, bias
    )


@torch.library.custom_op(f"{NAMESPACE}::sparse_gemm", mutates_args=("out",), device_types="cuda")
def sparse_gemm(
    x: torch.Tensor, compressed: torch.Tensor, out: torch.Tensor, alg_id: int, split_k: int, workspace: int
) -> None:
    """x [M, K'], compressed 2:4 weight -> out [M, N]."""
    problem = Problem(x.shape[0], out.shape[1], x.shape[1], x.dtype, out.dtype, PLAIN)
    algorithm = GemmAlgorithm(alg_id, split_k, workspace, bytes(64), -1, -1, -1)
    gemm_library.load().sparse_gemm(problem, algorithm, x, compressed, out, _workspace(x, workspace))


@dense_gemm.register_fake
def _(x: torch.Tensor, w: torch.Tensor, out: torch.Tensor, opaque: list[int], workspace: int) -> None:
    _fits(x, w.shape[0], out)
    torch._check(x.shape[1] == w.shape[1], lambda: f"x has {x.shape[1]} columns, w {w.shape[1]}")


@dense_gemm_scaled.register_fake
def _(
    x: torch.Tensor,
    scale_token: torch.Tensor,
    w: torch.Tensor,
    scale_channel: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    opaque: list[int],
    workspace: int,
) -> None:
    _fits(x, w.shape[0], out)
    torch._check(x.shape[1] == w.shape[1], lambda: f"x has {x.shape[1]} columns, w {w.shape[1]}")


@sparse_gemm.register_fake
def _(x: torch.Tensor, compressed: torch.Tensor, out: torch.Tensor, alg_id: int, split_k: int, workspace: int) -> None:
    _fits(x, out.shape[1], out)


def _fits(x: torch.Tensor, n: int, out: torch.Tensor) -> None:
    torch._check(
        out.shape[0] == x.shape[0] and out.shape[1] == n,
        lambda: f"out is {tuple(out.shape)}, expected {(x.shape[0], n)}",
    )
