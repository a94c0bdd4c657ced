"""Backend `auto`: for each shape and bucket of M the fastest of the backends at hand, measured when weights are loaded.

The first layer of a kind is run by every candidate (each backend, with scales fused into its GEMM and without) as the
model will run it: norm, gate, quantise, lift, GEMM and epilogue, in CUDA graphs, on copies of its own weight beyond the
L2 cache, in turns. A candidate counts only if some of its rows equal the reference within the bound of its type, and
if what it gives behind the fused kernel agrees with the other candidates. Nothing is taken from a tuning store but the
algorithms of each backend. Buckets that were not measured go by the nearest one that was, in log2 of M.

All forms of a weight that a candidate needs are kept, chosen or not: the choice differs from start to start, and vLLM
keeps compiled graphs, which know the size of an operand.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import log2

import torch
from torch.nn.functional import pad

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere, VerificationError
from slidesparse.kernels import operands, verify
from slidesparse.kernels.backend import backend
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.fused import HOPPER
from slidesparse.kernels.linear import Choice, W8A8Linear
from slidesparse.machine import Machine
from slidesparse.measure.clocks import buffer_sets
from slidesparse.measure.timer import Call, Clock
from slidesparse.pattern import Sparsity, align
from slidesparse.plan import Variant
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.kinds import Plan, Way

DENSE = ("cublaslt", "cutlass")
SPARSE = ("fused", "cusparselt")
"""What it chooses from."""
ROUNDS = 7
"""Odd, so that the median is one of the samples."""
CHECKED_ROWS = 16
AGREEMENT = {DType.INT8: 2.0**-8, DType.FP8: 2.0**-6}
"""Largest relative L2 difference of two candidates' outputs. INT8: each is one rounding to bf16 of the same number.
FP8: twice `gpu.FP8_NORM_ERROR`."""
BYTES_ALIGNED = 256
"""Between the forms of one operand."""
SEED, EPS = 20, 1e-5


@dataclass(frozen=True)
class Auto:
    """What is chosen from, and how."""

    variants: tuple[Variant, ...]
    sizes: tuple[int, ...]
    """M to measure; each stands for its bucket."""
    clock: Clock


def at_hand(
    sparsity: Sparsity | None, keep_dense: bool, dtype: DType, machine: Machine, tuned: Collection[str] = ()
) -> tuple[list[Variant], list[str]]:
    """Backends that can run here, and why the others cannot. Raises UnsupportedHere, with all reasons, if none can.

    tuned: families of kernels that the tuning store has winners of. Our own GEMM was tried on Hopper alone: elsewhere
    it takes part once tuning has verified it on that machine.
    """
    asked = [Variant(name) for name in DENSE if sparsity is None or keep_dense]
    if sparsity is not None:
        asked = [*(Variant(name, sparsity) for name in SPARSE), *asked]
    found, missing = [], []
    for variant in asked:
        try:
            backend(variant.backend).require(machine, dtype)
            if variant.backend == "fused" and not _tried(machine) and variant.backend not in tuned:
                raise UnsupportedHere(
                    "backend fused is not verified on this GPU: tune with it first, and give the winners"
                )
        except UnsupportedHere as error:
            missing.append(str(error))
        else:
            found.append(variant)
    if not found:
        raise UnsupportedHere(f"backend auto has nothing to choose from: {'; '.join(missing)}")
    return found, missing


def _tried(machine: Machine) -> bool:
    return machine.gpu is None or machine.gpu.compute_capability[0] == HOPPER


def default_sizes(captured: Sequence[int], most_tokens: int) -> tuple[int, ...]:
    """The sizes that vLLM captures, then powers of two up to the most tokens of a step, and those."""
    largest = max(captured, default=8)
    doubled = [1 << bits for bits in range(4, most_tokens.bit_length()) if largest < 1 << bits <= most_tokens]
    return tuple(sorted({*captured, *doubled, most_tokens}))


def combine(linears: Sequence[W8A8Linear]) -> tuple[torch.Tensor, tuple[Way, ...]]:
    """One operand for the packed weights of one layer by several backends, and where each finds its own.

    Backends of one form share it. A single form stays the tensor that it is.
    """
    forms = {(linear.backend.form, linear.variant.sparsity): linear.weight for linear in linears}
    if len(forms) == 1:
        return linears[0].weight.data, tuple(Way.of(linear.recipe, linear.weight) for linear in linears)
    pieces, places, first = [], {}, 0
    for key, weight in forms.items():
        data = weight.data.contiguous().view(torch.uint8).flatten()
        pieces.append(pad(data, (0, align(data.numel(), BYTES_ALIGNED) - data.numel())))
        places[key] = first, first + data.numel()
        first += pieces[-1].numel()
    ways = []
    for linear in linears:
        data, place = linear.weight.data, places[linear.backend.form, linear.variant.sparsity]
        form = replace(linear.weight, data=None)
        ways.append(Way(linear.recipe, form, tuple(data.shape), data.dtype, place))
    return torch.cat(pieces), tuple(ways)


@dataclass(frozen=True)
class Candidate:
    """One way, with scales in its GEMM or behind it."""

    way: Way
    scaled: bool

    def choice(self, size: int, bias: bool, before: BitNetOperation | None) -> Choice | None:
        """At a bucket; None where the backend has no such GEMM. Raises UnsupportedHere where it has none at all."""
        choices = self.way.recipe.choices(size, bias, before)
        return next((choice for choice in choices if (choice.scaled is not None) == self.scaled), None)

    def __str__(self) -> str:
        recipe = self.way.recipe
        return f"{recipe.variant}{', scales fused' if self.scaled and not self.way.scaled_only else ''}"


def candidates(ways: Sequence[Way]) -> dict[str, Candidate]:
    """All there may be, by name."""
    both = [Candidate(way, scaled) for way in ways for scaled in (False, True) if scaled or not way.scaled_only]
    return {str(candidate): candidate for candidate in both}


@dataclass(frozen=True)
class Layer:
    """The layer that is measured for its kind."""

    name: str
    codes: torch.Tensor
    """Unlifted [N, K]: what the reference multiplies."""
    scale: torch.Tensor
    operand: torch.Tensor
    before: BitNetOperation | None
    """What the model fuses with quantising x."""
    bias: torch.Tensor | None


@dataclass(frozen=True)
class Measured:
    """One bucket."""

    us: dict[str, float]
    """Median microseconds by candidate, the fastest first."""
    refused: dict[str, str]
    """Candidates that do not count, and why."""


class Fastest:
    """Chooses the way of each bucket: a `kinds.Chooser`."""

    def __init__(self, ways: Sequence[Way], measured: dict[int, Measured]) -> None:
        """measured: by bucket; at least one has a candidate that counts."""
        self._candidates = candidates(ways)
        self.measured = measured

    def __call__(self, before: BitNetOperation | None, bias: bool, size: int) -> Plan:
        """Raises UnsupportedHere where no candidate of the nearest measured bucket can run this one."""
        known = [bucketed for bucketed, one in self.measured.items() if one.us]
        nearest = min(known, key=lambda bucketed: (abs(log2(bucketed / size)), bucketed))
        for name in self.measured[nearest].us:
            candidate = self._candidates[name]
            choice = candidate.choice(size, bias, before)
            if choice is not None:
                return Plan.make(candidate.way, choice, size, name)
        raise UnsupportedHere(f"backend auto has no algorithm at M={size} of those that are right at M={nearest}")


def measure(layer: Layer, ways: Sequence[Way], auto: Auto, dtype: DType) -> Fastest:
    """Run and time all candidates at all sizes. Raises SlideSparseError when no size has one that is right."""
    log = logging.getLogger("vllm.slidesparse")  # vLLM's own handler prints it
    measured = {}
    for size in sorted({bucket(m) for m in auto.sizes}):
        one = measured[size] = _measure(layer, ways, size, auto.clock, dtype)
        times = ", ".join(f"{name} {us:.1f} us" for name, us in one.us.items())
        wrong = "".join(f"; {name} does not count: {reason}" for name, reason in one.refused.items())
        if layer.operand.is_cuda:
            torch.cuda.empty_cache()  # what the graphs of this size held; vLLM counts what is taken
        log.info("auto: %s, M=%d: %s%s", layer.name, size, times or "nothing", wrong)
    if not any(one.us for one in measured.values()):
        reasons = sorted({f"{name}: {reason}" for one in measured.values() for name, reason in one.refused.items()})
        raise SlideSparseError(f"{layer.name}: backend auto found nothing that is right: {'; '.join(reasons)}")
    return Fastest(ways, measured)


def _measure(layer: Layer, ways: Sequence[Way], size: int, clock: Clock, dtype: DType) -> Measured:
    given = _inputs(layer, ways, size)
    prepared: dict[str, Call] = {}
    refused: dict[str, str] = {}
    first: torch.Tensor | None = None
    for name, candidate in candidates(ways).items():
        try:
            choice = candidate.choice(size, layer.bias is not None, layer.before)
            if choice is None:
                continue
            _check(candidate, layer, size, dtype)
            plan = Plan.make(candidate.way, choice, size)
            with verify.poisoned_memory():
                y, _ = plan.run(*given[0])
            first = y if first is None else first
            _require_agreement(y, first, AGREEMENT[dtype])
            prepared[name] = clock.prepare([partial(plan.run, *one) for one in given])
        except (SlideSparseError, ValueError, RuntimeError) as error:  # torch's out of memory is a RuntimeError
            refused[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    names = list(prepared)
    samples: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(1 + ROUNDS if names else 0):
        order = names[turn % len(names) :] + names[: turn % len(names)]
        for name, seconds in zip(order, clock.times([prepared[name] for name in order]), strict=True):
            samples[name].append(seconds)
    medians = {name: sorted(own[1:])[ROUNDS // 2] * 1e6 for name, own in samples.items()}  # the first turn warms up
    return Measured(dict(sorted(medians.items(), key=lambda item: item[1])), refused)


Given = tuple[
    torch.Tensor, torch.Tensor | None, torch.Tensor | None, float, torch.Tensor, torch.Tensor, torch.Tensor | None
]
"""Operands of `Plan.run`."""


def _inputs(layer: Layer, ways: Sequence[Way], size: int) -> list[Given]:
    """In as many sets as the caches ask for, the layer's own weight in the first."""
    k, device = layer.codes.shape[1], str(layer.operand.device)
    x = operands.activation(size, 2 * k if layer.before == "gate" else k, SEED, device)
    residual = operands.activation(size, k, SEED + 1, device) if layer.before == "add" else None
    norm = None if layer.before is None else 1 + 0.1 * operands.activation(1, k, SEED + 2, device)[0]
    touched = min(way.form.nbytes for way in ways) + x.nbytes
    sets = buffer_sets(ways[0].recipe.backend, touched)
    first: Given = (x, residual, norm, EPS, layer.operand, layer.scale, layer.bias)
    copies: list[Given] = [
        (x.clone(), residual, norm, EPS, layer.operand.clone(), layer.scale, layer.bias) for _ in range(sets - 1)
    ]
    return [first, *copies]


def _check(candidate: Candidate, layer: Layer, size: int, dtype: DType) -> None:
    """GEMM and epilogue on codes of the quantise kernel, which are the reference's, bit for bit.

    Raises VerificationError where some rows are not what they must be.
    """
    choice = candidate.choice(size, layer.bias is not None, None)
    assert choice is not None
    side = candidate.way.recipe.backend
    x = operands.activation(size, layer.codes.shape[1], SEED, str(layer.operand.device))
    with verify.poisoned_memory():
        y, _ = Plan.make(candidate.way, choice, size).run(x, None, None, 0.0, layer.operand, layer.scale, layer.bias)
    # float64: models are built under another default type, and bfloat16 rounds row 511 to 512.
    rows = torch.linspace(0, size - 1, min(CHECKED_ROWS, size), dtype=torch.float64, device=x.device).long()
    error, _ = side.accumulation_error(dtype, candidate.way.recipe.operand_k)
    between = 0.0 if candidate.scaled else verify.OUTPUT_UNIT.get(side.output(dtype), 0.0)
    check = verify.check_linear(
        x[rows], y[rows], layer.codes, layer.scale, layer.bias, dtype, error, between, side.exact_epilogue
    )
    if not check.ok:
        raise VerificationError(f"check failed: {check.text}")


def _require_agreement(y: torch.Tensor, first: torch.Tensor, bound: float) -> None:
    """Raises VerificationError."""
    difference = float(torch.linalg.vector_norm((y - first).float()) / torch.linalg.vector_norm(first.float()))
    if not difference <= bound:
        raise VerificationError(
            f"relative L2 difference from the first candidate {difference:.3g}, at most {bound:.3g}"
        )
