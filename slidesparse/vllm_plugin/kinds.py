"""All linears of one shape, type and variant: which kernels run them at each M, and running them.

A call costs one look-up by M in Python: a `Plan` holds everything else, made at a bucket's first call. Codes are
written into buffers of a whole bucket, of which the kernels fill the first M rows; rows of a product do not see each
other, so the others may hold anything, and are cut off.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from slidesparse.errors import SlideSparseError
from slidesparse.kernels.backend import Encoder, Weight, operation_name
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.linear import Choice, Recipe
from slidesparse.vllm_plugin.buckets import bucket

Products = tuple[torch.Tensor, torch.Tensor | None]
"""y [M, N], and x + residual where one is added."""


@dataclass(frozen=True)
class Way:
    """One backend that can run a kind, and where its weight lies in the layer's operand."""

    recipe: Recipe
    form: Weight
    """A packed weight of that shape, without data."""
    shape: tuple[int, ...] | None = None
    """Of the weight's tensor, where the operand is bytes of several forms; None: the operand is the weight."""
    dtype: torch.dtype = torch.uint8
    place: tuple[int, int] = (0, 0)
    """First byte in the operand, and the one behind the last."""

    @classmethod
    def of(cls, recipe: Recipe, weight: Weight) -> Way:
        """Of a backend that has the operand to itself."""
        return cls(recipe, replace(weight, data=None))

    def weight(self, operand: torch.Tensor) -> Weight:
        """The packed weight in a layer's operand."""
        if self.shape is None:
            return replace(self.form, data=operand)
        return replace(self.form, data=operand[self.place[0] : self.place[1]].view(self.dtype).view(self.shape))

    @property
    def scaled_only(self) -> bool:
        """See `Backend.scaled_only`."""
        return self.recipe.backend.scaled_only


@dataclass(frozen=True, slots=True)
class Plan:
    """How a bucket of M runs."""

    size: int
    """Rows of the product."""
    way: Way
    choice: Choice
    encode: Encoder
    name: str = ""
    """Of the way, where there are several."""

    @classmethod
    def make(cls, way: Way, choice: Choice, size: int, name: str = "") -> Plan:
        """Raises ValueError where the kernel before the GEMM cannot take such rows."""
        return cls(size, way, choice, way.recipe.encoder(choice), name)

    def run(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: torch.Tensor | None,
        eps: float,
        operand: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Products:
        """x [M, K] ([M, 2 K] before a gate), M <= size -> [M, N]; see `backend.Encoder`."""
        m, size, recipe = x.shape[0], self.size, self.way.recipe
        codes = torch.empty(size, recipe.operand_k, dtype=recipe.dtype.torch, device=x.device)
        tokens = torch.empty(size, 1, dtype=torch.float32, device=x.device)
        written = (codes, tokens) if m == size else (codes[:m], tokens[:m])
        other = None if residual is None else residual.contiguous()
        total = self.encode(x.contiguous(), other, norm, eps, *written)
        # One tensor serves both epilogues: kernels that want float32 widen it, those that want bfloat16 take it.
        y = recipe.multiply(codes, tokens, self.way.weight(operand), scale, bias, bias, self.choice)
        return y if m == size else y[:m], total

    @property
    def path(self) -> str:
        """What runs, in words: `add_norm_quantise_lift 256x4 > 0.s1 > words=1024 warps=8 rows=2`."""
        name = f"{self.name}: " if self.name else ""
        return f"{name}{operation_name(self.choice.before, self.way.recipe.backend.sparse)} {self.choice}"


Key = tuple[BitNetOperation | None, bool, int]
"""What is fused with quantising x, whether there is a bias, and M (or its bucket)."""
Chooser = Callable[[BitNetOperation | None, bool, int], Plan]
"""The plan of a bucket. May raise ValueError and SlideSparseError, whose text lacks the layer."""


def only(way: Way) -> Chooser:
    """Where there is nothing to choose from."""

    def choose(before: BitNetOperation | None, bias: bool, size: int) -> Plan:
        return Plan.make(way, way.recipe.choice(size, bias, before), size)

    return choose


class Kind:
    """See the head of this file."""

    def __init__(self, recipe: Recipe, choose: Chooser, settings: object = None) -> None:
        """recipe: the first of those that `choose` takes; settings: what `choose` was made with."""
        self.recipe, self.choose, self.settings = recipe, choose, settings
        self._buckets: dict[Key, tuple[Plan, tuple[int, str]]] = {}
        self._by_m: dict[Key, tuple[Plan, tuple[int, str]]] = {}
        """The same by M itself: one look-up a call."""
        self.layers: dict[str, None] = {}
        """Names, in order."""
        self.calls: Counter[tuple[int, str]] = Counter()
        """Calls by bucket and path. A replay of a captured graph is no call: the capture was one."""

    def __call__(
        self,
        before: BitNetOperation | None,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        norm: torch.Tensor | None,
        eps: float,
        operand: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor | None,
    ) -> Products:
        """The operands of `Plan.run`, by the plan for this M."""
        key = before, bias is not None, x.shape[0]
        plan, path = self._by_m.get(key) or self._plan(key, x.is_cuda)
        out = plan.run(x, residual, norm, eps, operand, scale, bias)
        self.calls[path] += 1
        return out

    def _plan(self, key: Key, on_gpu: bool) -> tuple[Plan, tuple[int, str]]:
        before, bias, m = key
        size = bucket(max(m, 1))
        found = self._buckets.get((before, bias, size))
        if found is None:
            layer = next(iter(self.layers))
            if on_gpu and torch.cuda.is_current_stream_capturing():
                raise SlideSparseError(
                    f"{layer}: {size} tokens come for the first time while a CUDA graph is captured; "
                    f"run that size once before capturing"
                )
            try:
                plan = self.choose(before, bias, size)
            except ValueError as error:
                raise SlideSparseError(f"{layer}: {error}") from None
            except SlideSparseError as error:
                raise type(error)(f"{layer}: {error}") from None
            found = self._buckets[before, bias, size] = plan, (size, plan.path)
        self._by_m[key] = found
        return found
