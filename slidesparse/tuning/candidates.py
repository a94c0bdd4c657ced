"""What there is to choose from: for a cell of the plan, every candidate with its calls and its check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import get_args

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import bitnet_reference, operands, reference, verify
from slidesparse.kernels.backend import Algorithm, Backend, operation_name
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.verify import Check
from slidesparse.kernels.verify_normed import ExpectedNormed
from slidesparse.measure.clocks import buffer_sets
from slidesparse.measure.gemm_point import LayerWeight, Product
from slidesparse.measure.scaled_point import point_of
from slidesparse.measure.timer import Call, Clock, leading
from slidesparse.pattern import Sparsity, align
from slidesparse.plan import TuneCell

BFLOAT16, FLOAT32 = 2, 4
"""Bytes."""
FUSED: dict[str, BitNetOperation] = {
    operation_name(before, lift): before for before, lift in product(get_args(BitNetOperation), (False, True))
}
"""The fused BitNet kernels among the operations of a plan."""
EPS = 1e-5
"""Of every BitNet's norms. No kernel's time depends on it."""


@dataclass(frozen=True)
class Candidate:
    """One way to run a cell's operation: each of `calls` runs it on its own buffers, `check` once, compared."""

    algorithm: Algorithm
    path: str
    calls: list[Call]
    check: Callable[[], Check]


class Workbench:
    """Makes operands, once each, and the candidates that work on them. Random data from the profile's seed."""

    def __init__(self, backend: Backend, dtype: DType, seed: int) -> None:
        self._backend, self._dtype, self._seed = backend, dtype, seed
        self._weights: dict[tuple[int, int, Sparsity | None], LayerWeight] = {}

    def candidates(self, cell: TuneCell) -> list[Candidate]:
        """All candidates of a cell, the default first."""
        match cell.operation:
            case "dense_gemm" | "sparse_gemm":
                return self._gemm(cell)
            case "quantise" | "quantise_lift":
                return self._quantise(cell)
            case "dequantise_bias":
                return self._dequantise(cell)
            case _:
                return self._fused(cell, FUSED[cell.operation])

    def bytes_moved(self, cell: TuneCell) -> int:
        """Bytes that an activation kernel has to read and write at least; -1 for a GEMM."""
        sparsity = cell.variant.sparsity
        match cell.operation:
            case "quantise" | "quantise_lift":
                width = cell.k if sparsity is None else sparsity.lifted_k(cell.k)
                return cell.m * (BFLOAT16 * cell.k + width + FLOAT32)
            case "dequantise_bias":
                acc = self._backend.output(self._dtype).itemsize
                return cell.m * (cell.n * (acc + BFLOAT16) + FLOAT32) + 2 * cell.n * FLOAT32
            case "dense_gemm" | "sparse_gemm":
                return -1
            case _:
                return bitnet_reference.floor_bytes(FUSED[cell.operation], cell.m, cell.k, sparsity)

    def copy_calls(self, cell: TuneCell, clock: Clock) -> list[Call]:
        """A copy that moves as many bytes as an activation kernel of this cell, by its best launch; none on a CPU."""
        size = self.bytes_moved(cell)
        if size < 0 or self._backend.device != "cuda":
            return []
        from slidesparse.kernels.triton_copy import GRAIN, LAUNCHES, copy

        half = align(size // 2, GRAIN)
        sets = buffer_sets(self._backend, 2 * half)
        sources = [torch.randint(0, 255, (half,), dtype=torch.uint8, device="cuda") for _ in range(sets)]
        pairs = [(source, torch.empty_like(source)) for source in sources]
        ways: list[list[Call]] = [[partial(copy, *pair, launch) for pair in pairs] for launch in LAUNCHES]
        return ways[leading(ways, clock, count=1)[0]]

    def _gemm(self, cell: TuneCell) -> list[Candidate]:
        weight = self._weight(cell.n, cell.k, cell.variant.sparsity)
        point = point_of(
            self._backend, weight, Product(weight.plain, self._dtype, cell.m, self._seed), cell.variant.sparsity
        )
        quick = self._backend.device == "cuda"

        def candidate(algorithm: Algorithm) -> Candidate:
            path = point.path(algorithm)
            return Candidate(algorithm, path, point.calls(algorithm), lambda: point.check(algorithm, figures=not quick))

        return [candidate(algorithm) for algorithm in point.algorithms()]

    def _quantise(self, cell: TuneCell) -> list[Candidate]:
        kernels, sparsity = self._backend.activations, cell.variant.sparsity
        x = operands.activation(cell.m, cell.k, self._seed, self._backend.device)
        x[-1] = 0  # the row that dividing by its own maximum would break
        codes, scale = reference.quantise(x, self._dtype)
        codes = codes if sparsity is None else reference.lift(codes, sparsity)
        sets = buffer_sets(self._backend, x.nbytes + codes.nbytes)
        inputs = [x, *(x.clone() for _ in range(sets - 1))]

        def candidate(algorithm: Algorithm) -> Candidate:
            def call(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                return kernels.quantise(values, self._dtype, sparsity, algorithm)

            def check() -> Check:
                with verify.poisoned_memory():
                    got_codes, got_scale = call(x)
                same_codes = verify.check_same_codes(got_codes, codes, "reference codes")
                return verify.worst((same_codes, verify.check_same(got_scale, scale, "reference scales")))

            path = f"{kernels.name} {algorithm.name}" + (f" ({algorithm.config})" if algorithm.config else "")
            return Candidate(algorithm, path, [partial(call, values) for values in inputs], check)

        return [candidate(algorithm) for algorithm in kernels.algorithms(cell.operation, self._dtype)]  # type: ignore[arg-type]

    def _fused(self, cell: TuneCell, before: BitNetOperation) -> list[Candidate]:
        kernels, sparsity, m, k = self._backend.activations, cell.variant.sparsity, cell.m, cell.k
        device, width = self._backend.device, k if sparsity is None else sparsity.lifted_k(k)
        x = operands.activation(m, 2 * k if before == "gate" else k, self._seed, device)
        residual = operands.activation(m, k, self._seed + 1, device) if before == "add" else None
        weight = (1 + operands.activation(1, k, self._seed + 2, device)[0] / 4).contiguous()
        for given in (x, residual):
            if given is not None:
                given[-1] = 0  # r is its largest, the scale its floor
        expected = ExpectedNormed(before, x, residual, weight, EPS, self._dtype, sparsity)

        def outputs() -> tuple[torch.Tensor, torch.Tensor]:
            codes = torch.empty(m, width, dtype=self._dtype.torch, device=device)
            return codes, torch.empty(m, 1, dtype=torch.float32, device=device)

        def another(given: torch.Tensor | None) -> torch.Tensor | None:
            return None if given is None else given.clone()

        sets = buffer_sets(self._backend, self.bytes_moved(cell))
        buffers = [(x, residual, *outputs()), *((x.clone(), another(residual), *outputs()) for _ in range(sets - 1))]

        def candidate(algorithm: Algorithm) -> Candidate:
            kernel = kernels.encoder(before, self._dtype, sparsity, k, algorithm)

            def call(
                x: torch.Tensor, residual: torch.Tensor | None, codes: torch.Tensor, scale: torch.Tensor
            ) -> torch.Tensor | None:
                return kernel(x, residual, weight, EPS, codes, scale)

            def check() -> Check:
                with verify.poisoned_memory():
                    codes, scale = outputs()
                    total = call(x, residual, codes, scale)
                return expected.check(codes, scale, total)

            path = f"{kernels.norm_family} {algorithm.name}"
            return Candidate(algorithm, path, [partial(call, *buffer) for buffer in buffers], check)

        return [candidate(algorithm) for algorithm in kernels.norm_algorithms(k)]

    def _dequantise(self, cell: TuneCell) -> list[Candidate]:
        device = self._backend.device
        generator = torch.Generator(device).manual_seed(self._seed)
        shape = (cell.m, cell.n)
        acc = torch.randint(-1 << 20, 1 << 20, shape, generator=generator, dtype=torch.int32, device=device)
        acc = acc.to(self._backend.output(self._dtype))
        token = torch.rand(cell.m, 1, generator=generator, device=device)
        channel = torch.rand(cell.n, 1, generator=generator, device=device)
        bias = torch.randn(cell.n, generator=generator, device=device)
        expected = reference.dequantise_bias(acc, token, channel, bias)
        kernels = self._backend.activations
        sets = buffer_sets(self._backend, acc.nbytes + expected.nbytes)
        inputs = [acc, *(acc.clone() for _ in range(sets - 1))]

        def candidate(algorithm: Algorithm) -> Candidate:
            def call(values: torch.Tensor) -> torch.Tensor:
                return kernels.dequantise_bias(values, token, channel, bias, torch.bfloat16, algorithm)

            def check() -> Check:
                with verify.poisoned_memory():
                    got = call(acc)
                return verify.check_same(got, expected, "reference epilogue")

            path = f"{kernels.name} {algorithm.name}" + (f" ({algorithm.config})" if algorithm.config else "")
            return Candidate(algorithm, path, [partial(call, values) for values in inputs], check)

        return [candidate(algorithm) for algorithm in kernels.algorithms("dequantise_bias", self._dtype)]

    def _weight(self, n: int, k: int, sparsity: Sparsity | None) -> LayerWeight:
        key = (n, k, sparsity)
        if key not in self._weights:
            side, layer = self._backend, f"random {n}x{k}"
            plain = operands.random_weight(n, k, self._dtype, sparsity, self._seed, side.device)
            self._weights[key] = LayerWeight.pack(plain, "random", self._dtype, sparsity, side, layer)
        return self._weights[key]
