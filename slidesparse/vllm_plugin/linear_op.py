"""Linear layers as operators: opaque to torch.compile, M symbolic, safe in CUDA graphs.

    slidesparse::linear(x, weight, scale, bias?, kind) -> y
    slidesparse::norm_linear(x, norm, eps, weight, scale, bias?, kind) -> y
    slidesparse::add_norm_linear(x, residual, norm, eps, weight, scale, bias?, kind) -> (y, x + residual)
    slidesparse::gate_norm_linear(gate_up, norm, eps, weight, scale, bias?, kind) -> y

The first quantises x (and lifts it) by a kernel of its own; the others by the fused BitNet kernel that norms x as well
(formulas: `kernels/bitnet_reference.py`). `weight` is the packed form of a backend as one tensor; `kind` is a string
such as `cusparselt 2:8 INT8 2560x6912`, which all linears of one shape share: graphs of equal layers are equal, and
vLLM compiles one of them.

Algorithms are looked up inside, once for each kind and bucket of M (`buckets`), at a bucket's first call. That call
also makes the library's plan and compiles the Triton kernels, so it must come before a graph is captured: vLLM runs
every size before it captures it.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.nn.functional import pad

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError
from slidesparse.kernels.backend import NormKernel, Weight, operation_name
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.linear import Choice, LookUp, Recipe, W8A8Linear
from slidesparse.plan import Variant
from slidesparse.vllm_plugin.buckets import bucket


@dataclass(frozen=True)
class Prepared:
    """What a layer keeps: operands of the operators."""

    weight: torch.Tensor
    scale: torch.Tensor
    kind: str


@dataclass(frozen=True, slots=True)
class Plan:
    """How a bucket of M runs."""

    size: int
    choice: Choice
    norm: NormKernel | None
    """Quantises x, if something is fused with that."""
    path: tuple[int, str]
    """What the calls are counted under."""


class Kind:
    """All linears of one shape, type and variant."""

    def __init__(self, recipe: Recipe, form: Weight) -> None:
        """form: a packed weight of that shape; its data is not kept."""
        self.recipe = recipe
        self._form = replace(form, data=None)
        self._buckets: dict[tuple[BitNetOperation | None, bool, int], Plan] = {}
        self._plans: dict[tuple[BitNetOperation | None, bool, int], Plan] = {}
        """The same by M itself: one look-up a call."""
        self.layers: dict[str, None] = {}
        """Names, in order."""
        self.calls: Counter[tuple[int, str]] = Counter()
        """Calls by bucket and path. A replay of a captured graph is no call: the capture was one."""

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """x [M, K] -> [M, N]."""
        m = x.shape[0]
        plan = self._plans.get((None, bias is not None, m)) or self._plan(None, bias is not None, m, x.is_cuda)
        recipe, choice = self.recipe, plan.choice
        tokens = x.contiguous() if m == plan.size else pad(x, (0, 0, 0, plan.size - m))
        # One tensor serves both epilogues: kernels that want float32 widen it, those that want bfloat16 take it.
        y = recipe.run(tokens, replace(self._form, data=weight), scale, bias, bias, choice)
        self.calls[plan.path] += 1
        return y[:m]

    def normed(
        self,
        before: BitNetOperation,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: torch.Tensor,
        eps: float,
        weight: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [M, K] ([M, 2 K] before a gate) -> [M, N], and x + residual where there is one."""
        m = x.shape[0]
        plan = self._plans.get((before, bias is not None, m)) or self._plan(before, bias is not None, m, x.is_cuda)
        recipe, size = self.recipe, plan.size
        # Rows of a product do not see each other: those past M may hold anything, and are cut off.
        codes = torch.empty(size, recipe.operand_k, dtype=recipe.dtype.torch, device=x.device)
        token_scale = torch.empty(size, 1, dtype=torch.float32, device=x.device)
        written = (codes, token_scale) if m == size else (codes[:m], token_scale[:m])
        assert plan.norm is not None
        other = None if residual is None else residual.contiguous()
        total = plan.norm(x.contiguous(), other, norm, eps, *written)
        y = recipe.multiply(codes, token_scale, replace(self._form, data=weight), scale, bias, bias, plan.choice)
        self.calls[plan.path] += 1
        return y if m == size else y[:m], total

    def _plan(self, before: BitNetOperation | None, bias: bool, m: int, on_gpu: bool) -> Plan:
        size = bucket(max(m, 1))
        plan = self._buckets.get((before, bias, size))
        if plan is None:
            plan = self._buckets[before, bias, size] = self._choose(before, bias, size, on_gpu)
        self._plans[before, bias, m] = plan
        return plan

    def _choose(self, before: BitNetOperation | None, bias: bool, size: int, on_gpu: bool) -> Plan:
        layer = next(iter(self.layers))
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise SlideSparseError(
                f"{layer}: {size} tokens come for the first time while a CUDA graph is captured; "
                f"run that size once before capturing"
            )
        try:
            # The last choice fuses the epilogue where the library can: one pass over the output less.
            choice = self.recipe.choices(size, bias, before)[-1]
            norm = None if before is None else self.recipe.norm_kernel(choice)
        except ValueError as error:
            raise SlideSparseError(f"{layer}: {error}") from None
        return Plan(size, choice, norm, (size, f"{operation_name(before, self.recipe.backend.sparse)} {choice}"))


_KINDS: dict[str, Kind] = {}
"""Of this process: filled while weights are loaded, before any graph runs."""


def prepare(
    layer: str, codes: torch.Tensor, scale: torch.Tensor, variant: Variant, dtype: DType, store: LookUp | None
) -> Prepared:
    """Lift and compress a weight where it lies: codes [N, K] of `dtype.torch`, scale float32 [N, 1].

    Raises:
        CheckpointError: wrong shape or type, or the weight does not keep to the pattern (layer, row, columns).
        UnsupportedHere: the backend has no algorithm for this shape.
    """
    linear = W8A8Linear(layer, codes, scale, None, k=codes.shape[1], variant=variant, dtype=dtype, store=store)
    name = f"{variant} {dtype.value} {linear.n}x{linear.k}"
    kind = _KINDS.get(name)
    if kind is None or kind.recipe.store is not store:  # another store: another model has taken this process over
        linear.recipe.offered(bucket(1), False)
        kind = _KINDS[name] = Kind(linear.recipe, linear.weight)
    kind.layers[layer] = None
    return Prepared(linear.weight.data, linear.scale, name)


def paths() -> dict[str, dict[str, int]]:
    """What ran in this process since `reset`: kind -> `M=bucket: operation, algorithms` -> calls."""
    return {
        name: {f"M={size}: {path}": count for (size, path), count in sorted(kind.calls.items())}
        for name, kind in _KINDS.items()
    }


def layers() -> dict[str, str]:
    """Layer -> kind, of everything prepared in this process."""
    return {layer: name for name, kind in _KINDS.items() for layer in kind.layers}


def reset() -> None:
    """Count calls anew."""
    for kind in _KINDS.values():
        kind.calls.clear()


@torch.library.custom_op(f"{NAMESPACE}::linear", mutates_args=())
def linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, kind: str
) -> torch.Tensor:
    """x bfloat16 [M, K], packed weight, scale float32 [N, 1], bias [N] -> bfloat16 [M, N]."""
    return _KINDS[kind].linear(x, weight, scale, bias)


@torch.library.custom_op(f"{NAMESPACE}::norm_linear", mutates_args=())
def norm_linear(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """`linear` of the RMSNorm of x, norm weight [K]."""
    return _KINDS[kind].normed("norm", x, None, norm, eps, weight, scale, bias)[0]


@torch.library.custom_op(f"{NAMESPACE}::add_norm_linear", mutates_args=())
def add_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`norm_linear` of x + residual, both bfloat16 [M, K]; their sum comes last."""
    y, total = _KINDS[kind].normed("add", x, residual, norm, eps, weight, scale, bias)
    assert total is not None
    return y, total


@torch.library.custom_op(f"{NAMESPACE}::gate_norm_linear", mutates_args=())
def gate_norm_linear(
    gate_up: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    """`norm_linear` of max(gate, 0)**2 * up, from bfloat16 [M, 2 K], gate first."""
    return _KINDS[kind].normed("gate", gate_up, None, norm, eps, weight, scale, bias)[0]


@linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    return _output(x, scale)


@norm_linear.register_fake
@gate_norm_linear.register_fake
def _(
    x: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
) -> torch.Tensor:
    return _output(x, scale)


@add_norm_linear.register_fake
def _(
    x: torch.Tensor,
    residual: torch.Tensor,
    norm: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor | None,
    kind: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _output(x, scale), x.new_empty(x.shape)


def _output(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]))
