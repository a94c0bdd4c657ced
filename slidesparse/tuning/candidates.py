"""What there is to choose from: for a cell of the plan, every candidate with its call and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import operands, reference, verify
from slidesparse.kernels.backend import Algorithm, Backend, Weight
from slidesparse.kernels.verify import Check
from slidesparse.pattern import KEPT, WINDOW, Sparsity
from slidesparse.plan import TuneCell


@dataclass(frozen=True)
class Candidate:
    """One way to run a cell's operation: `call` runs it, `check` runs it once and compares with the reference."""

    algorithm: Algorithm
    path: str
    call: Callable[[], object]
    check: Callable[[], Check]


class Workbench:
    """Makes operands, once each, and the candidates that work on them. Random data from the profile's seed."""

    def __init__(self, backend: Backend, dtype: DType, seed: int) -> None:
        self._backend, self._dtype, self._seed = backend, dtype, seed
        self._weights: dict[tuple[int, int, Sparsity | None], tuple[torch.Tensor, Weight]] = {}

    def candidates(self, cell: TuneCell) -> list[Candidate]:
        """All candidates of a cell, the default first."""
        match cell.operation:
            case "dense_gemm" | "sparse_gemm":
                return self._gemm(cell)
            case "quantise" | "quantise_lift":
                return self._quantise(cell)
            case "dequantise_bias":
                return self._dequantise(cell)

    def _gemm(self, cell: TuneCell) -> list[Candidate]:
        plain, packed = self._weight(cell.n, cell.k, cell.variant.sparsity)
        codes, _ = reference.quantise(operands.activation(cell.m, cell.k, self._seed), self._dtype)
        exact = reference.gemm(codes, plain)
        magnitude = None if self._dtype is DType.INT8 else reference.magnitude(codes, plain)
        x = codes if cell.variant.sparsity is None else reference.lift(codes, cell.variant.sparsity)
        terms = packed.k * KEPT // WINDOW if self._backend.sparse else packed.k
        out = torch.empty(cell.m, cell.n, dtype=reference.accumulator(self._dtype))

        def candidate(algorithm: Algorithm) -> Candidate:
            def call() -> torch.Tensor:
                return self._backend.gemm(x, packed, algorithm, out)

            def check() -> Check:
                verify.poison(out)
                return verify.check_gemm(call(), exact, magnitude, self._dtype, terms)

            return Candidate(algorithm, self._backend.path(self._dtype, algorithm), call, check)

        algorithms = self._backend.algorithms(self._dtype, cell.m, cell.n, packed.k)
        return [candidate(algorithm) for algorithm in algorithms]

    def _quantise(self, cell: TuneCell) -> list[Candidate]:
        x, sparsity = operands.activation(cell.m, cell.k, self._seed), cell.variant.sparsity
        x[-1] = 0  # the row that dividing by its own maximum would break
        codes, scale = reference.quantise(x, self._dtype)
        codes = codes if sparsity is None else reference.lift(codes, sparsity)
        kernels = self._backend.activations

        def candidate(algorithm: Algorithm) -> Candidate:
            def call() -> tuple[torch.Tensor, torch.Tensor]:
                return kernels.quantise(x, self._dtype, sparsity, algorithm)

            def check() -> Check:
                got_codes, got_scale = call()
                same_codes = verify.check_same(got_codes, codes, "reference codes")
                return verify.worst((same_codes, verify.check_same(got_scale, scale, "reference scales")))

            return Candidate(algorithm, f"{kernels.name} {algorithm.name} ({algorithm.config})", call, check)

        return [candidate(algorithm) for algorithm in kernels.algorithms(cell.operation, self._dtype)]  # type: ignore[arg-type]

    def _dequantise(self, cell: TuneCell) -> list[Candidate]:
        generator = torch.Generator().manual_seed(self._seed)
        acc = torch.randint(-1 << 20, 1 << 20, (cell.m, cell.n), generator=generator, dtype=torch.int32)
        acc = acc.to(reference.accumulator(self._dtype))
        token, channel = torch.rand(cell.m, 1, generator=generator), torch.rand(cell.n, 1, generator=generator)
        bias = torch.randn(cell.n, generator=generator)
        expected = reference.dequantise_bias(acc, token, channel, bias)
        kernels = self._backend.activations

        def candidate(algorithm: Algorithm) -> Candidate:
            def call() -> torch.Tensor:
                return kernels.dequantise_bias(acc, token, channel, bias, torch.bfloat16, algorithm)

            def check() -> Check:
                return verify.check_same(call(), expected, "reference epilogue")

            return Candidate(algorithm, f"{kernels.name} {algorithm.name} ({algorithm.config})", call, check)

        return [candidate(algorithm) for algorithm in kernels.algorithms("dequantise_bias", self._dtype)]

    def _weight(self, n: int, k: int, sparsity: Sparsity | None) -> tuple[torch.Tensor, Weight]:
        key = (n, k, sparsity)
        if key not in self._weights:
            plain = operands.random_weight(n, k, self._dtype, sparsity, self._seed)
            codes = plain if sparsity is None else operands.lift(plain, sparsity, f"random {n}x{k}")
            self._weights[key] = plain, self._backend.pack(codes, self._dtype, f"random {n}x{k}")
        return self._weights[key]
