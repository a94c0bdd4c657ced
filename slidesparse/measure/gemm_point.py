"""One point of the kernel bench: operands, checked algorithms, their ranking, and the dense twin.

A sparse point and its dense twin compute the same product: the twin multiplies the unlifted weight and activation,
of which the sparse operands are the lifted form. So one reference checks both, and their samples are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere, VerificationError
from slidesparse.kernels import operands, reference, verify
from slidesparse.kernels.backend import Algorithm, Backend, Weight
from slidesparse.kernels.verify import Check
from slidesparse.measure.timer import Clock, Samples, measure
from slidesparse.pattern import KEPT, WINDOW, Sparsity


@dataclass(frozen=True)
class LayerWeight:
    """One weight, as codes and in the form that each side multiplies."""

    plain: torch.Tensor
    """Unlifted codes [N, K]: what the reference multiplies."""
    packed: Weight
    data: str
    """`model` or `random`."""

    @classmethod
    def pack(
        cls, plain: torch.Tensor, data: str, dtype: DType, sparsity: Sparsity | None, side: Backend, layer: str
    ) -> LayerWeight:
        """Raises CheckpointError when the codes do not keep to the pattern."""
        codes = plain if sparsity is None else operands.lift(plain, sparsity, layer)
        return cls(plain, side.pack(codes, dtype, layer), data)


@dataclass(frozen=True)
class Product:
    """Activation codes [M, K] and the exact product with one weight."""

    codes: torch.Tensor
    exact: torch.Tensor
    """float64 [M, N]."""
    magnitude: torch.Tensor | None
    """float64 [M, N] for FP8 (`reference.magnitude`)."""

    @classmethod
    def make(cls, plain: torch.Tensor, dtype: DType, m: int, seed: int) -> Product:
        """Quantised random activations times unlifted codes [N, K]."""
        codes, _ = reference.quantise(operands.activation(m, plain.shape[1], seed), dtype)
        magnitude = None if dtype is DType.INT8 else reference.magnitude(codes, plain)
        return cls(codes, reference.gemm(codes, plain), magnitude)


@dataclass(frozen=True)
class Ranked:
    """One algorithm of a point, checked and timed."""

    algorithm: Algorithm
    call: Callable[[], torch.Tensor]
    check: Check
    samples: Samples


def checked_call(
    side: Backend, algorithm: Algorithm, x: torch.Tensor, weight: Weight, product: Product
) -> tuple[Callable[[], torch.Tensor], Check]:
    """A call of one algorithm, after it has filled a poisoned output with the right product.

    Raises:
        VerificationError: it did not.
    """
    out = torch.empty(x.shape[0], weight.n, dtype=reference.accumulator(weight.dtype))

    def call() -> torch.Tensor:
        return side.gemm(x, weight, algorithm, out)

    verify.poison(out)
    terms = weight.k * KEPT // WINDOW if side.sparse else weight.k
    check = verify.check_gemm(call(), product.exact, product.magnitude, weight.dtype, terms)
    if not check.ok:
        raise VerificationError(f"{side.name} {algorithm.name}: check failed: {check.text}")
    return call, check


def rank(
    side: Backend, x: torch.Tensor, weight: Weight, product: Product, stopping: Stopping, clock: Clock
) -> list[Ranked]:
    """Check, then time every algorithm: fastest first. One that does not support the size is left out.

    Raises:
        VerificationError: an algorithm gives a wrong product. The whole point is in doubt, so nothing is timed.
        UnsupportedHere: no algorithm supports the size.
    """
    calls = []
    refusals = []
    for algorithm in side.algorithms(weight.dtype, x.shape[0], weight.n, weight.k):
        try:
            calls.append((algorithm, *checked_call(side, algorithm, x, weight, product)))
        except UnsupportedHere as error:
            refusals.append(str(error))
    if not calls:
        raise UnsupportedHere(f"{side.name}: no algorithm supports this size ({'; '.join(refusals) or 'none offered'})")
    ranked = [Ranked(algorithm, call, check, measure(call, stopping, clock)) for algorithm, call, check in calls]
    return sorted(ranked, key=lambda entry: entry.samples.interval.median)
