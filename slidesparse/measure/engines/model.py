"""A `transformers` model around linear layers of our own: built empty, filled from a checkpoint, linears replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import operands, reference
from slidesparse.plan import Variant

OURS = ("quantization_config", "slidesparse", "architectures", "dtype", "torch_dtype", "transformers_version")
"""Keys of `config.json` that do not describe the model function; with the first, transformers would quantise itself."""


def build(checkpoint: Checkpoint, dtype: torch.dtype, linear: Callable[[str, nn.Linear], nn.Module]) -> Any:
    """The model of a checkpoint, in evaluation mode, weights other than the decoder's linears in `dtype`.

    `linear(name, empty)` gives the module that stands in for each linear layer of the decoder; `lm_head` stays.

    Raises:
        CheckpointError: unknown model type, or a tensor is missing or has another shape.
    """
    model = _empty(checkpoint.config, dtype)
    linears = [(name, module) for name, module in model.model.named_modules() if isinstance(module, nn.Linear)]
    for name, module in linears:
        parent, _, child = name.rpartition(".")
        setattr(model.model.get_submodule(parent), child, linear(f"model.{name}", module))
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, type(module)(config=model.config))  # rotary tables
    _fill(model, checkpoint, dtype)
    return model.eval()


def _empty(config: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """The architecture on the meta device: no memory, no initialisation."""
    keys = {key: value for key, value in config.items() if key not in OURS}
    kind = keys.pop("model_type", None)
    try:
        built = AutoConfig.for_model(str(kind), **keys)
    except ValueError as error:
        raise CheckpointError(f"config.json: model_type {kind!r}: {str(error).splitlines()[0]}") from None
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(built, dtype=dtype)


def _fill(model: Any, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
    names = set(checkpoint.names())
    state = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            if name not in names:
                raise CheckpointError(f"tensor {name} is missing from the checkpoint; prepare the model again")
            tensor = checkpoint.load(name).to(dtype)
            if tensor.shape != parameter.shape:
                raise CheckpointError(
                    f"tensor {name} is {tuple(tensor.shape)}, but config.json says {tuple(parameter.shape)}; "
                    f"prepare the model again"
                )
            state[name] = tensor
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()


def plain_codes(checkpoint: Checkpoint, name: str, k: int) -> torch.Tensor:
    """Unlifted codes [N, K] of a linear layer, whatever the checkpoint's layout."""
    codes = checkpoint.load(f"{name}.weight")
    section = checkpoint.section
    return operands.unlift(codes, k, section.pattern) if section is not None and section.layout == "lifted" else codes


def bias_of(checkpoint: Checkpoint, name: str) -> torch.Tensor | None:
    """[N] or None."""
    return checkpoint.load(f"{name}.bias") if f"{name}.bias" in set(checkpoint.names()) else None


class DequantisedLinear(nn.Module):
    """The dense reference: a plain product of dequantised weights and fake-quantised activations in float64.

        y = dq(q(x)) @ (codes * scale).T + bias, one rounding to x's type

    None of our kernels, no lifting. Weights are read from the checkpoint at each call, to where x is, so that a
    reference model of any size needs the memory of one layer. `quantise_activations` False leaves x as it is.
    """

    def __init__(self, checkpoint: Checkpoint, name: str, k: int, quantise_activations: bool = True) -> None:
        super().__init__()
        self._checkpoint, self._name, self._k, self._quantise = checkpoint, name, k, quantise_activations

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert self._checkpoint.dtype is not None
        weight = plain_codes(self._checkpoint, self._name, self._k).to(x.device).double()
        weight *= self._checkpoint.load(f"{self._name}.weight_scale").to(x.device).double()
        tokens = x.reshape(-1, self._k)
        if self._quantise:
            codes, scale = reference.quantise(tokens, self._checkpoint.dtype)
            tokens = codes.double() * scale.double()
        y = tokens.double() @ weight.T
        bias = bias_of(self._checkpoint, self._name)
        if bias is not None:
            y += bias.to(x.device).double()
        return y.to(x.dtype).reshape(*x.shape[:-1], -1)


def reference_model(
    checkpoint: Checkpoint, dtype: torch.dtype, quantise_activations: bool = True, device: str = "cpu"
) -> Any:
    """The checkpoint's model on `DequantisedLinear`s, on `device`. Raises CheckpointError as `build` does."""
    model = build(
        checkpoint,
        dtype,
        lambda name, empty: DequantisedLinear(checkpoint, name, empty.in_features, quantise_activations),
    )
    return model.to(device)


def require_fits(checkpoint: Checkpoint, where: str, dtype: DType, variant: Variant) -> None:
    """Raises CheckpointError for a checkpoint of another type, or pruned to another pattern, than the variant's."""
    section = checkpoint.section
    if checkpoint.dtype is not dtype:
        raise CheckpointError(f"{where}: holds {checkpoint.dtype or 'unquantised'} weights, expected {dtype.value}")
    if section is not None and section.pattern != variant.sparsity:
        raise CheckpointError(f"{where}: holds pattern {section.pattern}, but {variant} was asked for; convert again")
