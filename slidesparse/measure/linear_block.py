"""The merged linears of a decoder block as things to time: whole, and step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from slidesparse.kernels.backend import ActivationOperation, Algorithm
from slidesparse.kernels.linear import Choice, W8A8Linear
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.measure.clocks import buffer_sets
from slidesparse.measure.timer import Call, Clock, leading
from slidesparse.plan import Operation


@dataclass(frozen=True)
class Part:
    """One linear with the tokens that it gets, on buffers of its own."""

    linear: W8A8Linear
    tokens: torch.Tensor

    def copy(self) -> Part:
        """The same, elsewhere in memory."""
        linear = copy.copy(self.linear)
        linear.weight = self.linear.weight.copy()
        return Part(linear, self.tokens.clone())


class Block:
    """Linears that run one after the other, in as many sets of buffers as the caches ask for."""

    def __init__(self, linears: Sequence[W8A8Linear], tokens: Sequence[torch.Tensor]) -> None:
        """tokens: x [M, K] of each linear."""
        parts = [Part(linear, x) for linear, x in zip(linears, tokens, strict=True)]
        size = sum(part.linear.weight.nbytes + part.tokens.nbytes for part in parts)
        sets = buffer_sets(linears[0].backend, size)
        self.sets = [parts, *([part.copy() for part in parts] for _ in range(sets - 1))]

    def calls(self, choices: Sequence[Choice]) -> list[Call]:
        """The whole block, on each set of buffers."""
        return [partial(_run, parts, choices) for parts in self.sets]

    def with_fastest(
        self,
        choices: Sequence[Choice],
        known: Callable[[Operation, W8A8Linear, int], bool],
        clock: Clock,
        losses: LostContexts,
    ) -> list[Choice]:
        """The same choices; where tuning has not looked at this very size and pattern (`known`), what leads a quick
        look."""
        ready = [Ready.make(parts, choices) for parts in self.sets]
        found = []
        for place, choice in enumerate(choices):
            gemm = self._gemm_at(place, choice, ready, known, clock, losses)
            scaled = gemm if self.sets[0][place].linear.backend.scaled_only else choice.scaled
            found.append(
                replace(choice, quantise=self._quantise_at(place, choice, known, clock), gemm=gemm, scaled=scaled)
            )
        return found

    def _quantise_at(
        self, place: int, choice: Choice, known: Callable[[Operation, W8A8Linear, int], bool], clock: Clock
    ) -> Algorithm:
        linear, m = self.sets[0][place].linear, self.sets[0][place].tokens.shape[0]
        sparsity, activations = linear.variant.sparsity, linear.backend.activations
        operation: ActivationOperation = "quantise_lift" if linear.backend.sparse else "quantise"
        if known(operation, linear, m):
            return choice.quantise
        candidates = activations.algorithms(operation, linear.dtype)
        calls: list[list[Call]] = [
            [partial(activations.quantise, parts[place].tokens, linear.dtype, sparsity, one) for parts in self.sets]
            for one in candidates
        ]
        return candidates[leading(calls, clock, count=1)[0]]

    def _gemm_at(
        self,
        place: int,
        choice: Choice,
        ready: Sequence[Ready],
        known: Callable[[Operation, W8A8Linear, int], bool],
        clock: Clock,
        losses: LostContexts,
    ) -> Algorithm:
        linear, m = self.sets[0][place].linear, self.sets[0][place].tokens.shape[0]
        if known("sparse_gemm" if linear.backend.sparse else "dense_gemm", linear, m):
            return choice.gemm
        barred = losses.barred(linear.backend, linear.dtype)
        plain, scaled = linear.recipe.offered(m, linear.bias is not None)
        candidates = [algorithm for algorithm in plain or scaled if algorithm.name not in barred]
        calls: list[list[Call]] = [
            [partial(_product, parts[place], own, place, one) for parts, own in zip(self.sets, ready, strict=True)]
            for one in candidates
        ]
        return candidates[leading(calls, clock, count=1)[0]]

    def steps(self, choices: Sequence[Choice]) -> dict[str, list[Call]]:
        """Each step alone, for all linears, on each set of buffers. The GEMM is the one without fused scales; where
        a backend has only the other there is no last step."""
        ready = [Ready.make(parts, choices) for parts in self.sets]
        steps: dict[str, list[Call]] = {
            "quantise_us": [partial(_quantise, parts, choices) for parts in self.sets],
            "gemm_us": [partial(_gemm, parts, own, choices) for parts, own in zip(self.sets, ready, strict=True)],
        }
        if not self.sets[0][0].linear.backend.scaled_only:
            steps["dequantise_us"] = [
                partial(_dequantise, parts, own, choices) for parts, own in zip(self.sets, ready, strict=True)
            ]
        return steps


@dataclass(frozen=True)
class Ready:
    """What the steps after the first start from."""

    codes: list[torch.Tensor]
    scales: list[torch.Tensor]
    accs: list[torch.Tensor]

    @classmethod
    def make(cls, parts: Sequence[Part], choices: Sequence[Choice]) -> Ready:
        codes, scales = zip(*_quantise(parts, choices), strict=True)
        accs = [
            torch.zeros(
                part.tokens.shape[0],
                part.linear.n,
                dtype=part.linear.backend.output(part.linear.dtype),
                device=part.tokens.device,
            )
            for part in parts
        ]
        return cls(list(codes), list(scales), accs)


def _run(parts: Sequence[Part], choices: Sequence[Choice]) -> list[torch.Tensor]:
    return [part.linear.run(part.tokens, choice) for part, choice in zip(parts, choices, strict=True)]


def _quantise(parts: Sequence[Part], choices: Sequence[Choice]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [
        part.linear.backend.activations.quantise(
            part.tokens, part.linear.dtype, part.linear.variant.sparsity, choice.quantise
        )
        for part, choice in zip(parts, choices, strict=True)
    ]


def _gemm(parts: Sequence[Part], ready: Ready, choices: Sequence[Choice]) -> list[torch.Tensor]:
    return [
        _product(part, ready, place, choice.gemm)
        for place, (part, choice) in enumerate(zip(parts, choices, strict=True))
    ]


def _product(part: Part, ready: Ready, place: int, algorithm: Algorithm) -> torch.Tensor:
    """The GEMM of one linear: without scales, or with them where its backend has no other."""
    linear, codes, out = part.linear, ready.codes[place], ready.accs[place]
    if linear.backend.scaled_only:
        token, bias = ready.scales[place], linear.bias16
        return linear.backend.gemm_scaled(codes, token, linear.weight, linear.scale, bias, algorithm, out)
    return linear.backend.gemm(codes, linear.weight, algorithm, out)


def _dequantise(parts: Sequence[Part], ready: Ready, choices: Sequence[Choice]) -> list[torch.Tensor]:
    return [
        part.linear.backend.activations.dequantise_bias(
            acc, scale, part.linear.scale, part.linear.bias, torch.bfloat16, choice.dequantise
        )
        for part, acc, scale, choice in zip(parts, ready.accs, ready.scales, choices, strict=True)
    ]
