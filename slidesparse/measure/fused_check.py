"""Is our own sparse GEMM right on this GPU? Every way to run it, at sizes that have every kind of edge: a few seconds.

Kernels of GPUs that this project could not try compile everywhere and run here for the first time: this, tuning and the
kernel bench (which check each algorithm at each of their sizes) say whether they may be trusted.
"""

from __future__ import annotations

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import operands
from slidesparse.kernels.backend import backend
from slidesparse.measure.gemm_point import LayerWeight, Product
from slidesparse.measure.scaled_point import ScaledPoint
from slidesparse.pattern import Sparsity

SIZES = ((1, 8, 32), (77, 264, 160), (300, 1032, 640), (700, 520, 1088))
"""(M, N, K): the smallest, ragged in all directions, more tiles than one block makes."""
SEED = 7


def problem_here(dtype: DType) -> str:
    """One line about the first algorithm that is wrong on this GPU; empty where all are right.

    Raises UnsupportedHere where the GEMM cannot run at all.
    """
    side = backend("fused")
    pattern = Sparsity(4)
    for m, n, k in SIZES:
        plain = operands.random_weight(n, k, dtype, pattern, SEED, side.device)
        weight = LayerWeight.pack(plain, "random", dtype, pattern, side, "doctor")
        point = ScaledPoint(side, weight, Product(plain, dtype, m, SEED), pattern)
        for algorithm in point.algorithms():
            found = point.check(algorithm)
            if not found.ok:
                return f"{algorithm.name} at M={m} N={n} K={k} {dtype.value}: {found.text}"
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return ""
