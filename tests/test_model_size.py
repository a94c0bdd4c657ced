"""Sizes by formula against `transformers`' own models on the meta device, which count their parameters themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from slidesparse.bench_file import load_bench
from slidesparse.config import Model
from slidesparse.errors import CheckpointError
from slidesparse.model_size import checkpoint_bytes, kv_cache_bytes, parameter_count
from slidesparse.pattern import Sparsity

BENCH = load_bench(Path(__file__).parent.parent / "bench.yaml")
TINY_QWEN = {
    "model_type": "qwen2",
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}
MODELS = BENCH.models | {
    "tiny-qwen": Model(quantization="absmax_per_channel", config=TINY_QWEN),
    "biased-llama": Model(
        quantization="absmax_per_channel",
        config=TINY_QWEN | {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
}


def meta_model(model: Model) -> Any:
    keys = {key: value for key, value in model.config.items() if key != "model_type"}
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(model.config["model_type"], **keys))


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_those_of_transformers(name: str) -> None:
    theirs = meta_model(MODELS[name])
    decoder = [module for module in theirs.model.modules() if isinstance(module, torch.nn.Linear)]
    linear = sum(module.weight.numel() for module in decoder)
    total = sum(parameter.numel() for parameter in theirs.parameters())  # tied ones are listed once
    count = parameter_count(MODELS[name])
    assert (count.linear, count.total) == (linear, total)
    merged = sum(n * k for n, k in MODELS[name].linear_shapes().values())
    assert merged * MODELS[name].config["num_hidden_layers"] == linear


def test_checkpoint_bytes_of_the_reference_model() -> None:
    """Written out from the shapes of the reference run."""
    size = checkpoint_bytes(BENCH.models["BitNet-2B"])
    linear = 30 * (3840 * 2560 + 2560 * 2560 + 13824 * 2560 + 2560 * 6912)
    scales = 4 * 30 * (3840 + 2560 + 13824 + 2560)
    other = 128256 * 2560 + 30 * (3 * 2560 + 6912) + 2560
    assert size.base == 2 * (linear + other)
    assert size.prepared == linear + scales + 2 * other
    assert size.converted == linear + scales


def test_lifted_layout_takes_the_bytes_of_k_prime() -> None:
    model = BENCH.models["BitNet-2B"]
    plain, lifted = checkpoint_bytes(model), checkpoint_bytes(model, Sparsity.parse("2:8"))
    # 2560 -> 3840 exactly; 6912 -> 10368 exactly: the expansion of 2:8 is 1.5
    assert lifted.converted - plain.converted == parameter_count(model).linear // 2
    assert (lifted.base, lifted.prepared) == (plain.base, plain.prepared)


def test_kv_cache() -> None:
    # keys and values, 30 layers, 5 heads of 128, two bytes
    assert kv_cache_bytes(BENCH.models["BitNet-2B"], 7) == 2 * 30 * 5 * 128 * 2 * 7


def test_unknown_model_type_is_refused() -> None:
    model = Model(quantization="absmax_per_channel", config=TINY_QWEN | {"model_type": "mamba"})
    with pytest.raises(CheckpointError, match=r"unknown model_type 'mamba'; supported: bitnet, llama, qwen2"):
        parameter_count(model)
