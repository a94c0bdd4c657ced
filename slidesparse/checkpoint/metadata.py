"""`config.json` of our checkpoints: what says how the weights are quantised, and to which engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slidesparse.checkpoint.families import family
from slidesparse.checkpoint.section import SECTION, Section
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError

QUANTIZATION = "quantization_config"
COMPRESSED_TENSORS = "compressed-tensors"
_FORMATS = {DType.INT8: "int-quantized", DType.FP8: "float-quantized"}
_KINDS = {DType.INT8: "int", DType.FP8: "float"}
_NOT_QUANTISED = (None, "bitnet")
"""The BF16 BitNet on the hub is labelled `bitnet` (quantised on the fly); the type of its tensors decides."""


def prepared_config(base: Mapping[str, Any], dtype: DType, where: str) -> dict[str, Any]:
    """Config of a W8A8 checkpoint that stock engines load.

    Code of the hub repository (`auto_map`) and its own quantisation label go: both would override ours.
    """
    config = {key: value for key, value in base.items() if key not in (QUANTIZATION, "auto_map", SECTION)}
    config["architectures"] = [family(base, where).architecture]
    config.pop("torch_dtype", None)  # the older name of `dtype`; both understand it, so one of them stays
    config["dtype"] = "bfloat16"
    config[QUANTIZATION] = quantization_config(dtype)
    return config


def converted_config(prepared: Mapping[str, Any], section: Section) -> dict[str, Any]:
    """Config of a pruned checkpoint.

    Layout `plain` keeps the quantisation metadata: any engine may load it as a dense model. Layout
    `lifted` gets a quant_method of its own, so that an engine which cannot lift activations refuses it.
    """
    config = dict(prepared)
    if section.layout == "lifted":
        config[QUANTIZATION] = {**prepared[QUANTIZATION], "quant_method": SECTION}
    config[SECTION] = section.model_dump(mode="json")
    return config


def quantization_config(dtype: DType) -> dict[str, Any]:
    """compressed-tensors metadata: static symmetric weights per output channel, dynamic activations per token."""
    from compressed_tensors.quantization import (
        QuantizationArgs,
        QuantizationConfig,
        QuantizationScheme,
        QuantizationStatus,
        QuantizationStrategy,
        QuantizationType,
    )

    def arguments(strategy: QuantizationStrategy, dynamic: bool) -> QuantizationArgs:
        kind = QuantizationType(_KINDS[dtype])
        return QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy=strategy, dynamic=dynamic)

    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=arguments(QuantizationStrategy.CHANNEL, dynamic=False),
        input_activations=arguments(QuantizationStrategy.TOKEN, dynamic=True),
        format=_FORMATS[dtype],
    )
    config = QuantizationConfig(
        config_groups={"group_0": scheme},
        quant_method=COMPRESSED_TENSORS,
        quantization_status=QuantizationStatus.COMPRESSED,
        format=_FORMATS[dtype],
        ignore=["lm_head"],
    )
    # Only what is set: an engine may hold an older compressed-tensors, which refuses keys that it does not know.
    unset = {"observer", "observer_kwargs", "scale_dtype", "zp_dtype"}
    groups = {"config_groups": {"group_0": {"weights": unset, "input_activations": unset}}}
    values: dict[str, Any] = config.model_dump(mode="json", exclude_none=True, exclude=groups)
    return values


def read_dtype(config: Mapping[str, Any], where: str) -> DType | None:
    """8-bit type of a checkpoint, None for an unquantised one. Raises CheckpointError for other quantisations."""
    values = config.get(QUANTIZATION) or {}
    method = values.get("quant_method")
    if method in _NOT_QUANTISED:
        return None
    if method in (COMPRESSED_TENSORS, SECTION):
        groups = list((values.get("config_groups") or {}).values())
        weights = (groups[0].get("weights") or {}) if len(groups) == 1 else {}
        for dtype, kind in _KINDS.items():
            if (weights.get("num_bits"), weights.get("type"), weights.get("strategy")) == (8, kind, "channel"):
                return dtype
    raise CheckpointError(
        f"{where}: {QUANTIZATION}: unsupported quantisation {method!r}; give a BF16 model or one that prepare made"
    )
