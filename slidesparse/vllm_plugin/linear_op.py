"""One linear layer as one operator: opaque to torch.compile, M symbolic, safe in CUDA graphs.

    slidesparse::linear(x, weight, scale, bias?, kind) -> y

`weight` is the packed form of a backend as one tensor; `kind` is a string such as `cusparselt 2:8 INT8 2560x6912`,
which all linears of one shape share: graphs of equal layers are equal, and vLLM compiles one of them.

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
from slidesparse.kernels.backend import Weight
from slidesparse.kernels.gemm_ops import NAMESPACE
from slidesparse.kernels.linear import Choice, LookUp, Recipe, W8A8Linear
from slidesparse.plan import Variant
from slidesparse.vllm_plugin.buckets import bucket


@dataclass(frozen=True)
class Prepared:
    """What a layer keeps: operands of the operator."""

    weight: torch.Tensor
    scale: torch.Tensor
    kind: str


class Kind:
    """All linears of one shape, type and variant."""

    def __init__(self, recipe: Recipe, form: Weight) -> None:
        """form: a packed weight of that shape; its data is not kept."""
        self.recipe = recipe
        self._form = replace(form, data=None)
        self._choices: dict[tuple[int, bool], Choice] = {}
        self.layers: dict[str, None] = {}
        """Names, in order."""
        self.calls: Counter[tuple[int, str]] = Counter()
        """Calls by bucket and path. A replay of a captured graph is no call: the capture was one."""

    def __call__(
        self, x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        m = x.shape[0]
        size = bucket(max(m, 1))
        choice = self._choices.get((size, bias is not None)) or self._choose(size, bias is not None, x.is_cuda)
        tokens = x.contiguous() if m == size else pad(x, (0, 0, 0, size - m))
        # One tensor serves both epilogues: kernels that want float32 widen it, those that want bfloat16 take it.
        y = self.recipe.run(tokens, replace(self._form, data=weight), scale, bias, bias, choice)
        self.calls[size, str(choice)] += 1
        return y[:m]

    def _choose(self, size: int, bias: bool, on_gpu: bool) -> Choice:
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise SlideSparseError(
                f"{next(iter(self.layers))}: {size} tokens come for the first time while a CUDA graph is captured; "
                f"run that size once before capturing"
            )
        # The last choice fuses the epilogue where the library can: one pass over the output less.
        choice = self._choices[size, bias] = self.recipe.choices(size, bias)[-1]
        return choice


_KINDS: dict[str, Kind] = {}
"""Of this process: filled while weights are loaded, before any graph runs."""


def prepare(
    layer: str, codes: torch.Tensor, scale: torch.Tensor, variant: Variant, dtype: DType, store: LookUp | None
) -> Prepared:
    """Lift and compress a weight where it lies: codes [N, K] of `dtype.torch`, scale float32 [N, 1].

    Raises:
        CheckpointError: wrong shape or type, or the weight does not keep to the pattern (layer, row, columns).
        UnsupportedHere, SlideSparseError: the backend has no algorithm for this shape.
    """
    linear = W8A8Linear(layer, codes, scale, None, k=codes.shape[1], variant=variant, dtype=dtype, store=store)
    name = f"{variant} {dtype.value} {linear.n}x{linear.k}"
    kind = _KINDS.get(name)
    if kind is None or kind.recipe.store is not store:  # another store: another model has taken this process over
        kind = Kind(linear.recipe, linear.weight)
        if not linear.backend.algorithms(dtype, bucket(1), linear.n, linear.weight.k):
            raise SlideSparseError(f"backend {variant.backend} has no algorithm for {name}")
        _KINDS[name] = kind
    kind.layers[layer] = None
    return Prepared(linear.weight.data, linear.scale, name)


def paths() -> dict[str, dict[str, int]]:
    """What ran in this process since `reset`: kind -> `M=bucket: algorithms` -> calls."""
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
    return _KINDS[kind](x, weight, scale, bias)


@linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, kind: str) -> torch.Tensor:
    return x.new_empty((x.shape[0], scale.shape[0]))
