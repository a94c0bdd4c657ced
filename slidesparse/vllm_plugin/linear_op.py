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

from dataclasses import dataclass

import torch

from slidesparse.dtypes import DType
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.linear import LookUp, Recipe, W8A8Linear
from slidesparse.plan import Variant
from slidesparse.vllm_plugin.auto import Auto, Fastest, Layer, combine, measure
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.kinds import Kind, only


@dataclass(frozen=True)
class Prepared:
    """What a layer keeps: operands of the operators."""

    weight: torch.Tensor
    scale: torch.Tensor
    kind: str


_KINDS: dict[str, Kind] = {}
"""Of this process: filled while weights are loaded, before any graph runs."""


def prepare(
    layer: str,
    codes: torch.Tensor,
    scale: torch.Tensor,
    variant: Variant,
    dtype: DType,
    store: LookUp | None,
    auto: Auto | None = None,
    before: BitNetOperation | None = None,
    bias: torch.Tensor | None = None,
) -> Prepared:
    """Lift and compress a weight where it lies: codes [N, K] of `dtype.torch`, scale float32 [N, 1].

    Args:
        auto: what backend `auto` chooses from; the first layer of a kind is measured with `before` and `bias`.

    Raises:
        CheckpointError: wrong shape or type, or the weight does not keep to the pattern (layer, row, columns).
        UnsupportedHere: the backend has no algorithm for this shape.
        SlideSparseError: no backend that `auto` could choose is right.
    """
    linears = [
        W8A8Linear(layer, codes, scale, None, k=codes.shape[1], variant=one, dtype=dtype, store=store)
        for one in ((variant,) if auto is None else auto.variants)
    ]
    first = linears[0]
    operand, ways = combine(linears)
    name = f"{variant} {dtype.value} {first.n}x{first.k}"
    kind = _KINDS.get(name)
    # Another store, or other settings: another model has taken this process over.
    if kind is None or kind.recipe.store is not store or kind.settings is not auto:
        if auto is None:
            first.recipe.offered(bucket(1), False)
            kind = Kind(first.recipe, only(ways[0]))
        else:
            own = Layer(layer, codes, first.scale, operand, before, bias)
            kind = Kind(first.recipe, measure(own, ways, auto, dtype), auto)
        _KINDS[name] = kind
    kind.layers[layer] = None
    return Prepared(operand, first.scale, name)


def paths() -> dict[str, dict[str, int]]:
    """What ran in this process since `reset`: kind -> `M=bucket: operation, algorithms` -> calls."""
    return {
        name: {f"M={size}: {path}": count for (size, path), count in sorted(kind.calls.items())}
        for name, kind in _KINDS.items()
    }


def measured() -> dict[str, dict[str, dict[str, float | str]]]:
    """What backend `auto` measured: kind -> `M=bucket` -> candidate -> microseconds, or why it does not count.

    The first of a bucket is the one that runs.
    """
    return {
        name: {f"M={size}": {**one.us, **one.refused} for size, one in kind.choose.measured.items()}
        for name, kind in _KINDS.items()
        if isinstance(kind.choose, Fastest)
    }


def recipe_at(kind: str, m: int, before: BitNetOperation | None = None, bias: bool = False) -> Recipe:
    """The backend that runs a kind at M tokens, and what there is to know to check it. Makes no plan of a library."""
    return _KINDS[kind].choose(before, bias, bucket(max(m, 1))).way.recipe


def kinds() -> tuple[Kind, ...]:
    """Everything prepared in this process."""
    return tuple(_KINDS.values())


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
    return _KINDS[kind](None, x, None, None, 0.0, weight, scale, bias)[0]


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
    return _KINDS[kind]("norm", x, None, norm, eps, weight, scale, bias)[0]


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
    y, total = _KINDS[kind]("add", x, residual, norm, eps, weight, scale, bias)
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
    return _KINDS[kind]("gate", gate_up, None, norm, eps, weight, scale, bias)[0]


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
