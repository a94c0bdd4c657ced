"""Shards and checkpoints: what we write, safetensors reads, and the other way round; what is broken is named."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_models import BITNET, LLAMA, QWEN2
from transformers import AutoConfig, AutoModelForCausalLM

from slidesparse.checkpoint import direct, families
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.checkpoint.draft import Draft
from slidesparse.checkpoint.shard import Shard, finished, write_shard
from slidesparse.checkpoint.synthetic import write_model
from slidesparse.errors import CheckpointError

TENSORS = {
    "a": torch.arange(6, dtype=torch.int8).view(2, 3),
    "b": torch.randn(4, 5).bfloat16(),
    "c": torch.randn(3, 1),
    "d": torch.randn(2, 2).to(torch.float8_e4m3fn),
    "empty": torch.zeros(0, 4),
}


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Equal types, shapes and bytes."""
    raw = [tensor.contiguous().view(-1).view(torch.uint8).tolist() for tensor in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and raw[0] == raw[1]


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    size = write_shard(path, TENSORS, {"recipe": "r", "note": [1, 2]})
    assert path.stat().st_size == size
    loaded = load_file(path)
    assert set(loaded) == set(TENSORS)
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "pt"
    assert finished(path, "r")["note"] == [1, 2]  # type: ignore[index]
    assert finished(path, "other") is None


def test_we_read_what_safetensors_writes(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file(TENSORS, path)
    shard = Shard.open(path)
    assert all(same(shard.load(name), tensor) for name, tensor in TENSORS.items())
    assert shard.own is None


def test_equal_content_gives_equal_bytes_and_a_changed_bit_another_header(tmp_path: Path) -> None:
    one, two = tmp_path / "1", tmp_path / "2"
    write_shard(one, TENSORS, {"recipe": "r"})
    write_shard(two, dict(reversed(TENSORS.items())), {"recipe": "r"})
    assert one.read_bytes() == two.read_bytes()
    before = Shard.open(one).digest()
    changed = TENSORS | {"a": TENSORS["a"] + 1}
    write_shard(two, changed, {"recipe": "r"})
    assert Shard.open(two).digest() != before


def make(folder: Path, config: dict[str, Any], seed: int) -> None:
    write_model(Draft(folder, config["num_hidden_layers"], "recipe"), config, seed, "test", quiet=True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    make(folder, BITNET, 0)
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.mark.parametrize(
    "config", [BITNET, LLAMA, QWEN2, LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 16}]
)
def test_families_hold_the_parameters_of_transformers(config: dict[str, Any]) -> None:
    keys = {key: value for key, value in config.items() if key != "model_type"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config["model_type"]), **keys))
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    ours = families.rest_tensors(config)
    for layer in range(2):
        ours |= families.layer_tensors(config, layer)
    assert ours == expected
    linears = {name for name, module in model.model.named_modules() if isinstance(module, torch.nn.Linear)}
    assert set(families.linear_names(config)) == {f"model.{name}" for name in linears}
    assert families.family(config, "x").architecture == type(model).__name__


@pytest.mark.parametrize("config", [BITNET, LLAMA, QWEN2])
def test_transformers_loads_the_synthetic_model(config: dict[str, Any], tmp_path: Path) -> None:
    make(tmp_path, config, 7)
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    state = model.state_dict()
    checkpoint = Checkpoint.open(tmp_path)
    assert all(same(state[name], checkpoint.load(name)) for name in checkpoint.names())
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert torch.isfinite(logits).all()
    assert 0.1 < float(logits.float().std()) < 20  # alive, not blown up


def test_synthetic_bytes_depend_on_seed_and_name_alone(whole: Path, tmp_path: Path) -> None:
    make(tmp_path / "again", BITNET, 0)
    make(tmp_path / "other", BITNET, 1)
    for path in whole.glob("*.safetensors"):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()
    name = "model.layers.1.mlp.up_proj.weight"
    one, other = Checkpoint.open(whole).load(name).float(), Checkpoint.open(tmp_path / "other").load(name).float()
    assert (one != other).float().mean() > 0.9
    assert float(one.std()) == pytest.approx(96**-0.5, rel=0.05)
    assert abs(float(one.mean())) < 0.01


def test_fingerprint_is_of_the_content_not_of_the_place(whole: Path, folder: Path) -> None:
    before = Checkpoint.open(whole).fingerprint()
    assert Checkpoint.open(folder).fingerprint() == before
    shard = Shard.open(folder / "model-00001-of-00003.safetensors")
    tensors = {name: shard.load(name) for name in shard.tensors}
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1
    write_shard(shard.path, tensors, {"recipe": "recipe"})
    assert Checkpoint.open(folder).fingerprint() != before


def test_fingerprint_of_a_foreign_checkpoint_sees_its_weights(whole: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(whole)
    tensors = {name: checkpoint.load(name) for name in checkpoint.names()}
    prints = []
    for step in range(2):
        path = tmp_path / str(step)
        path.mkdir()
        save_file({name: tensor + step for name, tensor in tensors.items()}, path / "model.safetensors")
        shutil.copy(whole / "config.json", path)
        prints.append(Checkpoint.open(path).fingerprint())
    assert prints[0] != prints[1]


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def rewrite(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    shard = Shard.open(folder / "model-00001-of-00003.safetensors")
    tensors = {key: shard.load(key) for key in shard.tensors}
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    save_file(tensors, shard.path)


def truncate(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    with path.open("r+b") as stream:
        stream.truncate(path.stat().st_size - 1000)


def cut_to(folder: Path, size: int) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"\0" * size)


UP = "model.layers.0.mlp.up_proj.weight"
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.json").unlink(), r"config\.json: not there"),
    "config is no JSON": (lambda f: (f / "config.json").write_text("{"), r"config\.json: not JSON"),
    "unknown model type": (
        lambda f: edit_config(f, model_type="mamba"), "unknown model_type 'mamba'; supported: bitnet, llama, qwen2",
    ),
    "missing size": (lambda f: edit_config(f, intermediate_size=None), "key 'intermediate_size' is missing"),
    "missing shard": (
        lambda f: (f / "model-00002-of-00003.safetensors").unlink(),
        r"model-00002-of-00003\.safetensors: this shard is missing",
    ),
    "truncated shard": (truncate, r"model-00002-of-00003\.safetensors: \d+ bytes, its header says \d+: truncated"),
    "empty shard": (lambda f: cut_to(f, 0), "truncated or not a safetensors"),
    "shard of zeros": (lambda f: cut_to(f, 100), "damaged safetensors header"),
    "damaged index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), "no weight_map"),
    "no weights": (lambda f: (f / "model.safetensors.index.json").unlink(), "only safetensors checkpoints"),
    "missing tensor": (lambda f: rewrite(f, UP, None), rf"tensor {UP} is missing"),
    "wrong type": (lambda f: rewrite(f, UP, torch.zeros(176, 96)), rf"{UP} is F32, expected BF16"),
    "wrong shape": (
        lambda f: rewrite(f, UP, torch.zeros(96, 176).bfloat16()), rf"{UP} has shape \[96, 176\], config.json says",
    ),
    "other quantisation": (
        lambda f: edit_config(f, quantization_config={"quant_method": "gptq"}), "unsupported quantisation 'gptq'",
    ),
    "section of another version": (
        lambda f: edit_config(f, slidesparse={"version": 2}), r"config\.json: slidesparse\.version",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_refused_in_one_line(fault: str, folder: Path) -> None:
    damage, expected = FAULTS[fault]
    damage(folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        Checkpoint.open(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_a_tensor_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(CheckpointError, match="no tensor nonsense"):
        Checkpoint.open(folder).load("nonsense")


@given(st.lists(st.integers(0, 9000), max_size=5), st.booleans())
@settings(max_examples=40)
def test_files_written_past_the_page_cache_hold_the_parts(sizes: list[int], plain: bool) -> None:
    parts = [np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8) for index, size in enumerate(sizes)]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "CHUNK", 8192)
        if plain:  # a file system without direct I/O
            patch.setattr(direct, "_write_direct", lambda *args: (_ for _ in ()).throw(OSError(errno.EINVAL, "no")))
        assert direct.write_file(Path(folder, "x"), parts) == sum(sizes)
        assert Path(folder, "x").read_bytes() == b"".join(part.tobytes() for part in parts)
