"""The store's look-ups, and the search: it picks the fastest valid candidate and tells about the others."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from small_runs import MODEL, small_run, task

from slidesparse import records
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import RecordError
from slidesparse.kernels import cpu_activations, cpu_dense, cpu_sparse
from slidesparse.kernels.backend import Algorithm, Weight
from slidesparse.measure import book
from slidesparse.pattern import Sparsity
from slidesparse.rows import TuneRow
from slidesparse.run import Run
from slidesparse.tuning import search
from slidesparse.tuning import store as store_module
from slidesparse.tuning.store import TuningStore, Winner

HERE = {"torch": "2.0"}
ANY = {"axpy", "dot"}


def winner(m: int, n: int = 64, k: int = 32, algorithm: str = "axpy", versions: dict[str, str] | None = None) -> Winner:
    return Winner("sparse_gemm", "cpu_sparse", "INT8", "2:8", m, n, k, algorithm, 0, 1.0, versions or HERE, "r", "t")


def find(store: TuningStore, m: int, n: int = 64, k: int = 32, candidates: set[str] = ANY) -> str | None:
    return store.find("sparse_gemm", "cpu_sparse", DType.INT8, Sparsity(8), (m, n, k), candidates)


# -- store ---------------------------------------------------------------------------------------------


def test_exact_nearest_missed(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "w.json", [winner(16, algorithm="axpy"), winner(256, algorithm="dot")], HERE)
    assert find(store, 16) == "axpy"
    assert find(store, 40) == "axpy", "factor 2.5 is nearer than 6.4"
    assert find(store, 100) == "dot"
    assert find(store, 16, k=48) is None
    assert store.find("dense_gemm", "cpu_dense", DType.INT8, None, (16, 64, 32), ANY) is None
    assert store.find("sparse_gemm", "cpu_sparse", DType.FP8, Sparsity(8), (16, 64, 32), ANY) is None
    assert store.summary() == "hits 1, nearest 2, missed 3, stale 0"
    store.reset()
    assert store.summary() == "hits 0, nearest 0, missed 0, stale 0"


def test_a_winner_of_other_kernels_of_ours_is_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An edited kernel keeps the names of its launches; what was measured with the old one says nothing of it."""
    run = small_run(tmp_path, dtypes=["INT8"])
    search.run_task(run, task(run, "tune"))

    def known(operation: str, family: str, candidates: set[str]) -> str | None:
        store = TuningStore.open(run.tree.tuning_store)
        return store.find(operation, family, DType.INT8, Sparsity(8), (2, 0, 96), candidates)  # type: ignore[arg-type]

    assert known("quantise_lift", "cpu", {"fused", "torch"})
    monkeypatch.setattr(store_module, "own_revision", lambda family: "edited" if family == "cpu" else "")
    assert known("quantise_lift", "cpu", {"fused", "torch"}) is None
    again = search.run_task(run, task(run, "tune"))
    gemms = sum(cell.operation.endswith("gemm") for cell in task(run, "tune").cells)
    assert again.done_before == gemms, "GEMMs are not tuned again, everything else is"


def test_other_library_versions_are_stale_and_not_used(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "w.json", [winner(16, versions={"torch": "1.9"})], HERE)
    assert find(store, 16) is None
    assert store.summary() == "hits 0, nearest 0, missed 0, stale 1"
    store.put(winner(64, algorithm="dot"))
    assert find(store, 16) == "dot", "a fresh entry further away counts, not the stale exact one"
    assert store.summary() == "hits 0, nearest 1, missed 0, stale 1"


def test_an_algorithm_that_no_longer_exists_is_stale(tmp_path: Path) -> None:
    store = TuningStore(tmp_path / "w.json", [winner(16, algorithm="gone")], HERE)
    assert find(store, 16) is None
    assert store.counts == {"stale": 1}


def test_nearest_n_serves_layers_that_were_tuned_merged(tmp_path: Path) -> None:
    store = TuningStore(
        tmp_path / "w.json", [winner(16, n=100, algorithm="axpy"), winner(16, n=900, algorithm="dot")], HERE
    )
    assert find(store, 16, n=30) == "axpy"
    assert find(store, 16, n=500) == "dot"
    assert store.counts == {"nearest": 2}


def test_saved_and_read_back(tmp_path: Path) -> None:
    path = tmp_path / "tuning" / "winners.json"
    store = TuningStore(path, [winner(16)], HERE)
    store.put(winner(16, algorithm="dot"))
    store.save()
    again = TuningStore.open(path, HERE)
    assert len(again) == 1
    assert find(again, 16) == "dot"
    assert again.holds(winner(16).key)
    assert not TuningStore.open(path, {"torch": "3"}).holds(winner(16).key)


@pytest.mark.parametrize("text", ['{"format": 99, "winners": []}', "[1]", '{"format": 1, "winners": [{"m": 1}]}'])
def test_a_file_that_is_no_store_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "winners.json"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"winners\.json: not a tuning store"):
        TuningStore.open(path)


def test_digest_changes_with_a_winner_but_not_with_its_time(tmp_path: Path) -> None:
    from dataclasses import replace

    def digest(entry: Winner) -> str:
        return TuningStore(tmp_path / "w", [entry], HERE).digest(("cpu_sparse", "cpu"), DType.INT8)

    assert digest(winner(16)) == digest(replace(winner(16), lat_us=2.0, run_id="later"))
    assert digest(winner(16)) != digest(winner(16, algorithm="dot"))
    assert digest(replace(winner(16), dtype="FP8E4M3")) == TuningStore(tmp_path / "w").digest(
        ("cpu_sparse",), DType.INT8
    )


# -- search --------------------------------------------------------------------------------------------


def table(run: Run, dtype: DType = DType.INT8) -> pd.DataFrame:
    return records.read(run.tree.tune(MODEL, dtype))


def test_every_cell_gets_candidates_checked_timed_and_one_winner(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    cells = task(run, "tune").cells
    outcome = search.run_task(run, task(run, "tune"))
    assert (outcome.ok, outcome.failed, outcome.skipped, outcome.done_before) == (len(cells), 0, 0, 0)
    for dtype in QUANTISED:
        frame = table(run, dtype)
        assert set(frame["status"]) == {"ok"}
        assert set(frame["verified"]) <= {"exact", "within_bound"}
        assert (frame["lat_us"] > 0).all()
        assert frame["emulation"].all()
        key = ["operation", "backend", "sparsity", "M", "N", "K"]
        groups = frame.groupby(key)
        assert (groups["algorithm"].nunique() >= 2).all(), "something to choose from"
        assert (groups["winner"].sum() == 1).all()
        best = frame[frame["winner"]].set_index(key)["lat_us"].sort_index()
        assert (best == groups["lat_us"].min().sort_index()).all()
        lifted = frame[frame["operation"] == "sparse_gemm"]["K"]
        assert set(lifted) == {Sparsity(8).lifted_k(96), Sparsity(8).lifted_k(176)}
    assert len(TuningStore.open(run.tree.tuning_store)) == len(cells)


def test_a_second_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = small_run(tmp_path)
    search.run_task(first, task(first, "tune"))
    before = first.tree.tune(MODEL, DType.INT8).read_bytes()
    monkeypatch.setattr(search, "measure_together", lambda *arguments: pytest.fail("measured again"))
    second = small_run(tmp_path, "run2")
    outcome = search.run_task(second, task(second, "tune"))
    assert outcome.done_before == outcome.ok == len(task(second, "tune").cells)
    assert first.tree.tune(MODEL, DType.INT8).read_bytes() == before


def test_a_lost_store_or_other_conditions_are_measured_again(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    search.run_task(run, task(run, "tune"))
    run.tree.tuning_store.unlink()
    assert search.run_task(run, task(run, "tune")).done_before == 0
    assert search.run_task(run, task(run, "tune")).done_before > 0
    reseeded = small_run(tmp_path, seed=5)
    assert search.run_task(reseeded, task(reseeded, "tune")).done_before == 0


@pytest.mark.parametrize("flush_s", [0.0, 60.0], ids=["cell by cell", "at the end"])
def test_winners_are_on_disk_before_the_rows_that_speak_of_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flush_s: float
) -> None:
    """Killed in between, a run measures some cells again; the other way round it would miss their winners for good."""
    run = small_run(tmp_path, dtypes=["INT8"])
    genuine = records.append

    def append(path: Path, rows: list[TuneRow], header: object = ()) -> None:
        stored = json.loads(run.tree.tuning_store.read_text())["winners"]
        assert len(stored) >= sum(row.winner for row in rows) > 0
        genuine(path, rows)

    monkeypatch.setattr(records, "append", append)
    monkeypatch.setattr(book, "FLUSH_S", flush_s)
    assert search.run_task(run, task(run, "tune")).failed == 0


def test_a_fast_wrong_candidate_cannot_win(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, so it is by far the fastest; the poisoned output gives it away."""
    genuine = cpu_dense.CpuDense.gemm

    def gemm(self, x, weight: Weight, algorithm: Algorithm, out: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def]
        return out if algorithm.name == "int_mm" else genuine(self, x, weight, algorithm, out)

    monkeypatch.setattr(cpu_dense.CpuDense, "gemm", gemm)
    run = small_run(tmp_path, dtypes=["INT8"])
    outcome = search.run_task(run, task(run, "tune"))
    assert outcome.failed == 0
    assert any("4 candidates failed" in note for note in outcome.notes)
    frame = table(run)
    bad = frame[frame["algorithm"] == "int_mm"]
    assert len(bad) == 4
    assert set(bad["status"]) == {"failed"}
    assert set(bad["verified"]) == {"failed"}
    assert (bad["lat_us"] == -1).all()
    assert bad["reason"].str.startswith("check failed").all()
    assert not bad["winner"].any()
    winners = json.loads(run.tree.tuning_store.read_text())["winners"]
    assert "int_mm" not in {entry["algorithm"] for entry in winners}


def test_activation_kernels_that_write_nothing_are_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They allocate their outputs: torch may hand them what an equal kernel left there. So checks poison memory."""
    kernels = cpu_activations.CpuActivations
    quantise, dequantise = kernels.quantise, kernels.dequantise_bias

    def idle_at(algorithm: Algorithm) -> bool:
        return algorithm.name == "torch" and bool(torch.empty(4).isnan().all())

    def no_codes(self, x, *rest):  # type: ignore[no-untyped-def]
        right = quantise(self, x, *rest)
        return tuple(map(torch.empty_like, right)) if idle_at(rest[-1]) else right

    def no_output(self, acc, *rest):  # type: ignore[no-untyped-def]
        right = dequantise(self, acc, *rest)
        return torch.empty_like(right) if idle_at(rest[-1]) else right

    monkeypatch.setattr(kernels, "quantise", no_codes)
    monkeypatch.setattr(kernels, "dequantise_bias", no_output)
    run = small_run(tmp_path, dtypes=["INT8"])
    assert search.run_task(run, task(run, "tune")).failed == 0
    frame = table(run)
    idle = frame[(frame["algorithm"] == "torch") & ~frame["operation"].str.endswith("gemm")]
    assert len(idle) > 0
    assert set(idle["verified"]) == {"failed"}


def test_an_exception_fails_its_candidates_and_the_rest_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: object, *arguments: object) -> None:
        raise RuntimeError("no luck\ntoday")

    monkeypatch.setattr(cpu_sparse.CpuSparse, "gemm", broken)
    run = small_run(tmp_path, dtypes=["INT8"])
    cells = task(run, "tune").cells
    outcome = search.run_task(run, task(run, "tune"))
    assert (outcome.failed, outcome.ok) == (4, len(cells) - 4)
    assert outcome.status == "failed"
    bad = table(run).query("operation == 'sparse_gemm'")
    assert set(bad["reason"]) == {"RuntimeError: no luck today"}
    monkeypatch.undo()
    again = search.run_task(run, task(run, "tune"))
    assert (again.failed, again.done_before) == (0, len(cells) - 4), "failed cells are tried again"


def test_a_backend_that_this_machine_lacks_is_skipped_once(tmp_path: Path) -> None:
    run = small_run(tmp_path, dtypes=["INT8"], backends={"dense": ["cublaslt"], "sparse": ["cpu_sparse"]})
    for _ in range(2):
        outcome = search.run_task(run, task(run, "tune"))
        assert (outcome.skipped, outcome.failed) == (6, 0)
    skipped = table(run).query("backend == 'cublaslt'")
    assert len(skipped) == 6
    assert set(skipped["status"]) == {"skipped"}
    assert skipped["reason"].str.contains("needs an NVIDIA GPU").all()
