"""Task 1: the quantised checkpoints, as stock tools see them, and what is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig, QuantizationStrategy
from prepared_models import SHARDS, contents, dequantised, model_run, mounted_disk, prepare_rows, prepared, run_prepare
from safetensors.torch import load_file, save_file
from small_models import BITNET, LLAMA, QWEN2, float_model
from small_runs import MODEL
from transformers import AutoModelForCausalLM
from transformers.integrations.bitnet import WeightQuant

from slidesparse.checkpoint import disk, prepare, shard, source
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import DiskError
from slidesparse.files import read_json

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dtype", QUANTISED)
def test_bitnet_keeps_the_function_of_the_model(dtype: DType, tmp_path: Path) -> None:
    """Dequantised weights are BitNet's own; the sub-norms and everything else are the base model's bytes."""
    run = model_run(tmp_path)
    assert (run_prepare(run).ok, run_prepare(run).done_before) == (2, 2)
    base, made = source.obtain(run.plan, MODEL, quiet=True).checkpoint, prepared(run, dtype)
    state = dequantised(made)
    for name in base.names():
        if name.removesuffix(".weight") in made.linears():
            torch.testing.assert_close(state[name], WeightQuant.apply(base.load(name).float()), rtol=1e-6, atol=0)
        else:
            assert torch.equal(made.load(name), base.load(name)), name
    assert {"model.layers.1.self_attn.attn_sub_norm.weight", "model.layers.1.mlp.ffn_sub_norm.weight"} <= set(
        made.names()
    )


@pytest.mark.parametrize("config", [LLAMA, QWEN2])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_other_models_are_quantised_by_output_channel(dtype: DType, config: dict[str, Any], tmp_path: Path) -> None:
    run = model_run(tmp_path, config)
    assert run_prepare(run).ok == 2
    base, made = source.obtain(run.plan, MODEL, quiet=True).checkpoint, prepared(run, dtype)
    state = dequantised(made)
    squares = errors = 0.0
    for name in made.linears():
        weight = base.load(f"{name}.weight").float()
        scale = made.load(f"{name}.weight_scale")
        torch.testing.assert_close(scale, weight.abs().amax(dim=1, keepdim=True) / dtype.limit, rtol=0, atol=0)
        errors += float((state[f"{name}.weight"] - weight).double().square().sum())
        squares += float(weight.double().square().sum())
    assert prepare_rows(run)[dtype.value]["weight_error_rel"] == pytest.approx((errors / squares) ** 0.5, rel=1e-4)
    if config is QWEN2:
        name = "model.layers.0.self_attn.q_proj.bias"
        assert torch.equal(made.load(name), base.load(name))


@pytest.mark.parametrize("config", [BITNET, QWEN2])
@pytest.mark.parametrize("dtype", QUANTISED)
def test_stock_transformers_loads_it_with_compressed_tensors(
    dtype: DType, config: dict[str, Any], tmp_path: Path
) -> None:
    """An independent reader of the metadata: no key missing or left over, the weights it rebuilds are ours."""
    run = model_run(tmp_path, config)
    run_prepare(run)
    made = prepared(run, dtype)
    model, report = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        logits = model(tokens).logits
        reference = float_model(config)
        reference.load_state_dict(dequantised(made), strict=False)
        expected = reference(tokens).logits
    error = (logits - expected).norm() / expected.norm()
    assert 0 < error < 0.1, "activations are quantised to 8 bits there, weights are the same"


@pytest.mark.parametrize("dtype", QUANTISED)
def test_the_metadata_says_channel_weights_and_dynamic_tokens(dtype: DType, tmp_path: Path) -> None:
    run = model_run(tmp_path)
    run_prepare(run)
    config = read_json(run.plan.prepared_folder(MODEL, dtype) / "config.json")
    assert config["architectures"] == ["BitNetForCausalLM"]
    read = QuantizationConfig.model_validate(config["quantization_config"])
    scheme = read.config_groups["group_0"]
    assert scheme.weights.strategy == QuantizationStrategy.CHANNEL
    assert scheme.input_activations.strategy == QuantizationStrategy.TOKEN
    assert scheme.input_activations.dynamic is True
    assert (scheme.weights.num_bits, scheme.weights.symmetric, scheme.weights.dynamic) == (8, True, False)
    assert read.ignore == ["lm_head"]
    assert read.format == {DType.INT8: "int-quantized", DType.FP8: "float-quantized"}[dtype]
    assert scheme.weights.type == {DType.INT8: "int", DType.FP8: "float"}[dtype]
    assert set(scheme.targets) == {"Linear"}


def as_downloaded(folder: Path, run_folder: Path) -> Path:
    """The synthetic model in one foreign file, as a download would be, with tokeniser and hub leftovers."""
    made = source.obtain(model_run(run_folder).plan, MODEL, quiet=True).checkpoint
    folder.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in made.folder.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_json(made.folder / "config.json") | {
        "quantization_config": {"quant_method": "bitnet", "linear_class": "autobitlinear"},
        "auto_map": {"AutoConfig": "configuration_bitnet.BitNetConfig"}, "torch_dtype": "bfloat16",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "configuration_bitnet.py").write_text("raise SystemExit")
    (folder / ".hidden").write_text("")
    return folder


def test_a_downloaded_model_gives_the_same_codes_and_loses_its_own_label(tmp_path: Path) -> None:
    theirs = as_downloaded(tmp_path / "theirs", tmp_path / "one")
    one, two = model_run(tmp_path / "one"), model_run(tmp_path / "two", local=theirs, source="local")
    run_prepare(one)
    assert run_prepare(two).ok == 2
    for dtype in QUANTISED:
        ours, other = prepared(one, dtype), prepared(two, dtype)
        assert set(ours.names()) == set(other.names())
        for name in ours.names():
            assert torch.equal(ours.load(name).view(torch.uint8), other.load(name).view(torch.uint8)), name
        assert other.config["quantization_config"]["quant_method"] == "compressed-tensors"
        assert not {"auto_map", "torch_dtype"} & set(other.config)
        names = {path.name for path in other.folder.iterdir()}
        assert "tokenizer.json" in names
        assert not {"configuration_bitnet.py", ".hidden", "model.safetensors", "slidesparse_source.json"} & names
    int8, fp8 = (two.plan.prepared_folder(MODEL, dtype) / SHARDS[2] for dtype in QUANTISED)
    assert os.path.samefile(int8, fp8), "embeddings are written once"
    assert (theirs / "model.safetensors").stat().st_nlink == 1, "a user's file is never linked to"


def test_a_finished_checkpoint_is_left_alone_and_a_lost_one_is_made_again(tmp_path: Path) -> None:
    run = model_run(tmp_path)
    run_prepare(run)
    before = contents(tmp_path / "checkpoints")
    shutil.rmtree(run.plan.prepared_folder(MODEL, DType.FP8))
    (run.plan.prepared_folder(MODEL, DType.INT8) / SHARDS[2]).unlink()
    outcome = run_prepare(run)
    assert (outcome.ok, outcome.done_before) == (2, 0)
    assert contents(tmp_path / "checkpoints") == before
    assert run_prepare(run).done_before == 2


def test_rows_tell_bytes_and_the_floor(tmp_path: Path) -> None:
    run = model_run(tmp_path)
    run_prepare(run)
    base = source.obtain(run.plan, MODEL, quiet=True).checkpoint
    layers = sum(base.load(name).nbytes for layer in base.layers() for name in layer)
    table = prepare_rows(run)
    assert sum(row["bytes_read"] for row in table.values()) == layers
    for dtype, row in ((dtype, table[dtype.value]) for dtype in QUANTISED):
        made = prepared(run, dtype)
        data = sum(made.load(name).nbytes for layer in made.layers() for name in layer)
        assert row["bytes_written"] == data, "the shard of the embeddings is a link"
        assert row["floor_s"] == pytest.approx(
            row["bytes_read"] / 2**20 / row["disk_read_mib_s"] + row["bytes_written"] / 2**20 / row["disk_write_mib_s"],
            abs=1e-3,
        )
        assert row["parameters"] == sum(base.load(name).numel() for name in base.names())
        assert row["linear_layers"] == 14
        assert 50 < row["peak_rss_mib"] < 50_000
        assert row["source"] == "synthetic seed 0"
        assert row["folder"] == f"checkpoints/{MODEL}-{dtype.suffix}"


# -- bad input -----------------------------------------------------------------------------------------


def fault(folder: Path, tmp_path: Path) -> tuple[str, Path]:
    """Prepare from a damaged local folder: the reason, and the data folder, in which nothing may look finished."""
    run = model_run(tmp_path / "data", local=folder, source="local")
    outcome = run_prepare(run)
    assert (outcome.ok, outcome.failed) == (0, 2)
    table = prepare_rows(run)
    assert {row["status"] for row in table.values()} == {"failed"}
    assert {row["parameters"] for row in table.values()} == {-1}
    reasons = {row["reason"] for row in table.values()}
    assert len(reasons) == 1
    assert not list((tmp_path / "data").rglob("config.json"))
    assert not list((tmp_path / "data").rglob("*.partial"))
    return reasons.pop(), tmp_path / "data"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [UP, "model.layers.1.mlp.ffn_sub_norm.weight", "model.embed_tokens.weight"])
def test_values_that_are_no_numbers_name_the_tensor(name: str, value: float, tmp_path: Path) -> None:
    folder = as_downloaded(tmp_path / "theirs", tmp_path / "made")
    tensors = load_file(folder / "model.safetensors")
    tensors[name].view(-1)[5] = value
    save_file(tensors, folder / "model.safetensors")
    reason, _ = fault(folder, tmp_path)
    assert f"{name}: row 0, column 5 is NaN or infinite" in reason


def test_a_truncated_download_is_refused(tmp_path: Path) -> None:
    folder = as_downloaded(tmp_path / "theirs", tmp_path / "made")
    with (folder / "model.safetensors").open("r+b") as stream:
        stream.truncate(100_000)
    reason, _ = fault(folder, tmp_path)
    assert "truncated or damaged; fetch it again" in reason


def test_float16_weights_are_refused(tmp_path: Path) -> None:
    folder = as_downloaded(tmp_path / "theirs", tmp_path / "made")
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, folder / "model.safetensors")
    reason, _ = fault(folder, tmp_path)
    assert "is F16, expected BF16" in reason


def test_a_quantised_model_is_no_base(tmp_path: Path) -> None:
    made = model_run(tmp_path / "made")
    run_prepare(made)
    reason, _ = fault(made.plan.prepared_folder(MODEL, DType.INT8), tmp_path)
    assert "holds INT8 weights; a base model must be BF16" in reason


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "24m") as folder:
        yield folder


def test_a_disk_that_is_too_small_is_refused_before_starting(small_disk: Path, tmp_path: Path) -> None:
    run = model_run(small_disk, BITNET | {"hidden_size": 768, "intermediate_size": 4096})
    with pytest.raises(DiskError, match=r"the synthetic Tiny needs \d+ MiB, 24 MiB are free"):
        run_prepare(run)
    assert contents(small_disk) == {}


def test_a_disk_that_fills_up_on_the_way_leaves_nothing_half_written(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else took the space after the check."""
    monkeypatch.setattr(disk, "require", lambda *args: None)
    run = model_run(small_disk, BITNET | {"hidden_size": 768, "intermediate_size": 4096})
    with pytest.raises(DiskError, match=r"disk full \(\d+ MiB free\); free some space") as caught:
        run_prepare(run)
    assert "\n" not in str(caught.value)
    left = [path for path in small_disk.rglob("*") if path.is_file()]
    assert not [path for path in left if path.name == "config.json" or path.name.endswith(".partial")]
    for path in left:
        if path.suffix == ".safetensors":
            shard.Shard.open(path)  # whole


def test_a_read_only_disk_is_one_line(small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(
        DiskError, match="cannot write there \\(read-only or no permission\\); choose another folder"
    ) as caught:
        run_prepare(model_run(small_disk))
    assert "\n" not in str(caught.value)


def test_ctrl_c_leaves_whole_shards_that_the_next_run_uses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model_run(tmp_path / "whole")
    run_prepare(whole)
    run = model_run(tmp_path / "run")
    real = prepare._quantise_layer

    def interrupt(targets: Any, tensors: dict[str, torch.Tensor], *rest: Any) -> Any:
        if "model.layers.1.mlp.up_proj.weight" in tensors:
            signal.raise_signal(signal.SIGINT)  # of the process: its main thread is interrupted, as on a terminal
            time.sleep(0.2)
        return real(targets, tensors, *rest)

    monkeypatch.setattr(prepare, "_quantise_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_prepare(run)
    folder = run.plan.prepared_folder(MODEL, DType.INT8)
    assert not (folder / "config.json").exists()
    assert not list(folder.glob("*.partial"))
    monkeypatch.undo()
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.safetensors")}
    assert SHARDS[0] in before
    assert run_prepare(run).ok == 2
    assert {name: (folder / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path / "run/checkpoints") == contents(tmp_path / "whole/checkpoints")
