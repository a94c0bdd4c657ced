"""Task 2: pruned checkpoints that are proven lossless to lift, resumable at any moment, and honest about failure."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prepared_models import (
    SHARDS,
    contents,
    convert_rows,
    dequantised,
    model_run,
    mounted_disk,
    prepared,
    run_convert,
    run_prepare,
)
from small_models import BITNET, LLAMA, QWEN2, float_model
from small_runs import MODEL
from transformers import AutoModelForCausalLM
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING

from slidesparse import records
from slidesparse.checkpoint import convert, disk, lift, pipeline, proof, shard, source
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError, DiskError, VerificationError
from slidesparse.pattern import Sparsity
from slidesparse.rows import ConvertLayerRow
from slidesparse.run import Run

ALL = {"end_to_end": ["2:4", "2:6", "2:8", "2:10", "2:inf"], "kernel_high": [], "kernel_low": []}
SOME = {"end_to_end": ["2:4", "2:10"], "kernel_high": [], "kernel_low": []}


def ready(folder: Path, config: dict[str, Any] = BITNET, **changes: Any) -> Run:
    run = model_run(folder, config, **({"sparsity": SOME} | changes))
    assert run_prepare(run).failed == 0
    return run


def folder_of(run: Run, dtype: DType, pattern: str) -> Path:
    return run.plan.converted_folder(MODEL, dtype, Sparsity.parse(pattern))


def converted(run: Run, dtype: DType, pattern: str) -> Checkpoint:
    return Checkpoint.open(folder_of(run, dtype, pattern))


def codes_of(checkpoint: Checkpoint, linear: str) -> np.ndarray:
    return checkpoint.load(f"{linear}.weight").view(torch.int8).numpy()


def layer_rows(run: Run, dtype: DType, pattern: str) -> dict[str, dict[str, Any]]:
    path = run.tree.convert_layers(f"{MODEL}-{dtype.suffix}-SlideSparse-{Sparsity.parse(pattern).slug}")
    frame = records.latest(records.read(path), ConvertLayerRow.KEY)
    return {row["layer"]: row for row in frame.to_dict("records")}


@pytest.mark.parametrize("config", [BITNET, QWEN2])
def test_pruned_codes_keep_the_pattern_and_everything_else_is_untouched(config: dict[str, Any], tmp_path: Path) -> None:
    run = ready(tmp_path, config, sparsity=ALL)
    outcome = run_convert(run)
    assert (outcome.ok, outcome.failed) == (10, 0)
    for (dtype_name, pattern), row in convert_rows(run).items():
        dtype = DType(dtype_name)
        dense, sparse = prepared(run, dtype), converted(run, dtype, pattern)
        length = Sparsity.parse(pattern).l
        removed = 0
        for linear in dense.linears():
            before, after = codes_of(dense, linear), codes_of(sparse, linear)
            changed = before != after
            assert not after[changed].any()
            removed += int(changed.sum())
            for first in range(0, before.shape[1], length or before.shape[1]):
                group = after[:, first : first + (length or before.shape[1])]
                assert (group != 0).sum(axis=1).max() <= (length or 10**9) - 2
        for name in dense.names():
            if name.removesuffix(".weight") not in dense.linears():
                assert torch.equal(dense.load(name), sparse.load(name))
        assert (row["status"], row["verified"]) == ("ok", "exact")
        assert row["weights_removed"] == removed
        assert row["weights"] == sum(codes_of(dense, linear).size for linear in dense.linears())
        assert row["natural_zeros"] == sum(int((codes_of(dense, linear) == 0).sum()) for linear in dense.linears())
        assert row["removed_fraction"] == pytest.approx(removed / (row["weights"] - row["natural_zeros"]), abs=1e-7)


def test_two_to_infinity_is_the_prepared_model(tmp_path: Path) -> None:
    run = ready(tmp_path, sparsity={"end_to_end": ["2:inf"], "kernel_high": [], "kernel_low": []})
    run_convert(run)
    for dtype in QUANTISED:
        dense, sparse = prepared(run, dtype), converted(run, dtype, "2:inf")
        for name in dense.names():
            assert torch.equal(dense.load(name).view(torch.uint8), sparse.load(name).view(torch.uint8)), name
        assert sparse.section is not None
        assert str(sparse.section.pattern) == "2:inf"
        assert sparse.section.totals.weights_removed == 0


def test_magnitude_removes_less_energy_than_random(tmp_path: Path) -> None:
    lost = {}
    for method in ("magnitude", "random"):
        run = ready(tmp_path / method, LLAMA, convert={"method": method})
        run_convert(run)
        section = converted(run, DType.INT8, "2:4").section
        assert section is not None
        assert section.method == method
        lost[method] = convert_rows(run)["INT8", "2:4"]["energy_removed"]
    assert 0 < lost["magnitude"] < lost["random"] / 2
    assert lost["random"] == pytest.approx(0.5, abs=0.05)  # half of dense weights, chosen blindly


def test_layer_rows_add_up_and_state_the_energy_of_the_original_weights(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    base = source.obtain(run.plan, MODEL, quiet=True).checkpoint
    dense, sparse = prepared(run, DType.INT8), converted(run, DType.INT8, "2:4")
    rows = layer_rows(run, DType.INT8, "2:4")
    assert list(rows) == dense.linears()
    for linear, row in rows.items():
        weight = base.load(f"{linear}.weight").double().numpy()
        before, after = codes_of(dense, linear), codes_of(sparse, linear)
        gone = before != after
        assert row["energy_removed"] == pytest.approx(
            (weight[gone] ** 2).sum() / (weight[before != 0] ** 2).sum(), abs=1e-7
        )
        assert (row["n"], row["k"]) == before.shape
        assert row["lifted_k"] == Sparsity(4).lifted_k(before.shape[1])
        assert row["verified"] == "exact"
        assert "int32 product equal on 32 random tokens" in row["check"]
    total = convert_rows(run)["INT8", "2:4"]
    for name in ("weights_removed", "natural_zeros", "groups", "groups_unpruned"):
        assert total[name] == sum(row[name] for row in rows.values())


def test_bytes_read_add_up_over_the_rows(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    rows = convert_rows(run)
    base = source.obtain(run.plan, MODEL, quiet=True).checkpoint
    need = sum(base.load(f"{linear}.weight").nbytes for linear in base.linears())
    for dtype in QUANTISED:
        made = prepared(run, dtype)
        need += sum(made.load(name).nbytes for layer in made.layers() for name in layer)
    assert sum(row["bytes_read"] for row in rows.values()) == pytest.approx(need, abs=100)
    for (dtype, pattern), row in rows.items():
        made = converted(run, DType(dtype), pattern)
        assert row["bytes_written"] == sum(made.load(name).nbytes for layer in made.layers() for name in layer)


def test_plain_loads_in_stock_transformers_as_the_pruned_model(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    made = converted(run, DType.INT8, "2:4")
    model, report = AutoModelForCausalLM.from_pretrained(made.folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.arange(16)[None]
    reference = float_model(BITNET)
    reference.load_state_dict(dequantised(made), strict=False)
    with torch.no_grad():
        got, expected = model(tokens).logits, reference(tokens).logits
    assert (got - expected).norm() / expected.norm() < 0.1


@pytest.mark.parametrize("config", [BITNET, LLAMA])
def test_lifted_layout_holds_the_lifted_plain_weights_and_stock_engines_refuse_it(
    config: dict[str, Any], tmp_path: Path
) -> None:
    plain = ready(tmp_path / "plain", config)
    lifted = ready(tmp_path / "lifted", config, convert={"layout": "lifted"})
    run_convert(plain)
    assert run_convert(lifted).failed == 0
    for dtype in QUANTISED:
        for pattern in ("2:4", "2:10"):
            one, two = converted(plain, dtype, pattern), converted(lifted, dtype, pattern)
            assert two.dtype is dtype
            for linear in one.linears():
                expected = lift.lift_weight(codes_of(one, linear), Sparsity.parse(pattern), linear)
                np.testing.assert_array_equal(codes_of(two, linear), expected)
    # transformers only warns of a quant_method that it does not know; the shapes [N, K'] make it stop.
    assert two.config["quantization_config"]["quant_method"] not in AUTO_QUANTIZER_MAPPING
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(folder_of(lifted, DType.INT8, "2:10"))


def test_embeddings_are_shared_on_disk(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    one = run.plan.prepared_folder(MODEL, DType.INT8) / SHARDS[2]
    assert all(
        os.path.samefile(one, folder_of(run, dtype, p) / SHARDS[2]) for dtype in QUANTISED for p in ("2:4", "2:10")
    )


def test_a_second_run_does_nothing_and_changed_options_do_it_again(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    before = contents(tmp_path / "checkpoints_slidesparse")
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints_slidesparse").rglob("*")}
    outcome = run_convert(run)
    assert (outcome.ok, outcome.done_before, outcome.notes) == (4, 4, [])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints_slidesparse").rglob("*")} == stamps
    other = run_convert(model_run(tmp_path, sparsity=SOME, convert={"method": "random"}))
    assert (other.ok, other.done_before) == (4, 0)
    assert contents(tmp_path / "checkpoints_slidesparse") != before
    again = run_convert(run)
    assert (again.ok, again.done_before) == (4, 0)
    assert contents(tmp_path / "checkpoints_slidesparse") == before


def test_a_deleted_model_is_made_again_though_its_row_says_ok(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    before = contents(tmp_path / "checkpoints_slidesparse")
    shutil.rmtree(folder_of(run, DType.FP8, "2:10"))
    outcome = run_convert(run)
    assert (outcome.ok, outcome.done_before) == (4, 3)
    assert contents(tmp_path / "checkpoints_slidesparse") == before


# -- failure -------------------------------------------------------------------------------------------


def test_a_failed_proof_fails_its_variant_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lift that loses one weight of one layer in 2:10 must be found, named, and never become a checkpoint."""
    run = ready(tmp_path)
    bad = "model.layers.1.self_attn.o_proj"

    def lossy(codes: np.ndarray, sparsity: Sparsity, layer: str, first_row: int) -> np.ndarray:
        lifted = lift.lift_weight(codes, sparsity, layer)
        if layer == bad and sparsity.l == 10:
            row, column = np.argwhere(lifted)[0]
            lifted[row, column] = 0
        return lifted

    monkeypatch.setattr(proof, "lift_weight", lossy)
    outcome = run_convert(run)
    assert (outcome.ok, outcome.failed) == (2, 2)
    for dtype in QUANTISED:
        row = convert_rows(run)[dtype.value, "2:10"]
        assert (row["status"], row["verified"], row["weights_removed"]) == ("failed", "failed", -1)
        assert bad in row["reason"]
        with pytest.raises(CheckpointError):
            converted(run, dtype, "2:10")
        assert converted(run, dtype, "2:4").section is not None
    monkeypatch.undo()
    assert (run_convert(run).ok, convert_rows(run)["INT8", "2:10"]["status"]) == (4, "ok")


@pytest.mark.parametrize("damage", ["not 2:4", "lost", "wrong product"])
def test_the_proof_finds(damage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of its three steps on its own."""
    codes = np.ones((4, 16), dtype=np.int8)
    codes[:, ::8] = codes[:, 1::8] = 0

    def lifted(*args: Any) -> np.ndarray:
        made = lift.lift_weight(*args)
        if damage == "not 2:4":
            made[2, 0:3] = 1
        else:
            made[made != 0] = np.where(np.arange(made[made != 0].size) == 7, 0, 1)
        return made

    monkeypatch.setattr(proof, "lift_weight", lifted)
    if damage == "wrong product":
        monkeypatch.setattr(proof, "unlift_weight", lambda *args: codes)
    expected = {"not 2:4": "windows of the lifted weight", "lost": "does not give the weight back"}
    with pytest.raises(VerificationError, match=expected.get(damage, "lifted product .* differs in")) as caught:
        proof.LosslessProof(8).lift(codes, Sparsity(8), "model.layers.0.mlp.up_proj")
    assert "model.layers.0.mlp.up_proj" in str(caught.value)


def test_convert_without_prepare_says_so(tmp_path: Path) -> None:
    run = model_run(tmp_path, sparsity=SOME)
    outcome = run_convert(run)
    assert outcome.failed == 4
    assert "run `slidesparse prepare` first" in convert_rows(run)["INT8", "2:4"]["reason"]


def test_a_prepared_model_of_another_base_is_refused(tmp_path: Path) -> None:
    run = ready(tmp_path)
    ready(tmp_path / "other", seed=1)
    folder = run.plan.prepared_folder(MODEL, DType.INT8)
    shutil.rmtree(folder)
    shutil.copytree(tmp_path / "other" / folder.relative_to(tmp_path), folder)
    outcome = run_convert(run)
    assert (outcome.ok, outcome.failed) == (2, 2)
    assert "was not made from" in convert_rows(run)["INT8", "2:4"]["reason"]


def test_a_truncated_prepared_shard_is_refused_and_the_other_type_goes_on(tmp_path: Path) -> None:
    run = ready(tmp_path)
    path = run.plan.prepared_folder(MODEL, DType.INT8) / SHARDS[1]
    path.write_bytes(path.read_bytes()[:-10])
    outcome = run_convert(run)
    assert (outcome.ok, outcome.failed) == (2, 2)
    assert "truncated" in convert_rows(run)["INT8", "2:4"]["reason"]
    assert not folder_of(run, DType.INT8, "2:4").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted_disk(tmp_path / "disk", "1500k") as folder:
        yield folder


def test_a_full_disk_ends_the_run_in_one_line_and_the_next_run_resumes(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ready(tmp_path / "whole", sparsity=ALL)
    run_convert(whole)
    shutil.copytree(tmp_path / "whole/checkpoints", small_disk / "checkpoints")
    run = model_run(small_disk, sparsity=ALL)
    with pytest.raises(DiskError, match=r"converting Tiny to 10 checkpoints needs \d+ MiB"):
        run_convert(run)
    monkeypatch.setattr(disk, "require", lambda *args: None)  # somebody takes the space after the check
    monkeypatch.setattr(disk, "measure", lambda *args: disk.DiskSpeed(100, 100))
    with pytest.raises(DiskError, match="disk full") as caught:
        run_convert(run)
    assert "\n" not in str(caught.value)
    made = small_disk / "checkpoints_slidesparse"
    assert not list(made.rglob("*.partial"))
    assert not list(made.rglob("config.json"))
    for path in made.rglob("*.safetensors"):
        shard.Shard.open(path)
    assert 0 < len(list(made.rglob("*.safetensors"))) < 30
    subprocess.run(["mount", "-o", "remount,size=60m", str(small_disk)], check=True)
    assert run_convert(run).ok == 10
    assert contents(made) == contents(tmp_path / "whole/checkpoints_slidesparse")


def test_ctrl_c_ends_the_pass_and_the_next_run_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = ready(tmp_path)
    real = convert._prune_layer

    def interrupt(run: Run, variant: Any, layer: int, *rest: Any) -> None:
        if layer == 1:
            signal.raise_signal(signal.SIGINT)  # of the process: its main thread is interrupted, as on a terminal
            time.sleep(0.2)
        real(run, variant, layer, *rest)

    monkeypatch.setattr(convert, "_prune_layer", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_convert(run)
    folder = folder_of(run, DType.INT8, "2:4")
    assert not list((tmp_path / "checkpoints_slidesparse").rglob("*.partial"))
    assert not (folder / "config.json").exists()
    monkeypatch.undo()
    assert run_convert(run).ok == 4
    assert converted(run, DType.INT8, "2:4").section is not None


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from prepared_models import model_run, run_convert
from slidesparse.checkpoint import draft, shard
real, count = shard.write_shard, 0
def write(*args):
    global count
    count += 1
    if count == {at}:
        sys.stdout.write("here"); sys.stdout.flush()
        target = args[0]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.with_name(target.name + ".partial").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
draft.write_shard = write
run_convert(model_run(Path({folder!r}), sparsity={sparsity!r}))
"""


@pytest.mark.parametrize("at", [1, 4, 8])
def test_killed_in_the_middle_then_resumed_gives_the_same_bytes(at: int, tmp_path: Path) -> None:
    """kill -9 while the shard number `at` of 8 is half on disk."""
    whole = ready(tmp_path / "whole")
    run_convert(whole)
    run = ready(tmp_path / "killed")
    text = KILLED.format(tests=str(Path(__file__).parent), at=at, folder=str(tmp_path / "killed"), sparsity=SOME)
    done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr
    made = tmp_path / "killed/checkpoints_slidesparse"
    assert not list(made.rglob("config.json"))
    assert convert_rows(run) == {} if not run.tree.convert.exists() else True
    kept = {path: path.stat().st_mtime_ns for path in made.rglob("*.safetensors")}
    assert len(kept) < 8
    outcome = run_convert(run)
    assert (outcome.ok, outcome.failed) == (4, 0)
    assert {path: path.stat().st_mtime_ns for path in kept} == kept, "finished shards are not written again"
    assert contents(made) == contents(tmp_path / "whole/checkpoints_slidesparse")
    columns = ("weights_removed", "natural_zeros", "energy_removed", "groups_unpruned")
    for key, row in convert_rows(whole).items():
        assert all(convert_rows(run)[key][name] == row[name] for name in columns)


def test_killed_after_the_files_but_before_the_record_is_recorded_without_work(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    rows = convert_rows(run)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "checkpoints_slidesparse").rglob("*.safetensors")}
    run.tree.convert.unlink()
    assert run_convert(run).done_before == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for key, row in convert_rows(run).items():
        assert row["weights_removed"] == rows[key]["weights_removed"]


# -- the overlap of disk and compute -------------------------------------------------------------------


def test_the_first_error_of_a_writer_is_raised_and_the_rest_dropped() -> None:
    ran = []

    def job(index: int) -> None:
        if index == 3:
            raise DiskError("full")
        time.sleep(0.002)
        ran.append(index)

    def go() -> None:
        with pipeline.write_behind() as writer:
            for index in range(200):
                writer.put(1, lambda index=index: job(index))

    with pytest.raises(DiskError, match="full"):
        go()
    assert len(ran) < 200


def test_writers_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "WRITE_BYTES", 100)
    held, most = [0], [0]

    def job() -> None:
        time.sleep(0.001)
        held[0] -= 40

    with pipeline.write_behind() as writer:
        for _ in range(50):
            writer.put(40, job)
            held[0] += 40
            most[0] = max(most[0], held[0])
    assert most[0] <= 120


def test_read_ahead_keeps_order_and_raises_where_the_error_belongs() -> None:
    def load(item: int) -> int:
        if item == 3:
            raise CheckpointError("item 3")
        return item * 10

    seen = []

    def go() -> None:
        for item, loaded in pipeline.read_ahead(range(5), load):
            seen.append((item, loaded))

    with pytest.raises(CheckpointError, match="item 3"):
        go()
    assert seen == [(0, 0), (1, 10), (2, 20)]


def test_the_disk_probe_leaves_nothing_behind(tmp_path: Path) -> None:
    speed = disk.measure(tmp_path / "new", 1)
    assert speed.read_mib_s > 0
    assert speed.write_mib_s > 0
    assert list((tmp_path / "new").iterdir()) == []
    assert disk.DiskSpeed(100, 50).floor_s(200 * 2**20, 100 * 2**20) == pytest.approx(4)


def test_the_section_names_what_was_done(tmp_path: Path) -> None:
    run = ready(tmp_path)
    run_convert(run)
    config = json.loads((folder_of(run, DType.FP8, "2:10") / "config.json").read_text())
    section = config["slidesparse"]
    row = convert_rows(run)["FP8E4M3", "2:10"]
    assert (section["pattern"], section["layout"], section["method"]) == ("2:10", "plain", "magnitude")
    assert (section["model"], section["source"], section["version"]) == (MODEL, "synthetic seed 0", 1)
    assert section["totals"]["weights_removed"] == row["weights_removed"] > 0
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
