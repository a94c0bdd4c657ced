"""One GEMM at one size: operands, the exact product, algorithms that are checked before they are timed.

A sparse point and its dense twin compute the same product: the twin multiplies the unlifted weight and activation,
of which the sparse operands are the lifted form. So one reference checks both, and their samples are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import torch

from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere, VerificationError
from slidesparse.kernels import lost_contexts, operands, reference, verify
from slidesparse.kernels.backend import Algorithm, Backend, Weight
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.kernels.verify import Check, Expected
from slidesparse.measure.clocks import buffer_sets
from slidesparse.measure.telemetry import TELEMETRY_PERIOD_S, Probe, measured_unthrottled
from slidesparse.measure.timer import Call, Clock, Samples, leading, measure_together
from slidesparse.pattern import Sparsity


@dataclass(frozen=True)
class LayerWeight:
    """One weight, as codes and in the form that one side multiplies."""

    plain: torch.Tensor
    """Unlifted codes [N, K]: what the reference multiplies."""
    packed: Weight
    packed_signs: Weight | None
    """The signs of the codes, packed: for the sharp check of types whose sums are rounded."""
    data: str
    """`model` or `random`."""

    @classmethod
    def pack(
        cls, plain: torch.Tensor, data: str, dtype: DType, sparsity: Sparsity | None, side: Backend, layer: str
    ) -> LayerWeight:
        """Raises CheckpointError when the codes do not keep to the pattern."""
        plain = plain.to(side.device)
        codes = plain if sparsity is None else operands.lift(plain, sparsity, layer)
        signs = None if dtype is DType.INT8 else side.pack(operands.signs(codes), dtype, layer)
        return cls(plain, side.pack(codes, dtype, layer), signs, data)


class Product:
    """Activation codes [M, K] times one weight: what both sides of a comparison must give."""

    def __init__(self, plain: torch.Tensor, dtype: DType, m: int, seed: int) -> None:
        """Random activations for unlifted codes [N, K], on their device."""
        self.dtype, self._plain, self._seed = dtype, plain, seed
        device = "cuda" if plain.is_cuda else "cpu"
        self.codes = operands.codes_of(operands.activation(m, plain.shape[1], seed, device), dtype)
        self._expected: dict[tuple[object, ...], Expected] = {}
        self._signs: dict[torch.dtype, torch.Tensor] = {}

    def expected(self, side: Backend, k: int, out: torch.dtype, scaled: bool = False) -> Expected:
        """What `side` must give for sums over k positions, written as `out`; scaled: with `scales` applied."""
        error, exact = side.accumulation_error(self.dtype, k), not scaled or side.exact_epilogue
        key = error[0], out, scaled, exact
        if key not in self._expected:
            norm, scales = side.norm_error(self.dtype), self.scales if scaled else None
            self._expected[key] = Expected(self.codes, self._plain, self.dtype, error, out, norm, scales, exact)
        return self._expected[key]

    @cached_property
    def scales(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Random ones for tokens [M, 1] and channels [N, 1], float32, as large as real ones."""
        sizes, device = (self.codes.shape[0], self._plain.shape[0]), self.codes.device
        generator = torch.Generator(device).manual_seed(self._seed)
        token, channel = (torch.rand(size, 1, generator=generator, device=device) * 1e-2 + 1e-3 for size in sizes)
        return token, channel

    @cached_property
    def sign_codes(self) -> torch.Tensor:
        """The signs of the activations' codes."""
        return operands.signs(self.codes)

    def exact_signs(self, dtype: torch.dtype) -> torch.Tensor:
        """Their product with the signs of the weight: integers up to K, rounded to `dtype`, [M, N]."""
        if dtype not in self._signs:
            weight = operands.signs(self._plain)
            out = torch.empty(self.codes.shape[0], weight.shape[0], dtype=dtype, device=weight.device)
            for rows in verify.row_blocks((out.shape[0], out.shape[1])):
                out[rows] = reference.gemm(self.sign_codes[rows], weight)
            self._signs[dtype] = out
        return self._signs[dtype]


@dataclass(frozen=True)
class Candidate:
    """An algorithm that has passed its check, and its calls on all sets of buffers."""

    algorithm: Algorithm
    check: Check
    calls: list[Call]


@dataclass(frozen=True)
class Ranked:
    """A candidate that was timed."""

    algorithm: Algorithm
    check: Check
    samples: Samples


class GemmPoint:
    """One side's operands for one product, in as many sets as the caches ask for."""

    def __init__(self, side: Backend, weight: LayerWeight, product: Product, sparsity: Sparsity | None) -> None:
        self.side, self._weight, self._product = side, weight, product
        packed, m = weight.packed, product.codes.shape[0]
        self._lift: Callable[[torch.Tensor], torch.Tensor] = (
            (lambda codes: codes) if sparsity is None else partial(reference.lift, sparsity=sparsity)
        )
        x = self._lift(product.codes)
        out = torch.empty(m, packed.n, dtype=self.written, device=side.device)
        sets = buffer_sets(side, x.nbytes + packed.nbytes + out.nbytes)
        self._sets = [(x, packed, out)]
        self._sets += [(x.clone(), packed.copy(), torch.empty_like(out)) for _ in range(sets - 1)]

    scaled: ClassVar[bool] = False
    """Its result has both scales applied."""

    @property
    def written(self) -> torch.dtype:
        """Type of what the GEMM itself writes."""
        return self.side.output(self._product.dtype)

    def algorithms(self) -> tuple[Algorithm, ...]:
        """All that the side offers for this size."""
        x, packed, _ = self._sets[0]
        return self.side.algorithms(packed.dtype, x.shape[0], packed.n, packed.k)

    def run(
        self,
        x: torch.Tensor,
        packed: Weight,
        scales: tuple[torch.Tensor, torch.Tensor],
        algorithm: Algorithm,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """What is timed: overwrites `out`, returns the result. Scales are for points with an epilogue."""
        return self.side.gemm(x, packed, algorithm, out)

    def path(self, algorithm: Algorithm) -> str:
        """What `run` runs, for the records."""
        return self.side.path(self._product.dtype, algorithm)

    def calls(self, algorithm: Algorithm) -> list[Call]:
        """The GEMM on each set of buffers."""
        scales = self._product.scales
        return [partial(self.run, x, packed, scales, algorithm, out) for x, packed, out in self._sets]

    def check(self, algorithm: Algorithm, figures: bool = True) -> Check:
        """Run once on a poisoned output and compare; 16-bit sums also on operands whose sums are exact.

        `figures`: also say how much of the bound was used (slower).
        """
        x, packed, out = self._sets[0]
        expected = self._product.expected(
            self.side, packed.k, torch.bfloat16 if self.scaled else self.written, self.scaled
        )
        lost_contexts.settle(self.side)
        got = self.run(x, packed, self._product.scales, algorithm, verify.poison(out))
        lost_contexts.wait(self.side)
        if figures or not expected.holds(got):
            result = expected.check(got)
            if not result.ok:
                return result
        else:
            result = Check("exact" if packed.dtype is DType.INT8 else "within_bound", "")
        if self._weight.packed_signs is None:
            return result
        ones = torch.ones_like(self._product.scales[0]), torch.ones_like(self._product.scales[1])
        got = self.run(self._sign_operand, self._weight.packed_signs, ones, algorithm, verify.poison(out))
        sharp = verify.check_same(got, self._product.exact_signs(got.dtype), "exact product of the operands' signs")
        return Check(result.verified, f"{result.text}; {sharp.text}") if sharp.ok else sharp

    @cached_property
    def _sign_operand(self) -> torch.Tensor:
        return self._lift(self._product.sign_codes)

    def candidates(self, losses: LostContexts) -> tuple[list[Candidate], dict[str, str]]:
        """Algorithms that pass their check, and why others were refused.

        Raises:
            VerificationError: an algorithm gives a wrong product. The whole point is in doubt.
            ContextLost: an algorithm has crashed the GPU's context.
        """
        good, refused = [], {}
        dtype = self._product.dtype
        barred = losses.barred(self.side, dtype)
        for algorithm in self.algorithms():
            if algorithm.name in barred:
                refused[algorithm.name] = f"{algorithm.name} crashed the GPU context in an earlier run"
                continue
            try:
                with losses.guard(self.side, dtype, algorithm.name):
                    check = self.check(algorithm, figures=self.side.device == "cpu")
            except UnsupportedHere as error:
                refused[algorithm.name] = str(error)
                continue
            if not check.ok:
                raise VerificationError(f"{self.side.name} {algorithm.name}: check failed: {check.text}")
            good.append(Candidate(algorithm, check, self.calls(algorithm)))
        return good, refused


@dataclass(frozen=True)
class Ranking:
    """What `rank` found."""

    leaders: list[Ranked]
    """Fastest first."""
    rivals: list[Samples]
    """Of the calls of the other side, in their order."""
    checked: int
    """Algorithms that passed their check."""
    telemetry: dict[str, Any]
    """Columns of what the device did while the leaders were timed."""


def rank(
    point: GemmPoint,
    stopping: Stopping,
    clock: Clock,
    seed: int,
    losses: LostContexts,
    probe: Probe,
    rivals: Sequence[Call] = (),
) -> Ranking:
    """Check all algorithms, then measure the leaders together with the prepared calls `rivals`, the best known of them
    last.

    Raises:
        VerificationError: an algorithm gives a wrong product.
        UnsupportedHere: no algorithm supports the size.
        ContextLost: an algorithm has crashed the GPU's context.
    """
    candidates, refused = point.candidates(losses)
    if not candidates:
        why = "; ".join(dict.fromkeys(refused.values())) or "none offered"
        raise UnsupportedHere(f"{point.side.name}: no algorithm supports this size ({why})")
    chosen = [candidates[place] for place in leading([candidate.calls for candidate in candidates], clock)]
    calls = [*(clock.prepare(candidate.calls) for candidate in chosen), *rivals]
    timed, watched = measured_unthrottled(
        probe, lambda: measure_together(calls, stopping, clock, seed), TELEMETRY_PERIOD_S
    )
    leaders = [
        Ranked(candidate.algorithm, candidate.check, samples) for candidate, samples in zip(chosen, timed, strict=False)
    ]
    leaders.sort(key=lambda entry: entry.samples.interval.median)
    return Ranking(leaders, timed[len(chosen) :], len(candidates), watched)
