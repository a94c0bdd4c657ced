"""Result folders put together: what ran apart, a type on each GPU, reads as if it had run in one folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from fixtures.result_trees import Writer
from small_runs import small_run

from slidesparse import files, merge, records, runner, status
from slidesparse.errors import RecordError, SlideSparseError
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.plan import Plan
from slidesparse.report.collect import collect
from slidesparse.report.overview import matrix_table
from slidesparse.report.render import render_report
from slidesparse.report.view import NOT_RUN, View
from slidesparse.result_tree import ResultTree
from slidesparse.rows import PrepareRow
from slidesparse.tuning.store import TuningStore, Winner

INT8, FP8 = ("20260128T100000-ab12", "2026-01-28T10:00:00+00:00"), ("20260129T100000-cd34", "2026-01-29T10:00:00+00:00")
"""Run and time of the two parts."""


def part(plan: Plan, folder: Path, *types: str) -> Plan:
    """As `--types` and `--data` have it."""
    profile = plan.profile.only(types)
    return Plan(plan.bench.model_copy(update={"profiles": {plan.profile_name: profile}}), plan.profile_name, folder)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def test_runs_of_one_second_keep_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of a merge are listed by run: seen the wrong way round where both began in one second."""
    drawn = iter(["ffff", "8888", "0000"])
    monkeypatch.setattr(runner.secrets, "token_hex", lambda size: next(drawn))
    ids = []
    for _ in range(3):
        with runner.open_run(small_run(tmp_path).plan, quiet=True) as opened:
            ids.append(opened.run_id)
    assert sorted(ids) == ids


# -- a whole profile, run apart --------------------------------------------------------------------------


def run(plan: Plan, tasks: int | None = None) -> tuple[int, ResultTree]:
    """The first tasks of a plan, or all."""
    with runner.open_run(plan, quiet=True) as opened:
        return runner.run_tasks(opened, plan.tasks[:tasks]), opened.tree


@dataclass(frozen=True)
class Apart:
    """Models of both types made once and copied; INT8 run in one data folder, FP8 in the other; then merged."""

    plan: Plan
    tree: ResultTree
    other: ResultTree
    parts: tuple[list[dict[str, Any]], list[dict[str, Any]]]
    """Tasks of the two status files before they were merged."""


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Apart:
    folder = tmp_path_factory.mktemp("apart")
    plan = small_run(folder / "a").plan
    assert run(plan, 2)[0] == 0
    shutil.copytree(folder / "a", folder / "b")
    (first, tree), (second, other) = (
        run(part(plan, folder / data, name)) for data, name in (("a", "INT8"), ("b", "FP8E4M3"))
    )
    assert (first, second) == (0, 0)
    tasks = files.read_json(tree.status)["tasks"], files.read_json(other.status)["tasks"]
    assert merge.merge(plan, [other.root]) == tree
    return Apart(plan, tree, other, tasks)


def test_all_that_ran_apart_is_done_and_its_seconds_are_added(apart: Apart) -> None:
    tables = {path: path.read_bytes() for path in apart.tree.root.rglob("*.csv")}
    merged = files.read_json(apart.tree.status)["tasks"]
    assert run(apart.plan) == (0, apart.tree)
    assert {path: path.read_bytes() for path in apart.tree.root.rglob("*.csv")} == tables, "nothing is measured again"
    again = files.read_json(apart.tree.status)["tasks"]
    for task, int8, fp8, before in zip(again, *apart.parts, merged, strict=True):
        assert task["status"] == "succeeded"
        assert task["ok"] == task["done_before"] == task["cells"] == int8["cells"] + fp8["cells"]
        if task["name"] in ("prepare", "convert"):
            assert task["seconds"] == int8["seconds"] == fp8["seconds"], "one run made the models for both"
            assert "run apart" not in task["note"]
        else:
            assert task["seconds"] == pytest.approx(int8["seconds"] + fp8["seconds"], abs=2e-3)
            said = f"INT8 {int8['seconds']:.1f} s and FP8E4M3 {fp8['seconds']:.1f} s, run apart"
            assert task["note"].startswith(said)
        assert task == before, "a run that finds all cells done leaves the word standing"


def test_the_report_knows_both_parts(apart: Apart) -> None:
    text = render_report(apart.tree).read_text(encoding="utf-8")
    assert "8 succeeded, 0 failed, 0 skipped" in text
    assert "run apart" in text
    matrix = matrix_table(View(collect(apart.tree)))
    kinds, missing = matrix.head.index("type"), matrix.head.index(f"not run {NOT_RUN}")
    assert {row[kinds] for row in matrix.rows} == {"INT8", "FP8E4M3"}
    assert {row[missing] for row in matrix.rows} == {"0"}


def test_a_second_merge_changes_nothing(apart: Apart) -> None:
    before = snapshot(apart.tree.root)
    merge.merge(apart.plan, [apart.other.root, apart.other.root])
    assert snapshot(apart.tree.root) == before


def test_a_later_run_of_the_other_folder_is_added_once(apart: Apart) -> None:
    """What it finds done adds no time; what it measured anew adds its own."""
    before = files.read_json(apart.tree.status)["tasks"]
    with runner.open_run(part(apart.plan, apart.other.root.parents[1], "FP8E4M3"), quiet=True) as opened:
        runner.run_tasks(opened, opened.plan.tasks[:1])
        decode = next(iter(apart.other.root.glob("throughput_benchmark_results/decode/*/cpu_dense/*.csv")))
        decode.unlink()
        runner.run_tasks(opened, opened.plan.stage_tasks("decode"))
    for _ in range(2):
        merge.merge(apart.plan, [apart.other.root])
        after = files.read_json(apart.tree.status)["tasks"]
        assert [task for task in after if task["number"] != 5] == [task for task in before if task["number"] != 5]
        assert [one["types"] for one in after[4]["parts"]] == [["INT8"], ["FP8E4M3"], ["FP8E4M3"]]
        assert after[4]["seconds"] == pytest.approx(sum(one["seconds"] for one in after[4]["parts"]), abs=2e-3)
        assert after[4]["cells"] == before[4]["cells"]
    assert opened.run_id in [entry["run_id"] for entry in files.read_json(apart.tree.environment)["runs"]]
    assert (apart.tree.logs / f"{opened.run_id}.log").is_file()


def test_models_that_were_not_taken_over_are_made_again_and_their_cells_stay_done(apart: Apart) -> None:
    for name in ("checkpoints", "checkpoints_slidesparse"):
        for folder in (apart.plan.data / name).glob("*-FP8*"):
            shutil.rmtree(folder)
    assert run(apart.plan) == (0, apart.tree)
    tasks = files.read_json(apart.tree.status)["tasks"]
    assert [task["done_before"] == task["cells"] for task in tasks] == [False, False] + [True] * 6


# -- made-up trees -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Two:
    """Trees of the smoke profile as an older version wrote them: `a` with INT8, `b` with FP8."""

    plan: Plan
    a: ResultTree
    b: ResultTree

    def merge(self) -> list[dict[str, Any]]:
        merge.merge(self.plan, [self.b.root])
        tasks: list[dict[str, Any]] = files.read_json(self.a.status)["tasks"]
        return tasks


@pytest.fixture
def two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Two:
    trees = []
    for folder, name, (run_id, time) in (("a", "INT8", INT8), ("b", "FP8E4M3", FP8)):
        writer = Writer(tmp_path / folder, "smoke")
        whole, writer.plan = writer.plan, part(writer.plan, tmp_path / folder, name)
        tree = writer.everything()
        state, environment = files.read_json(tree.status), files.read_json(tree.environment)
        files.write_json(tree.status, state | {"run_id": run_id, "updated_utc": time})
        files.write_json(tree.environment, environment | {"runs": [{"run_id": run_id, "profile": "smoke"}]})
        (tree.logs / f"{INT8[0]}.log").rename(tree.logs / f"{run_id}.log")
        trees.append(tree)
    monkeypatch.setattr(merge, "result_tree", lambda plan: trees[0])
    return Two(whole, *trees)


def test_every_table_log_and_run_is_there(two: Two) -> None:
    tasks = two.merge()
    for path in two.b.root.rglob("*.csv"):
        theirs, merged = records.read(path), records.read(two.a.root / path.relative_to(two.b.root))
        assert len(merged) >= len(theirs)
        assert merged.tail(len(theirs)).reset_index(drop=True).equals(theirs)
    assert len(records.read(two.a.prepare)) == 2
    assert sorted(path.stem for path in two.a.logs.glob("*.log")) == [INT8[0], FP8[0]]
    environment = files.read_json(two.a.environment)
    assert [entry["run_id"] for entry in environment["runs"]] == [INT8[0], FP8[0]]
    assert environment["profile_config"]["dtypes"] == ["INT8", "FP8E4M3"]
    assert [task["cells"] for task in tasks] == [len(task.cells) for task in two.plan.tasks]
    prefill = tasks[3]
    assert (prefill["status"], prefill["failed"], prefill["seconds"]) == ("succeeded", 0, 100.0), "tables decide"
    assert prefill["note"] == f"{INT8[0]} 50.0 s and {FP8[0]} 50.0 s, run apart"


def test_an_empty_folder_takes_the_other_as_it_is(two: Two, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    empty = ResultTree(tmp_path / "c" / two.a.tag, two.a.tag)
    monkeypatch.setattr(merge, "result_tree", lambda plan: empty)
    merge.merge(two.plan, [two.b.root])
    for path in two.b.root.rglob("*.csv"):
        assert (empty.root / path.relative_to(two.b.root)).read_bytes() == path.read_bytes()
    tasks = files.read_json(empty.status)["tasks"]
    assert {task["status"] for task in tasks} == {"incomplete", "failed"}, "INT8 is in the profile and not there"
    assert [task["number"] for task in tasks if task["status"] == "failed"] == [4]
    assert all("parts" not in task for task in tasks)


@pytest.mark.parametrize("change", [{"status": "failed", "reason": "x"}, {"verified": "failed"}])
def test_a_failed_cell_of_either_is_one_of_the_task(two: Two, change: dict[str, Any]) -> None:
    path = next(two.b.root.glob("throughput_benchmark_results/decode/*/cpu_dense/*.csv"))
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    for name, value in change.items():
        frame.loc[0, name] = value
    frame.to_csv(path, index=False)
    decode = two.merge()[4]
    assert (decode["status"], decode["failed"], decode["ok"]) == ("failed", 1, decode["cells"] - 1)


@pytest.mark.parametrize(("times", "counts"), [((INT8[1], FP8[1]), "theirs"), ((FP8[1], INT8[1]), "ours")])
def test_of_a_cell_that_both_have_the_later_row_counts(two: Two, times: tuple[str, str], counts: str) -> None:
    for tree, time, folder in ((two.a, times[0], "ours"), (two.b, times[1], "theirs")):
        row = PrepareRow(model="Shared", dtype="INT8", folder=folder, fingerprint=folder, run_id="r", time_utc=time)
        records.append(tree.prepare, [row])
    two.merge()
    key = {"model": "Shared", "dtype": "INT8"}
    assert records.is_done(two.a.prepare, PrepareRow, key, counts)
    assert len(records.read(two.a.prepare)) == 4, "both measurements are kept"


def winner(m: int, algorithm: str, time: str) -> Winner:
    return Winner("dense_gemm", "cpu_dense", "INT8", "", m, 8, 8, algorithm, 0, 1.0, {}, "r", time)


def test_of_two_winners_the_later_counts(two: Two) -> None:
    for tree, (m, name), other in ((two.a, (1, "ours"), INT8[1]), (two.b, (2, "theirs"), FP8[1])):
        store = TuningStore(tree.tuning_store)
        for size, time in ((m, "2026-01-01T00:00:00+00:00"), (3, other), (4, INT8[1] if name == "theirs" else FP8[1])):
            store.put(winner(size, name, time))
        store.save()
    two.merge()
    found = {entry["m"]: entry["algorithm"] for entry in files.read_json(two.a.tuning_store)["winners"]}
    assert found == {1: "ours", 2: "theirs", 3: "theirs", 4: "ours"}


def test_algorithms_that_either_lost_its_context_to_are_barred(two: Two) -> None:
    entry = {"backend": "cusparselt", "dtype": "FP16", "algorithm": "36", "versions": {}, "error": "illegal"}
    files.write_json(two.a.lost_contexts, [entry])
    files.write_json(two.b.lost_contexts, [entry | {"error": "other words"}, entry | {"algorithm": "37"}])
    two.merge()
    assert files.read_json(two.a.lost_contexts) == [entry, entry | {"algorithm": "37"}]
    LostContexts.open(two.a.lost_contexts, {})


# -- what is refused, and what breaks off ----------------------------------------------------------------


def test_results_of_another_machine_are_not_merged(two: Two) -> None:
    files.write_json(two.b.status, files.read_json(two.b.status) | {"tag": "H100_cc90_py312_cu129_x86_64"})
    before = snapshot(two.a.root)
    with pytest.raises(SlideSparseError, match=r"results of H100_cc90.*report --other"):
        two.merge()
    assert snapshot(two.a.root) == before


def test_a_folder_without_results_and_its_own(two: Two, tmp_path: Path) -> None:
    with pytest.raises(SlideSparseError, match=r"no results there.*give reports/TAG"):
        merge.merge(two.plan, [tmp_path / "nowhere"])
    with pytest.raises(SlideSparseError, match="is the folder to merge into"):
        merge.merge(two.plan, [two.a.root])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("calibration/rates.csv", "quantity,dtype\ncopy\n"),
        ("preparation/models.csv", "model,surprise\nx,1\n"),
        ("mine.csv", "a\n1\n"),
        ("tuning/winners.json", "{"),
        ("environment.json", "[]"),
        ("status.json", "{}"),
    ],
)
def test_a_broken_file_is_named_and_nothing_is_written(two: Two, name: str, text: str) -> None:
    files.write_text(two.b.root / name, text)
    before = snapshot(two.a.root)
    with pytest.raises(SlideSparseError) as caught:
        two.merge()
    assert str(caught.value).startswith(f"{two.b.root / name}: ")
    assert "\n" not in str(caught.value)
    assert snapshot(two.a.root) == before


def test_a_broken_table_here_stays_as_it_is(two: Two) -> None:
    two.a.prepare.write_text("model,dtype\nTiny\n")
    with pytest.raises(RecordError, match=r"models\.csv: line 2"):
        two.merge()
    assert two.a.prepare.read_text() == "model,dtype\nTiny\n"


def test_a_run_in_either_folder_keeps_the_merge_out(two: Two) -> None:
    for tree in (two.a, two.b):
        with files.exclusive(tree.root), pytest.raises(SlideSparseError, match="another run is writing there"):
            two.merge()


def test_a_merge_that_broke_off_is_run_again(two: Two, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine, written = files.write_text, []

    def breaks_off(target: Path, text: str) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(target)
        genuine(target, text)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_text", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            two.merge()
    two.merge()
    complete = snapshot(two.a.root)
    two.merge()
    assert snapshot(two.a.root) == complete
    assert status.load(two.a.status)["tasks"][0]["ok"] == 2
