"""Tasks 6 to 8: rows that published readers understand, checked before timed, and failures that give no numbers."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_models import BITNET, FakeCheckpoint, checkpoint
from small_runs import MODEL, small_run, task

from slidesparse import records
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.kernels import cpu_dense, cpu_sparse, operands
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.measure import kernel_bench
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.run import Run

PUBLISHED_SPARSE = (
    "M,N,K,alg_count,tops_1,lat_us_1,alg_id_1,split_k_1,workspace_1,tops_2,lat_us_2,alg_id_2,split_k_2,workspace_2,"
    "tops_3,lat_us_3,alg_id_3,split_k_3,workspace_3"
)
SPARSE = Variant("cpu_sparse", Sparsity(8))
DENSE = Variant("cpu_dense")


@pytest.fixture
def model_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Dense and 2:8 checkpoints at the plan's places."""
    run = small_run(tmp_path)
    held: dict[Path, FakeCheckpoint] = {}
    for dtype in QUANTISED:
        for variant in (DENSE, SPARSE):
            folder = run.plan.checkpoint_folder(MODEL, dtype, variant)
            folder.mkdir(parents=True)
            held[folder] = checkpoint(
                BITNET, dtype, variant.sparsity, layout="lifted" if dtype is DType.FP8 else "plain"
            )
    monkeypatch.setattr(Checkpoint, "open", lambda folder: held[folder])
    return tmp_path


def table(run: Run, variant: Variant, dtype: DType = DType.INT8) -> pd.DataFrame:
    return records.read(run.tree.kernel(MODEL, dtype, variant))


def wrong(side: type, algorithm: str) -> Callable[..., torch.Tensor]:
    """A GEMM whose one algorithm is off by one in one element."""
    genuine = side.gemm  # type: ignore[attr-defined]

    def gemm(self, x, weight: Weight, chosen: Algorithm, out: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        genuine(self, x, weight, chosen, out)
        if chosen.name == algorithm:
            out[1, 2] += 1
        return out

    return gemm


def test_points_of_all_three_tasks(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    for name in ("kernel_dense", "kernel_high", "kernel_low"):
        outcome = kernel_bench.run_task(run, task(run, name))
        assert (outcome.ok, outcome.failed, outcome.skipped) == (8, 0, 0)
    for dtype in QUANTISED:
        for variant in (DENSE, SPARSE, Variant("cpu_sparse", Sparsity(None))):
            frame = table(run, variant, dtype)
            assert frame["layer"].tolist() == ["qkv", "o", "gate_up", "down"]
            assert set(frame["verified"]) == {"exact" if dtype is DType.INT8 else "within_bound"}
            assert set(frame["data"]) == {"random"}
            assert frame["emulation"].all()
            assert (frame["lat_us_1"] > 0).all()
            assert (frame["ci_low"] <= frame["lat_us_1"]).all()
            assert (frame["lat_us_1"] <= frame["ci_high"]).all()
            tops = 2 * frame["M"] * frame["N"] * frame["K"] / frame["lat_us_1"] / 1e6
            assert frame["tops_1"].tolist() == pytest.approx(tops.tolist())


def test_sparse_rows_hold_lifted_k_and_the_interleaved_dense_twin(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    kernel_bench.run_task(run, task(run, "kernel_high"))
    frame = table(run, SPARSE)
    assert frame["K_model"].tolist() == [96, 96, 96, 176]
    assert frame["K"].tolist() == [Sparsity(8).lifted_k(k) for k in frame["K_model"]]
    assert (frame["dense_us"] > 0).all()
    assert frame["dense_path"].str.startswith("cpu_dense").all()
    assert (frame["speedup_low"] <= frame["speedup"]).all()
    assert (frame["speedup"] <= frame["speedup_high"]).all()
    assert set(frame["speedup_bound"].round(4)) == {1.3333}


def test_published_readers_find_their_columns_and_header(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    kernel_bench.run_task(run, task(run, "kernel_high"))
    kernel_bench.run_task(run, task(run, "kernel_dense"))
    path = run.tree.kernel(MODEL, DType.INT8, SPARSE)
    assert path.relative_to(run.tree.root).as_posix() == (
        f"benchmark_kernel/cpu_sparse/alg_search_results/{run.tree.tag}/INT8/alg_search_Tiny-INT8_2_8.csv"
    )
    lines = path.read_text().splitlines()
    head = [line for line in lines if line.startswith("#")]
    keys = [line.removeprefix("# ").partition(":")[0].partition("=")[0] for line in head]
    published = ["GPU", "CC", "Mode", "Model", "Backend", "dtype", "alg_count", "torch", "CUDA runtime", "warmup"]
    assert keys[: len(published)] == published
    assert [key for key in keys if key in ("M_list", "NK_list", "Sparsity", "Time")] == [
        "M_list",
        "NK_list",
        "Sparsity",
        "Time",
    ]
    assert "# Sparsity: 2_8 (K_factor=1.500)" in head
    assert lines[len(head)].startswith(PUBLISHED_SPARSE + ",")
    dense = run.tree.kernel(MODEL, DType.INT8, DENSE).read_text().splitlines()
    columns = next(line for line in dense if line.startswith("M,"))
    assert columns.startswith(
        PUBLISHED_SPARSE.replace("split_k_1,", "").replace("split_k_2,", "").replace("split_k_3,", "")
    )
    assert len(pd.read_csv(io.StringIO("\n".join(lines)), comment="#")) == 4


def test_the_models_own_weights_are_used_where_they_exist(model_on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operands, "random_weight", lambda *a: pytest.fail("random weights in place of the model's"))
    run = small_run(model_on_disk)
    for name, variant in (("kernel_dense", DENSE), ("kernel_high", SPARSE)):
        assert kernel_bench.run_task(run, task(run, name)).failed == 0
        for dtype in QUANTISED:
            assert set(table(run, variant, dtype)["data"]) == {"model"}


def test_merged_layers_are_concatenated_along_n(model_on_disk: Path) -> None:
    run = small_run(model_on_disk)
    for dtype in QUANTISED:
        folder = run.plan.converted_folder(MODEL, dtype, Sparsity(8))
        merged = operands.model_weight(folder, "qkv", (160, 96), Sparsity(8))
        plain = checkpoint(BITNET, dtype, Sparsity(8))
        parts = [plain.load(f"model.layers.0.self_attn.{name}_proj.weight").float() for name in "qkv"]
        assert torch.equal(merged.float(), torch.cat(parts)), "also from the lifted layout"


@pytest.mark.parametrize(
    ("side", "algorithm", "name", "variant"),
    [
        (cpu_dense.CpuDense, "float64", "kernel_dense", DENSE),
        (cpu_sparse.CpuSparse, "dot", "kernel_high", SPARSE),
        (cpu_dense.CpuDense, "int_mm", "kernel_high", SPARSE),
    ],
)
def test_a_wrong_algorithm_fails_the_row_and_leaves_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: type, algorithm: str, name: str, variant: Variant
) -> None:
    """Also when it is the dense twin that is wrong: a ratio to a wrong product means nothing."""
    monkeypatch.setattr(side, "gemm", wrong(side, algorithm))
    run = small_run(tmp_path, dtypes=["INT8"])
    outcome = kernel_bench.run_task(run, task(run, name))
    assert (outcome.ok, outcome.failed, outcome.status) == (0, 4, "failed")
    frame = table(run, variant)
    assert set(frame["status"]) == {"failed"}
    assert set(frame["verified"]) == {"failed"}
    assert frame["reason"].str.contains(f"{algorithm}: check failed.*1 of", regex=True).all()
    for column in ("lat_us_1", "tops_1", "lat_us_2", "ci_low", *(["speedup", "dense_us"] if variant.sparsity else [])):
        assert (frame[column] == -1).all(), column


def test_an_algorithm_that_writes_nothing_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_dense.CpuDense, "gemm", lambda self, x, weight, algorithm, out: out)
    run = small_run(tmp_path)
    assert kernel_bench.run_task(run, task(run, "kernel_dense")).failed == 8


def test_an_exception_in_one_point_does_not_end_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = cpu_dense.CpuDense.gemm

    def gemm(self, x, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        if weight.k == 176:
            raise MemoryError("too large")
        return genuine(self, x, weight, algorithm, out)

    monkeypatch.setattr(cpu_dense.CpuDense, "gemm", gemm)
    run = small_run(tmp_path, dtypes=["INT8"])
    outcome = kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert (outcome.ok, outcome.failed) == (3, 1)
    last = table(run, DENSE).iloc[-1]
    assert (last["status"], last["reason"], last["verified"]) == ("failed", "MemoryError: too large", "not_checked")
    monkeypatch.undo()
    again = kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert (again.ok, again.failed, again.done_before) == (4, 0, 3), "only the failed point is measured again"
    assert len(table(run, DENSE)) == 5


def test_an_interrupted_run_keeps_its_points_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, calls = kernel_bench.rank, []

    def rank(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_bench, "rank", rank)
    run = small_run(tmp_path, dtypes=["INT8"])
    with pytest.raises(KeyboardInterrupt):
        kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert table(run, DENSE)["status"].tolist() == ["ok", "ok"]
    outcome = kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert (outcome.ok, outcome.done_before) == (4, 2)


def test_a_second_run_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = small_run(tmp_path)
    kernel_bench.run_task(run, task(run, "kernel_high"))
    monkeypatch.setattr(kernel_bench, "rank", lambda *a: pytest.fail("measured again"))
    outcome = kernel_bench.run_task(run, task(run, "kernel_high"))
    assert outcome.done_before == outcome.ok == 8


def test_a_broken_checkpoint_fails_its_points_only(model_on_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = Checkpoint.open
    run = small_run(model_on_disk)
    bad = run.plan.prepared_folder(MODEL, DType.INT8)

    def opens(folder: Path) -> FakeCheckpoint:
        if folder == bad:
            raise records.RecordError(f"{folder}: truncated")
        return genuine(folder)  # type: ignore[return-value]

    monkeypatch.setattr(Checkpoint, "open", opens)
    outcome = kernel_bench.run_task(run, task(run, "kernel_dense"))
    assert (outcome.ok, outcome.failed) == (4, 4)
    assert table(run, DENSE)["reason"].str.endswith("truncated").all()


def test_missing_hardware_is_skipped_with_a_reason_and_recorded_once(tmp_path: Path) -> None:
    run = small_run(tmp_path, backends={"dense": ["cublaslt"], "sparse": ["cusparselt"]})
    for _ in range(2):
        outcome = kernel_bench.run_task(run, task(run, "kernel_high"))
        assert (outcome.skipped, outcome.failed, outcome.status) == (8, 0, "skipped")
    frame = table(run, Variant("cusparselt", Sparsity(8)))
    assert len(frame) == 4
    assert set(frame["status"]) == {"skipped"}
    assert frame["reason"].str.contains("needs an NVIDIA GPU").all()
    assert (frame["lat_us_1"] == -1).all()
