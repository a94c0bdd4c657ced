"""Backend `cusparselt`: 2:4 sparse GEMMs by cuSPARSELt. It fuses no per-token scales: dequantise + bias follows."""

from __future__ import annotations

from functools import lru_cache

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, UnsupportedHere
from slidesparse.kernels import gemm_library, two_of_four
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.kernels.gemm_library import PLAIN, GemmAlgorithm, Problem
from slidesparse.kernels.gpu import LibraryBackend
from slidesparse.pattern import K_ALIGNMENT, KEPT, WINDOW, align

M_ALIGNMENT = 16
"""cuSPARSELt takes no other M; ragged ones are copied into padded buffers and back."""
ANY_M = 64
"""The compressed form does not depend on M: any serves to make it."""


class CusparseLt(LibraryBackend):
    """`Weight.data`: cuSPARSELt's compressed form, uint8."""

    name = "cusparselt"
    sparse = True

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        problem = self._problem(dtype, align(m, M_ALIGNMENT), n, k)
        return tuple(_described(found) for found in self._listed(problem).values())

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        n, k = codes.shape
        if k % K_ALIGNMENT:
            raise CheckpointError(f"{layer}: {k} columns; 2:4 needs a multiple of {K_ALIGNMENT}: lift the weight first")
        on_gpu = codes.to(self.device).contiguous()
        _require_two_of_four(on_gpu, layer)
        compressed = gemm_library.load().compress(self._problem(dtype, ANY_M, n, k), on_gpu)
        return Weight(n, k, dtype, compressed, compressed.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        from slidesparse.kernels import gemm_ops

        m = x.shape[0]
        if m % M_ALIGNMENT:
            padded = x.new_zeros(align(m, M_ALIGNMENT), x.shape[1])
            padded[:m] = x
            wide = out.new_empty(padded.shape[0], out.shape[1])
            out.copy_(self.gemm(padded, weight, algorithm, wide)[:m])
            return out
        problem = self._problem(weight.dtype, m, weight.n, weight.k)
        found = self._listed(problem).get(algorithm.name)
        if found is None:
            raise UnsupportedHere(f"cusparselt has no algorithm {algorithm.name} for {problem}")
        gemm_ops.sparse_gemm(x, weight.data, out, found.alg_id, found.split_k, found.workspace)
        return out

    def _problem(self, dtype: DType, m: int, n: int, k: int) -> Problem:
        return Problem(m, n, k, dtype.torch, self.output(dtype), PLAIN)

    @staticmethod
    @lru_cache(maxsize=4096)
    def _listed(problem: Problem) -> dict[str, GemmAlgorithm]:
        found = gemm_library.load().sparse_algorithms(problem)
        return {algorithm_name(algorithm): algorithm for algorithm in found}


def algorithm_name(found: GemmAlgorithm) -> str:
    """Number and split-K."""
    return f"{found.alg_id}.s{found.split_k}"


def _described(found: GemmAlgorithm) -> Algorithm:
    split = "segment-K" if found.split_k == -1 else f"split-K {found.split_k}"
    return Algorithm(found.alg_id, algorithm_name(found), split, found.split_k, found.workspace)


def _require_two_of_four(codes: torch.Tensor, layer: str) -> None:
    """The library would drop what is too much without a word. -0 of a float type is a zero."""
    nonzero = codes.float() != 0 if codes.dtype.is_floating_point else codes != 0
    two_of_four.refuse(nonzero.unflatten(1, (-1, WINDOW)).sum(dim=2) > KEPT, layer)
