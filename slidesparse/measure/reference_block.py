"""The same linears run as the reference implementation runs them: the yardstick of the whole-linear comparison.

Their three kernels: quantise + slide, a cuSPARSELt GEMM that writes bfloat16 (INT8 sums too, so they are rounded before
they are scaled), dequantise + bias. Each by the best of its launches and algorithms, as their offline tuning chooses
them; structure and launches: `kernels/reference_pipeline.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import gemm_library, gemm_ops
from slidesparse.kernels import reference_pipeline as pipeline
from slidesparse.kernels.cusparselt import algorithm_name
from slidesparse.kernels.gemm_library import GemmAlgorithm, Problem
from slidesparse.kernels.reference_pipeline import DequantiseLaunch, QuantiseLaunch
from slidesparse.measure.linear_block import Block, Part
from slidesparse.measure.timer import Call, Clock, leading

T = TypeVar("T")


@dataclass(frozen=True)
class _Layer:
    """One linear with what their pipeline needs beside it."""

    part: Part
    bias: torch.Tensor
    """bfloat16 [N]: zeros where the layer has none, as theirs."""

    @property
    def problem(self) -> Problem:
        linear = self.part.linear
        k = linear.weight.k
        return Problem(self.part.tokens.shape[0], linear.n, k, linear.dtype.torch, torch.bfloat16)

    def quantise(self, launch: QuantiseLaunch) -> tuple[torch.Tensor, torch.Tensor]:
        linear = self.part.linear
        return pipeline.quantise_slide(self.part.tokens, linear.dtype, linear.variant.sparsity, launch)

    def accumulator(self) -> torch.Tensor:
        return torch.empty(self.problem.m, self.part.linear.n, dtype=torch.bfloat16, device=self.part.tokens.device)

    def gemm(self, codes: torch.Tensor, found: GemmAlgorithm, out: torch.Tensor) -> torch.Tensor:
        weight = self.part.linear.weight.data
        gemm_ops.sparse_gemm(codes, weight, out, found.alg_id, found.split_k, found.workspace)
        return out

    def dequantise(self, acc: torch.Tensor, scale: torch.Tensor, launch: DequantiseLaunch) -> torch.Tensor:
        return pipeline.dequantise_bias(acc, scale, self.part.linear.scale, self.bias, launch)


class ReferenceBlock:
    """Their pipeline over all sets of buffers of a block. Raises UnsupportedHere where cuSPARSELt lacks a GEMM."""

    def __init__(self, block: Block, clock: Clock, barred: frozenset[str]) -> None:
        """barred: algorithms of the sparse GEMM that crash the GPU's context (`LostContexts`)."""
        self._sets = [[_Layer(part, _bias(part)) for part in parts] for parts in block.sets]
        self._quantise = _best([(launch, self._quantisers(launch)) for launch in pipeline.QUANTISE_LAUNCHES], clock)
        ready = [[layer.quantise(self._quantise) for layer in layers] for layers in self._sets]
        self._algorithms = [
            self._fastest(
                [(layers[place], own[place][0]) for layers, own in zip(self._sets, ready, strict=True)],
                clock,
                barred,
            )
            for place in range(len(self._sets[0]))
        ]
        accs = [
            [
                layer.gemm(codes, found, layer.accumulator())
                for layer, (codes, _), found in zip(layers, own, self._algorithms, strict=True)
            ]
            for layers, own in zip(self._sets, ready, strict=True)
        ]
        scales = [[scale for _, scale in own] for own in ready]
        self._dequantise = _best(
            [(launch, self._dequantisers(accs, scales, launch)) for launch in pipeline.DEQUANTISE_LAUNCHES], clock
        )

    def calls(self) -> list[Call]:
        """The whole block, on each set of buffers."""
        return [partial(self._run, layers) for layers in self._sets]

    def path(self) -> str:
        """What runs."""
        names = ", ".join(map(algorithm_name, self._algorithms))
        return (
            f"reference structure: quantise + slide ({self._quantise}) > cusparselt {names} to bf16 > "
            f"dequantise + bias ({self._dequantise})"
        )

    def _run(self, layers: Sequence[_Layer]) -> list[torch.Tensor]:
        outputs = []
        for layer, found in zip(layers, self._algorithms, strict=True):
            codes, scale = layer.quantise(self._quantise)
            acc = layer.gemm(codes, found, layer.accumulator())
            outputs.append(layer.dequantise(acc, scale, self._dequantise))
        return outputs

    def _quantisers(self, launch: QuantiseLaunch) -> list[Call]:
        return [partial(_each_quantised, layers, launch) for layers in self._sets]

    def _dequantisers(
        self, accs: list[list[torch.Tensor]], scales: list[list[torch.Tensor]], launch: DequantiseLaunch
    ) -> list[Call]:
        return [
            partial(_each_dequantised, layers, acc, scale, launch)
            for layers, acc, scale in zip(self._sets, accs, scales, strict=True)
        ]

    @staticmethod
    def _fastest(buffers: Sequence[tuple[_Layer, torch.Tensor]], clock: Clock, barred: frozenset[str]) -> GemmAlgorithm:
        """The algorithm of one layer, by a quick look on all sets of buffers."""
        problem = buffers[0][0].problem
        offered = gemm_library.load().sparse_algorithms(problem)
        found = [one for one in offered if algorithm_name(one) not in barred]
        if not found:
            raise UnsupportedHere(f"cusparselt has no algorithm for {problem}, which the reference pipeline needs")
        room = [(layer, codes, layer.accumulator()) for layer, codes in buffers]
        return _best(
            [(one, [partial(layer.gemm, codes, one, out) for layer, codes, out in room]) for one in found], clock
        )


def _best(candidates: list[tuple[T, list[Call]]], clock: Clock) -> T:
    return candidates[leading([calls for _, calls in candidates], clock, count=1)[0]][0]


def _bias(part: Part) -> torch.Tensor:
    linear = part.linear
    zeros = torch.zeros(linear.n, dtype=torch.bfloat16, device=part.tokens.device)
    return zeros if linear.bias16 is None else linear.bias16


def _each_quantised(layers: Sequence[_Layer], launch: QuantiseLaunch) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [layer.quantise(launch) for layer in layers]


def _each_dequantised(
    layers: Sequence[_Layer], accs: Sequence[torch.Tensor], scales: Sequence[torch.Tensor], launch: DequantiseLaunch
) -> list[torch.Tensor]:
    return [layer.dequantise(acc, scale, launch) for layer, acc, scale in zip(layers, accs, scales, strict=True)]
