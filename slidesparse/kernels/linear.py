"""The W8A8 linear layer: quantise (+ lift) -> GEMM -> dequantise + bias, each by the algorithm that tuning chose."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import nn

from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, UnsupportedHere
from slidesparse.kernels import operands
from slidesparse.kernels.backend import Algorithm, Encoder, Weight, backend, named, operation_name
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant


class LookUp(Protocol):
    """What a layer asks of the tuning store."""

    def find(
        self,
        operation: str,
        family: str,
        dtype: DType,
        sparsity: Sparsity | None,
        size: tuple[int, int, int],
        candidates: Collection[str],
    ) -> str | None:
        """Name of the best candidate at (M, N, K), None when nothing is known; every answer is counted."""


@dataclass(frozen=True)
class Choice:
    """The algorithms of one layer at one M."""

    quantise: Algorithm
    gemm: Algorithm
    dequantise: Algorithm
    before: BitNetOperation | None = None
    """What `quantise` does besides: a fused BitNet kernel."""
    scaled: Algorithm | None = None
    """A GEMM with scales and bias in its epilogue: it stands for `gemm` and `dequantise`."""

    def __str__(self) -> str:
        if self.scaled is not None:
            return f"{self.quantise.name} > {self.scaled.name} (scales and bias fused)"
        return f"{self.quantise.name} > {self.gemm.name} > {self.dequantise.name}"


class Recipe:
    """Which kernels run the linears of one shape, at each M. Operands come with each call: it holds no weights."""

    def __init__(self, variant: Variant, dtype: DType, n: int, k: int, operand_k: int, store: LookUp | None) -> None:
        """k: columns before lifting; operand_k: columns of the packed weight (K' of a sparse backend)."""
        self.backend = backend(variant.backend)
        self.variant, self.dtype, self.n, self.k, self.store = variant, dtype, n, k, store
        self.operand_k = operand_k

    def choices(self, m: int, bias: bool, before: BitNetOperation | None = None) -> list[Choice]:
        """The tuned choice at M tokens; with the epilogue in a second kernel first, then fused where it can be.

        A backend whose epilogue is always fused has the tuned algorithm first. before: what is fused with quantising
        x. Raises UnsupportedHere where the backend has no algorithm.
        """
        plain, scaled = self.offered(m, bias)
        split = self._choose(m, before, plain or scaled)
        if not plain:  # what tuning chose is such an algorithm
            scaled = (split.gemm, *(algorithm for algorithm in scaled if algorithm != split.gemm))
        fused = [replace(split, scaled=algorithm) for algorithm in scaled]
        return [split, *fused] if plain else fused

    def choice(self, m: int, bias: bool, before: BitNetOperation | None = None) -> Choice:
        """Of `choices` the one that a model runs: with the epilogue fused where it can be, one pass over the output
        less."""
        choices = self.choices(m, bias, before)
        return next((choice for choice in choices if choice.scaled), choices[0])

    def offered(self, m: int, bias: bool) -> tuple[tuple[Algorithm, ...], tuple[Algorithm, ...]]:
        """What the backend has at M tokens: GEMMs alone, and GEMMs with fused scales.

        Raises UnsupportedHere where it has neither.
        """
        side, size = self.backend, (m, self.n, self.operand_k)
        plain = () if side.scaled_only else side.algorithms(self.dtype, *size)
        scaled = side.scaled_algorithms(self.dtype, *size, bias)
        if not plain and not scaled:
            problem = f"{self.variant} {self.dtype.value} {self.n}x{self.k}"
            raise UnsupportedHere(f"backend {side.name} has no algorithm for {problem} at M={m}")
        return plain, scaled

    def run(
        self,
        tokens: torch.Tensor,
        weight: Weight,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        bias16: torch.Tensor | None,
        choice: Choice,
    ) -> torch.Tensor:
        """tokens [M, K] -> [M, N]. scale float32 [N, 1]; bias [N] in float32 and in bfloat16, or None."""
        codes, token_scale = self.backend.activations.quantise(
            tokens, self.dtype, self.variant.sparsity, choice.quantise
        )
        return self.multiply(codes, token_scale, weight, scale, bias, bias16, choice, tokens.dtype)

    def multiply(
        self,
        codes: torch.Tensor,
        token_scale: torch.Tensor,
        weight: Weight,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        bias16: torch.Tensor | None,
        choice: Choice,
        out_dtype: torch.dtype = torch.bfloat16,
    ) -> torch.Tensor:
        """All but the first step: codes [M, K] (lifted [M, K'] if sparse), token_scale float32 [M, 1] -> [M, N]."""
        m = codes.shape[0]
        if choice.scaled is not None:
            y = torch.empty(m, self.n, dtype=torch.bfloat16, device=codes.device)
            return self.backend.gemm_scaled(codes, token_scale, weight, scale, bias16, choice.scaled, y)
        acc = torch.empty(m, self.n, dtype=self.backend.output(self.dtype), device=codes.device)
        self.backend.gemm(codes, weight, choice.gemm, acc)
        return self.backend.activations.dequantise_bias(acc, token_scale, scale, bias, out_dtype, choice.dequantise)

    def encoder(self, choice: Choice) -> Encoder:
        """What makes codes of x for the GEMM of a choice. Raises ValueError where it cannot take such rows."""
        activations = self.backend.activations
        return activations.encoder(choice.before, self.dtype, self.variant.sparsity, self.k, choice.quantise)

    def _choose(self, m: int, before: BitNetOperation | None, gemms: tuple[Algorithm, ...]) -> Choice:
        activations = self.backend.activations
        if before is None:
            family = activations.name
            candidates = activations.algorithms("quantise_lift" if self.backend.sparse else "quantise", self.dtype)
        else:
            family, candidates = activations.norm_family, activations.norm_algorithms(self.k)
        return Choice(
            self._best(operation_name(before, self.backend.sparse), family, (m, 0, self.k), candidates),
            self._best(
                "sparse_gemm" if self.backend.sparse else "dense_gemm", self.backend.name, (m, self.n, self.k), gemms
            ),
            self._best(
                "dequantise_bias",
                activations.name,
                (m, self.n, 0),
                activations.algorithms("dequantise_bias", self.dtype),
            ),
            before,
        )

    def _best(
        self, operation: str, family: str, size: tuple[int, int, int], candidates: tuple[Algorithm, ...]
    ) -> Algorithm:
        if self.store is None:
            return candidates[0]
        sparsity = None if operation == "dequantise_bias" else self.variant.sparsity
        names = [candidate.name for candidate in candidates]
        found = self.store.find(operation, family, self.dtype, sparsity, size, names)
        return (named(candidates, found) if found else None) or candidates[0]


class W8A8Linear(nn.Module):
    """x [..., K] bfloat16 (or float32) -> [..., N] of x's type. Formula: `kernels/reference.py`.

    Args:
        name: the layer, for errors.
        codes: [N, K] unlifted, or [N, K'] with `lifted`; of `dtype.torch`.
        scale: float32 [N, 1].
        bias: [N] or None.
        k: columns before lifting.
        store: chooses algorithms; None takes the default of each operation.

    Raises:
        CheckpointError: shapes or types do not fit, or the weight does not keep to the pattern.
    """

    def __init__(
        self,
        name: str,
        codes: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
        *,
        k: int,
        variant: Variant,
        dtype: DType,
        lifted: bool = False,
        store: LookUp | None = None,
    ) -> None:
        super().__init__()
        self.backend = backend(variant.backend)
        self.name, self.variant, self.dtype, self.k, self.n = name, variant, dtype, k, codes.shape[0]
        if self.backend.sparse != (variant.sparsity is not None):
            raise CheckpointError(f"{name}: backend {variant.backend} cannot run pattern {variant.sparsity or 'dense'}")
        if codes.dtype != dtype.torch:
            raise CheckpointError(f"{name}: weight is {codes.dtype}, expected {dtype.torch}; prepare the model again")
        columns = variant.sparsity.lifted_k(k) if lifted and variant.sparsity else k
        if codes.shape[1] != columns or scale.shape != (self.n, 1):
            raise CheckpointError(
                f"{name}: weight {tuple(codes.shape)}, scale {tuple(scale.shape)}; expected {(self.n, columns)} and "
                f"{(self.n, 1)}; prepare the model again"
            )
        if variant.sparsity is not None and not lifted:
            codes = operands.lift(codes, variant.sparsity, name)
        self.weight = self.backend.pack(codes, dtype, name)
        self.recipe = Recipe(variant, dtype, self.n, k, self.weight.k, store)
        self.scale = nn.Buffer(scale.float().to(self.backend.device), persistent=False)
        bias = None if bias is None else bias.to(self.backend.device)
        self.bias = None if bias is None else nn.Buffer(bias.float(), persistent=False)
        self.bias16 = None if bias is None else nn.Buffer(bias.bfloat16(), persistent=False)
        self._choices: dict[int, Choice] = {}
        self.paths: Counter[str] = Counter()
        """Calls by the algorithms that ran."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.reshape(-1, self.k)
        choice = self._choices.get(tokens.shape[0])
        if choice is None:
            choice = self._choices[tokens.shape[0]] = self.recipe.choice(tokens.shape[0], self.bias is not None)
        y = self.run(tokens, choice)
        self.paths[str(choice)] += 1
        return y.reshape(*x.shape[:-1], self.n)

    def run(self, tokens: torch.Tensor, choice: Choice) -> torch.Tensor:
        """tokens [M, K] -> [M, N] by the algorithms of `choice`."""
        return self.recipe.run(tokens, self.weight, self.scale, self.bias, self.bias16, choice)

    def choices(self, m: int) -> list[Choice]:
        """See `Recipe.choices`."""
        return self.recipe.choices(m, self.bias is not None)

    def forget(self) -> None:
        """Forget choices and path counts: the next cell looks up and counts its own."""
        self._choices.clear()
        self.paths.clear()
