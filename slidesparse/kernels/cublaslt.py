"""Backend `cublaslt`: dense GEMMs by cuBLASLt. FP8 can carry both scales and the bias in its epilogue."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import gemm_library
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.kernels.gemm_library import PLAIN, SCALED, SCALED_BIAS, GemmAlgorithm, Problem
from slidesparse.kernels.gpu import LibraryBackend


class CublasLt(LibraryBackend):
    """`Weight.data`: codes [N, K] as they are."""

    name = "cublaslt"
    sparse = False

    def algorithms(self, dtype: DType, m: int, n: int, k: int) -> tuple[Algorithm, ...]:
        return tuple(_described(found) for found in self._listed(self._problem(dtype, m, n, k, PLAIN)).values())

    def scaled_algorithms(self, dtype: DType, m: int, n: int, k: int, bias: bool) -> tuple[Algorithm, ...]:
        if dtype is not DType.FP8:
            return ()
        problem = self._problem(dtype, m, n, k, SCALED_BIAS if bias else SCALED)
        try:
            return tuple(_described(found) for found in self._listed(problem).values())
        except UnsupportedHere:  # by rows and columns: Hopper has it, others may not
            return ()

    def pack(self, codes: torch.Tensor, dtype: DType, layer: str) -> Weight:
        n, k = codes.shape
        on_gpu = codes.to(self.device).contiguous()
        return Weight(n, k, dtype, on_gpu, on_gpu.nbytes)

    def gemm(self, x: torch.Tensor, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:
        from slidesparse.kernels import gemm_ops

        found = self._find(self._problem(weight.dtype, x.shape[0], weight.n, weight.k, PLAIN), algorithm)
        gemm_ops.dense_gemm(x, weight.data, out, gemm_ops.opaque_numbers(found), found.workspace)
        return out

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

        epilogue = SCALED if bias is None else SCALED_BIAS
        found = self._find(self._problem(weight.dtype, x.shape[0], weight.n, weight.k, epilogue), algorithm)
        numbers = gemm_ops.opaque_numbers(found)
        gemm_ops.dense_gemm_scaled(x, scale_token, weight.data, scale_channel, bias, out, numbers, found.workspace)
        return out

    def _problem(self, dtype: DType, m: int, n: int, k: int, epilogue: int) -> Problem:
        return Problem(m, n, k, dtype.torch, self.output(dtype), epilogue)

    def _find(self, problem: Problem, algorithm: Algorithm) -> GemmAlgorithm:
        found = self._listed(problem).get(algorithm.name)
        if found is None:
            raise UnsupportedHere(f"cublaslt has no algorithm {algorithm.name} for {problem}")
        return found

    @staticmethod
    @lru_cache(maxsize=4096)
    def _listed(problem: Problem) -> dict[str, GemmAlgorithm]:
        found = gemm_library.load().dense_algorithms(problem)
        return {_name(algorithm): algorithm for algorithm in found}


def _name(found: GemmAlgorithm) -> str:
    """Id and a hash over the library's whole description: tile, stages, cluster and more share one id."""
    return f"{found.alg_id}-{hashlib.sha256(found.opaque).hexdigest()[:6]}"


def _described(found: GemmAlgorithm) -> Algorithm:
    config = f"tile {found.tile}, stages {found.stages}, cluster {found.cluster}, split-K {found.split_k}"
    return Algorithm(found.alg_id, _name(found), config, found.split_k, found.workspace)
