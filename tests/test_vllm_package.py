"""The plugin inside the real vLLM package, without a GPU. `vllm_scenarios.py` and `vllm_ranks.py` run it; here is what
must hold.

vLLM believes in two H200 (`vllm_stub.py`); tensors are on the CPU, where doubles stand in for cuBLASLt and cuSPARSELt.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import vllm_stub
from prepared_models import model_run, run_convert, run_prepare
from small_models import BITNET, QWEN2

from slidesparse.vllm_plugin import versions

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(vllm_stub.COMPILER is None, reason="no C compiler for the libraries that stand in for a driver"),
]

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
"""Divisible by two ranks; 64 and 96 columns a rank are whole groups of 8, not of 6."""
ODD_HEADS = {"hidden_size": 192, "num_attention_heads": 12, "num_key_value_heads": 3}
"""KV heads that two ranks can only share once each stands twice, as BitNet-2B's 5: 4 query heads each, then 2."""
FUNCTION_BOUND = 1e-5
"""float32 logits of two implementations that add in another order."""
LOGITS_BOUND = {"INT8": 0.06, "FP8": 0.15}
"""bfloat16 logits: rounding moves some activations to the neighbouring code (an e4m3 code is 6 to 12 % from the next).
transformers' own bfloat16 logits are 0.036 and 0.089 from its float32 ones. What is exact is asked of each linear."""
CPU_PLATFORM = "cpu_ranks"
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared, converted and broken checkpoints, the stub, and the project as an installed distribution."""
    root = tmp_path_factory.mktemp("vllm")
    lists = {"end_to_end": ["2:4", "2:6", "2:8"], "kernel_high": ["2:8"], "kernel_low": ["2:inf"]}
    run = model_run(root, BITNET | SIZES, sparsity=lists)
    assert not run_prepare(run).failed
    assert not run_convert(run).failed
    assert not run_prepare(model_run(root / "qwen2", QWEN2 | SIZES)).failed
    (root / "qwen2/checkpoints/Tiny-INT8").rename(root / "checkpoints/Qwen-INT8")
    assert not run_prepare(model_run(root / "odd", BITNET | SIZES | ODD_HEADS)).failed
    (root / "odd/checkpoints/Tiny-INT8").rename(root / "checkpoints/Odd-INT8")
    for name in ("INT8", "FP8"):
        config = json.loads((root / f"checkpoints/Tiny-{name}/config.json").read_text())
        activations = config["quantization_config"]["config_groups"]["group_0"]["input_activations"]
        activations |= {"dynamic": False, "strategy": "tensor"}
        target = root / f"checkpoints/Static-{name}/config.json"
        target.parent.mkdir()
        target.write_text(json.dumps(config))
    (root / "stub").mkdir()
    vllm_stub.build(root / "stub")
    _install(root / "site")
    return root


def _install(site: Path) -> None:
    """What pip leaves of a package besides its code: enough for vLLM to find an entry point."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    points["vllm.platform_plugins"] = {CPU_PLATFORM: "vllm_checks:cpu_platform"}
    info = site / "slidesparse-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slidesparse\nVersion: 0.0.0\n")
    lines = [f"[{group}]\n{name} = {value}\n" for group, of in points.items() for name, value in of.items()]
    (info / "entry_points.txt").write_text("".join(lines))


def _start(folder: Path, script: str, *arguments: str, stub: bool) -> subprocess.Popen[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("VLLM_", "TRITON_"))}
    environment = kept | {
        "PYTHONPATH": os.pathsep.join(str(path) for path in (folder / "site", ROOT, ROOT / "tests")),
        "LD_LIBRARY_PATH": str(folder / "stub") if stub else "",
        "VLLM_CACHE_ROOT": str(folder / "cache"),
        "VLLM_PLUGINS": "slidesparse" if stub else f"slidesparse,{CPU_PLATFORM}",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(ROOT / "tests" / script), str(folder), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _result(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, log = process.communicate(timeout=240)
    assert process.returncode == 0, log[-4000:]
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, Any]:
    return _result(_start(folder, "vllm_scenarios.py", stub=True))


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    processes = [_start(folder, "vllm_ranks.py", str(rank), "2", stub=False) for rank in range(2)]
    return [_result(process) for process in processes]


@pytest.fixture(scope="module")
def alone(folder: Path) -> dict[str, Any]:
    """One rank where tensors are on the platform's device, so that models can be compiled."""
    return _result(_start(folder, "vllm_ranks.py", "0", "1", stub=False))


def value(results: dict[str, Any], scenario: str) -> Any:
    found = results[scenario]
    if isinstance(found, dict) and set(found) == {"error"}:
        pytest.fail(found["error"])
    return found


def test_the_installed_vllm_is_a_supported_one() -> None:
    from importlib.metadata import version

    assert versions.unsupported(version("vllm")) is None


def test_the_entry_point_registers_once_and_first(one: dict[str, Any]) -> None:
    found = value(one, "registration")
    assert found["known"]
    assert found["first"] == [
        ["SlideSparseInt8Kernel", *found["before"][0]],
        ["SlideSparseFp8Kernel", *found["before"][1]],
    ]
    assert found["second"] == found["first"]
    assert found["kept"], "a class that is registered stays"


def test_kernels_are_ours_where_asked_for_and_vllms_elsewhere(one: dict[str, Any]) -> None:
    found = value(one, "kernels")
    int8, fp8 = ["SlideSparseInt8Kernel"] * 4, ["SlideSparseFp8Kernel"] * 4
    stock8, stock_fp8 = ["CutlassInt8ScaledMMLinearKernel"] * 4, ["CutlassFP8ScaledMMLinearKernel"] * 4
    assert found == {
        "Tiny-INT8 None": stock8,
        "Tiny-FP8 None": stock_fp8,
        "Tiny-INT8 {'backend': 'cublaslt'}": int8,
        "Tiny-FP8 {'backend': 'cublaslt'}": fp8,
        "Tiny-INT8-SlideSparse-2_8 None": int8,
        "Tiny-FP8-SlideSparse-2_8 None": fp8,
        "Tiny-INT8-SlideSparse-2_8 {'backend': 'vllm'}": stock8,
        "Qwen-INT8 None": stock8,
    }


def test_no_two_ways_to_run_share_compiled_graphs(one: dict[str, Any]) -> None:
    keys = value(one, "cache_keys")
    assert len(set(keys)) == len(keys) == 5


def test_bitnet_is_the_model_that_transformers_has(one: dict[str, Any]) -> None:
    found = value(one, "model_function")
    assert found["distance"] < FUNCTION_BOUND
    assert found["tied"]
    assert found["spread"] > 0.05, "norm weights that are all alike would hide a norm in the wrong place"


def test_quantised_models_are_right_layer_by_layer_and_as_a_whole(one: dict[str, Any]) -> None:
    found = value(one, "logits")
    assert len(found) == 11
    for name, of in found.items():
        kind = "FP8" if "FP8" in name else "INT8"
        assert of["distance"] < LOGITS_BOUND[kind], name
        assert len(of["layers"]) == 8, "four merged linears in each of two decoder layers"
        wanted = {"within_bound"} if kind == "FP8" else {"exact"}
        if "cutlass" in name:
            wanted = {"exact", "within_bound"}  # its scales come in another order
        assert set(of["layers"].values()) <= wanted, name


def test_the_path_that_ran_can_be_asked_for(one: dict[str, Any]) -> None:
    ran = value(one, "logits")["Tiny-INT8-SlideSparse-2_8 None"]["ran"]
    rest = "quantise_lift torch > int_mm > fused"
    assert ran == {
        "cusparselt 2:8 INT8 128x128": [f"M=32: norm_{rest}"],
        "cusparselt 2:8 INT8 128x192": [f"M=32: gate_norm_{rest}"],
        "cusparselt 2:8 INT8 256x128": [f"M=32: add_norm_{rest}", f"M=32: norm_{rest}"],
        "cusparselt 2:8 INT8 384x128": [f"M=32: add_norm_{rest}"],
    }, "qkv of the first layer has nothing to add"


def test_the_tuning_store_of_the_settings_chooses(one: dict[str, Any]) -> None:
    ran = value(one, "tuned")
    nearest, default = ran["cublaslt INT8 128x192"], ran["cublaslt INT8 384x128"]
    assert nearest == ["M=32: gate_norm_quantise torch > float64 > fused"], "the nearest M of this shape"
    assert default == ["M=32: add_norm_quantise torch > int_mm > fused"], "nothing known"


def test_auto_measures_at_load_and_its_model_is_right(one: dict[str, Any]) -> None:
    found = value(one, "auto")
    dense = ["cublaslt", "cutlass"]
    chosen_from = {
        "Tiny-INT8 {}": dense,
        "Tiny-FP8-SlideSparse-2_8 {}": sorted([*dense, "cusparselt 2:8"]),
        "Tiny-INT8-SlideSparse-2_8 {'keep_dense': False}": ["cusparselt 2:8"],
    }
    assert set(found) == set(chosen_from)
    for name, of in found.items():
        kind = "FP8" if "FP8" in name else "INT8"
        assert of["distance"] < LOGITS_BOUND[kind], name
        assert len(of["layers"]) == 8
        assert set(of["layers"].values()) <= {"exact", "within_bound"}, name
        assert len(of["measured"]) == 4, "one a shape"
        assert all(sizes == {"M=16": chosen_from[name], "M=32": chosen_from[name]} for sizes in of["measured"].values())
        for paths in of["ran"].values():
            for path in paths:
                bucket, backend, _ = path.split(": ")
                assert bucket == "M=32"
                assert backend in chosen_from[name]


def test_layers_hold_the_lifted_codes_of_the_checkpoint(one: dict[str, Any]) -> None:
    assert value(one, "packed_weights") is True


@pytest.mark.parametrize(
    ("case", "parts"),
    [
        ("unknown key", ["ConfigError", "slidesparse.bakend", "allowed here"]),
        ("no pattern", ["ConfigError", "slidesparse.sparsity", "missing"]),
        ("other pattern", ["ConfigError", "2:4", "holds 2:8"]),
        ("not pruned", ["CheckpointError: model.layers.0.self_attn.qkv_proj: row", "2:4"]),
        ("half", ["CheckpointError: model.layers.0.self_attn.qkv_proj", "float16", "bfloat16"]),
        ("unquantised", ["model.layers.0.self_attn.qkv_proj", "UnquantizedLinearMethod"]),
        ("vLLM's own asked for", ["model.layers.0.self_attn.qkv_proj", "CutlassInt8", "--linear-backend"]),
        ("activation", ["CheckpointError", "hidden_act 'silu'"]),
        ("LoRA", ["ConfigError", "LoRA", "backend vllm"]),
        ("static INT8", ["CheckpointError: model.layers.0.self_attn.qkv_proj", "scheme"]),
        ("static FP8", ["CheckpointError: model.layers.0.self_attn.qkv_proj", "scheme"]),
    ],
)
def test_what_cannot_run_is_an_error_never_a_stock_kernel(one: dict[str, Any], case: str, parts: list[str]) -> None:
    text = value(one, "refusals")[case]
    assert "\n" not in text
    for part in parts:
        assert part in text


def test_two_ranks_give_the_model_of_one(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = value(rank, "models")
        assert len(found) == 3
        for name, of in found.items():
            assert of["distance"] < LOGITS_BOUND["FP8" if "FP8" in name else "INT8"], name
            assert of["lifted"], f"{name}: a rank holds its own columns, lifted"


def test_kv_heads_that_two_ranks_cannot_share_are_repeated(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        found = value(rank, "odd_heads")
        assert found["distance"] < LOGITS_BOUND["INT8"]
        assert found["qkv"] == [(6 + 3 + 3) * 16, 192], "6 query heads and 3 KV heads a rank"
        assert found["refused"].startswith("ConfigError: ")
        assert "3 KV heads on 2 ranks have to stand 2 times each" in found["refused"]
        assert """--hf-overrides '{"num_key_value_heads": 6}'""" in found["refused"]


def test_a_sub_norm_over_two_ranks_is_the_norm_of_the_whole_row(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert value(rank, "sub_norm") < 1e-5


def test_the_model_is_one_graph_for_every_m(alone: dict[str, Any]) -> None:
    found = value(alone, "compiled")
    assert found["same"] == [True] * 3
    per_graph = {"norm_linear": 1 + 2, "add_norm_linear": 1 + 2, "gate_norm_linear": 2}
    assert found["operators of each graph"] == [per_graph], "one graph; qkv of the first layer has nothing to add"


def test_graphs_are_cut_at_attention_with_its_rotary_embedding(alone: dict[str, Any]) -> None:
    """What reads this step's slots and cache is in no graph of its own."""
    between = ["norm_linear", "add_norm_linear", "gate_norm_linear"]
    attention = ["rope_attention"]
    assert value(alone, "cuts") == [
        ["norm_linear"], attention, [*between, "add_norm_linear"], attention, between
    ]  # fmt: skip


def test_on_two_ranks_sub_norms_stay_apart_and_the_paths_say_so(ranks: list[dict[str, Any]]) -> None:
    """The other ranks' squares are needed between norm and quantise."""
    rest = "quantise_lift torch > int_mm > fused"
    for rank in ranks:
        found = value(rank, "compiled")
        assert found["same"] == [True] * 3
        assert found["operators of each graph"] == [{"norm_linear": 1, "add_norm_linear": 1 + 2, "linear": 4}]
        ran = {name: list(paths) for name, paths in found["ran"].items()}
        apart = ["M=32: quantise_lift fused > int_mm > fused"]
        assert ran["cusparselt 2:8 INT8 128x64"] == ran["cusparselt 2:8 INT8 128x96"] == apart, "o and down"
        assert ran["cusparselt 2:8 INT8 192x128"] == [f"M=32: add_norm_{rest}"]
        assert ran["cusparselt 2:8 INT8 128x128"] == [f"M=32: add_norm_{rest}", f"M=32: norm_{rest}"]


def test_a_cut_through_a_group_names_the_layer(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        text = value(rank, "cut")
        assert text.startswith(
            "CheckpointError: model.layers.0.self_attn.o_proj: tensor parallelism gives each rank 64"
        )
