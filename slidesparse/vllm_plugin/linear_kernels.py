"""Our linears in front of vLLM's own, for W8A8 layers: INT8 and FP8, a scale a channel, activations quantised a token.

vLLM asks the classes of a list, in order, whether they can implement a layer; ours say yes to everything once a backend
of ours is selected, and refuse by an error that names the layer when its weights are there: a "no" would hand the
layer to a stock kernel without a word.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.kernels import linear as registry
from vllm.model_executor.kernels.linear import (
    FP8ScaledMMLinearKernel,
    FP8ScaledMMLinearLayerConfig,
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils import replace_parameter
from vllm.platforms import PlatformEnum

from slidesparse.checkpoint.section import SECTION
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, SlideSparseError
from slidesparse.kernels.backend import backend
from slidesparse.machine import detect
from slidesparse.measure.clocks import clock_of
from slidesparse.pattern import Sparsity
from slidesparse.plan import AUTO
from slidesparse.tuning.store import TuningStore
from slidesparse.vllm_plugin import linear_op
from slidesparse.vllm_plugin.auto import Auto, at_hand, default_sizes
from slidesparse.vllm_plugin.fused import BEFORE, KIND
from slidesparse.vllm_plugin.settings import Selection, select
from slidesparse.vllm_plugin.shards import require_whole_groups


def selection() -> Selection | None:
    """Of the model that vLLM is building now; None for one that has nothing to do with us.

    Raises ConfigError and CheckpointError as `settings.select` does.
    """
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return None
    section = getattr(config.model_config.hf_config, SECTION, None)
    return select(config.additional_config, section, str(config.model_config.model))


def install() -> None:
    """Put both classes in front of vLLM's own. Doing it again changes nothing.

    NOTE: `register_linear_kernel` is public but appends, which is the lowest priority: a stock kernel would always
    come first. Hence the move to the front.
    """
    for kind, kernels, ours in (
        ("int8", registry._POSSIBLE_INT8_KERNELS, SlideSparseInt8Kernel),
        ("fp8", registry._POSSIBLE_FP8_KERNELS, SlideSparseFp8Kernel),
    ):
        candidates = kernels[PlatformEnum.CUDA]
        if ours not in candidates:
            registry.register_linear_kernel(ours, PlatformEnum.CUDA, kind)
            candidates.remove(ours)
            candidates.insert(0, ours)


class _OurLinear:
    """What both types share. A mixin, so that vLLM's classes bring how they read a layer's parameters."""

    selection: Selection
    dtype: DType
    kind: str
    """See `linear_op`; set when the weights are there."""

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Whether a backend of ours is selected. What the GPU lacks is an error with the layer's name, later."""
        chosen = selection()
        if chosen is None:
            return False, "was not asked for"
        return chosen.ours, None if chosen.ours else "is not used: the selected backend is vLLM's own"

    def _prepare(self, layer: LinearBase, codes: torch.Tensor, scale: torch.Tensor) -> None:
        """codes [N, K_rank], scale float32 [N, 1] -> the operands of `slidesparse::linear`, in their place."""
        name = str(layer.prefix)
        variant = self.selection.variant
        if layer.params_dtype is not torch.bfloat16:
            raise CheckpointError(f"{name}: activations are {layer.params_dtype}; start vLLM with dtype bfloat16")
        require_whole_groups(name, int(layer.input_size), codes.shape[1], variant.sparsity)
        try:
            auto = None
            if variant.backend == AUTO:
                auto = _auto(self.selection, self.dtype)
            else:
                backend(variant.backend).require(detect(), self.dtype)
            ready = linear_op.prepare(
                name,
                codes,
                scale,
                variant,
                self.dtype,
                _store(self.selection.tuning),
                auto,
                getattr(layer, BEFORE, None),
                getattr(layer, "bias", None),
            )
        except SlideSparseError as error:
            text = str(error)
            raise type(error)(text if text.startswith(name) else f"{name}: {text}") from None
        replace_parameter(layer, "weight", nn.Parameter(ready.weight, requires_grad=False))
        replace_parameter(layer, "weight_scale", nn.Parameter(ready.scale, requires_grad=False))
        self.kind = ready.kind
        setattr(layer, KIND, ready.kind)

    def apply_weights(self, layer: LinearBase, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [..., K_rank] -> [..., N]; quantises x as well."""
        tokens = x.reshape(-1, x.shape[-1])
        operands = tokens, layer.weight, layer.weight_scale, bias
        y: torch.Tensor = torch.ops.slidesparse.linear.default(*operands, self.kind)
        return y.view(*x.shape[:-1], y.shape[-1])


class SlideSparseInt8Kernel(_OurLinear, Int8ScaledMMLinearKernel):
    """INT8 weights arrive as [N, K_rank], scales as [N, 1]."""

    dtype = DType.INT8

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def __init__(self, c: Int8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]) -> None:
        super().__init__(c, layer_param_names)
        self.selection = _selected()

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        if self.config.is_static_input_scheme or not self.config.input_symmetric or not self.config.is_channelwise:
            raise CheckpointError(_other_scheme(layer))
        weight, scale, *_ = self._get_layer_params(layer)
        self._prepare(layer, weight.data, scale.data)


class SlideSparseFp8Kernel(_OurLinear, FP8ScaledMMLinearKernel):
    """FP8 weights arrive transposed, a view [K_rank, N], scales as [N, 1]."""

    dtype = DType.FP8

    @classmethod
    def can_implement(cls, c: FP8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        return True, None

    def __init__(self, c: FP8ScaledMMLinearLayerConfig, layer_param_names: Sequence[str]) -> None:
        super().__init__(c, layer_param_names)
        self.selection = _selected()

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        activation = self.config.activation_quant_key.scale
        per_token = not activation.static and activation.group_shape.is_per_token()
        if not per_token or not self.config.weight_quant_key.scale.group_shape.is_per_channel():
            raise CheckpointError(_other_scheme(layer))
        weight, scale, *_ = self._get_layer_params(layer)
        self._prepare(layer, weight.data.t().contiguous(), scale.data)

    def apply_scaled_mm(self, **operands: object) -> torch.Tensor:
        """vLLM's `apply_weights` would call it between its own quantisation and its end; ours replaces it whole."""
        raise NotImplementedError("slidesparse quantises activations itself")


def _selected() -> Selection:
    chosen = selection()
    assert chosen is not None  # or vLLM would not have made this kernel
    return chosen


def _other_scheme(layer: LinearBase) -> str:
    return (
        f"{layer.prefix}: slidesparse runs one weight scale a channel and dynamic symmetric activations a token, not "
        f"this layer's scheme; prepare the model again, or choose backend vllm"
    )


def _store(path: Path | None) -> TuningStore | None:
    """One store for all layers of a model, so that its counts are the model's."""
    return None if path is None else _opened(path, path.stat().st_mtime_ns)


def _auto(chosen: Selection, dtype: DType) -> Auto:
    """One for all layers of a type. Raises UnsupportedHere where no backend can run here."""
    config = get_current_vllm_config_or_none()
    assert config is not None  # weights are loaded inside it
    captured = config.compilation_config.cudagraph_capture_sizes or ()
    sizes = chosen.sizes or default_sizes(captured, config.scheduler_config.max_num_batched_tokens)
    store = _store(chosen.tuning)
    families = frozenset(() if store is None else store.families)
    return _auto_with(chosen.variant.sparsity, chosen.keep_dense, dtype, sizes, families)


@lru_cache(maxsize=8)
def _auto_with(
    sparsity: Sparsity | None, keep_dense: bool, dtype: DType, sizes: tuple[int, ...], families: frozenset[str]
) -> Auto:
    found, missing = at_hand(sparsity, keep_dense, dtype, detect(), families)
    for reason in missing:
        logging.getLogger("vllm.slidesparse").info("auto leaves out: %s", reason)
    return Auto(tuple(found), sizes, clock_of(backend(found[0].backend)))


@lru_cache(maxsize=8)
def _opened(path: Path, written_ns: int) -> TuningStore:
    """`written_ns`: a file that was tuned again is another store."""
    return TuningStore.open(path)
