"""The command as a user runs it: whole runs of a tiny profile, exit codes, one-line errors, interruption, resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_runs import MACHINE, small_run

from slidesparse import files, records, runner
from slidesparse.errors import DiskError
from slidesparse.plan import Task
from slidesparse.run import Outcome, Run
from slidesparse.status import Status

INTERRUPTED = 130


@pytest.fixture(scope="module")
def bench_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench file whose one profile takes seconds."""
    folder = tmp_path_factory.mktemp("bench")
    bench = small_run(folder, dtypes=["INT8"]).plan.bench.model_dump(mode="json")
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(bench))
    return path


def command(bench: Path, data: Path, *arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "slidesparse",
        "--config",
        str(bench),
        "--profile",
        "test",
        "--data",
        str(data),
        *arguments,
    ]


def run(bench: Path, data: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        command(bench, data, *arguments), capture_output=True, text=True, env=environment, timeout=280
    )


@pytest.fixture(scope="module")
def finished(bench_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of a whole run."""
    data = tmp_path_factory.mktemp("data")
    done = run(bench_file, data, "all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "8 succeeded, 0 failed, 0 skipped" in done.stdout
    return data


def tree_of(data: Path) -> Path:
    return next((data / "reports").iterdir())


def test_all_writes_every_record_and_the_report(finished: Path) -> None:
    tree = tree_of(finished)
    for name in ("report.md", "status.json", "environment.json"):
        assert (tree / name).stat().st_size > 0
    assert len(list(tree.glob("logs/*.log"))) >= 1
    status = files.read_json(tree / "status.json")
    assert [task["status"] for task in status["tasks"]] == ["succeeded"] * 8
    assert all(task["ok"] == task["cells"] > 0 for task in status["tasks"])
    prefill = records.read(next(tree.glob("throughput_benchmark_results/prefill/*/cpu_sparse/2_8/*.csv")))
    assert list(prefill["M_prefill"]) == [4, 16]
    assert (prefill["tokens_per_s"] > 0).all()
    assert (prefill["status"] == "ok").all()
    assert prefill["emulation"].all()


def test_a_second_run_measures_nothing_again(bench_file: Path, finished: Path) -> None:
    tables = {path: path.read_bytes() for path in tree_of(finished).rglob("*.csv")}
    models = {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")}
    notes = [task["note"] for task in files.read_json(tree_of(finished) / "status.json")["tasks"]]
    again = run(bench_file, finished, "all")
    assert again.returncode == 0, again.stderr
    assert {path: path.read_bytes() for path in tree_of(finished).rglob("*.csv")} == tables
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*.safetensors")} == models
    tasks = files.read_json(tree_of(finished) / "status.json")["tasks"]
    assert all(task["done_before"] == task["cells"] for task in tasks)
    assert all(task["seconds"] > 0 for task in tasks), "the status keeps how long the work took"
    assert "written in" in notes[1]
    assert [task["note"] for task in tasks] == notes


def test_report_is_the_same_from_the_same_records(bench_file: Path, finished: Path) -> None:
    before = (tree_of(finished) / "report.md").read_bytes()
    assert run(bench_file, finished, "report").returncode == 0
    assert (tree_of(finished) / "report.md").read_bytes() == before


def test_json_output_is_json(bench_file: Path, finished: Path) -> None:
    for name, key in (("status", "tasks"), ("plan", "tasks"), ("report", "report")):
        assert key in json.loads(run(bench_file, finished, "--json", name).stdout)
    findings = json.loads(run(bench_file, finished, "--json", "doctor").stdout)
    assert {"name", "status", "detail", "advice"} <= set(findings[0])


def test_plan_says_what_is_recorded(bench_file: Path, finished: Path, tmp_path: Path) -> None:
    done = json.loads(run(bench_file, finished, "--json", "plan").stdout)
    assert all(task["recorded"] == task["cells"] and task["at_most_s"] == 0 for task in done["tasks"])
    fresh = json.loads(run(bench_file, tmp_path, "--json", "plan").stdout)
    assert all(task["recorded"] == 0 for task in fresh["tasks"])
    assert [len(task["list"]) for task in fresh["tasks"]] == [task["cells"] for task in fresh["tasks"]]
    assert not (tmp_path / "reports").exists(), "a dry run writes nothing"


def test_failure_is_recorded_and_sets_the_exit_code(bench_file: Path, tmp_path: Path) -> None:
    done = run(bench_file, tmp_path, "--source", "hub", "prepare")
    assert done.returncode == 1
    assert "synthetic" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    assert run(bench_file, tmp_path, "status").returncode == 1


def test_a_stage_whose_input_is_missing_says_what_to_run(bench_file: Path, tmp_path: Path) -> None:
    done = run(bench_file, tmp_path, "convert")
    assert done.returncode == 1
    assert "prepare" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_bad_bench_file_is_one_line_and_exit_code_2(bench_file: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.yaml"
    bad.write_text(bench_file.read_text().replace("2:8", "3:8"))
    done = run(bad, tmp_path, "all")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "3:8" in done.stderr
    assert f"{bad}:" in done.stderr
    assert not (tmp_path / "reports").exists()


@pytest.fixture(scope="module")
def both_types(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bench file with both 8-bit types."""
    folder = tmp_path_factory.mktemp("both")
    path = folder / "bench.yaml"
    path.write_text(yaml.safe_dump(small_run(folder).plan.bench.model_dump(mode="json")))
    return path


def test_types_leave_out_the_cells_of_others(both_types: Path, tmp_path: Path) -> None:
    count = {}
    for types in ("INT8", " FP8E4M3", "INT8,FP8E4M3"):
        tasks = json.loads(run(both_types, tmp_path, "--types", types, "--json", "plan").stdout)["tasks"]
        count[types] = [task["cells"] for task in tasks]
    assert count["INT8"] == count[" FP8E4M3"] == [cells // 2 for cells in count["INT8,FP8E4M3"]]


def test_a_wrong_type_is_one_line_and_exit_code_2(both_types: Path, tmp_path: Path) -> None:
    done = run(both_types, tmp_path, "--types", "INT8,INT4", "all")
    assert done.returncode == 2
    assert done.stderr == "error: --types: 'INT4' is no type of this profile; it has INT8, FP8E4M3\n"
    assert not (tmp_path / "reports").exists()


def test_merge_takes_another_folder_in_and_reports(bench_file: Path, finished: Path, tmp_path: Path) -> None:
    theirs = tree_of(finished)
    done = run(bench_file, tmp_path, "merge", str(theirs))
    assert done.returncode == 0, done.stderr
    assert "8 succeeded, 0 failed, 0 skipped" in done.stdout
    ours = tree_of(tmp_path)
    assert f"report: {ours / 'report.md'}" in done.stdout
    for path in theirs.rglob("*.csv"):
        assert (ours / path.relative_to(theirs)).read_bytes() == path.read_bytes()
    tasks = json.loads(run(bench_file, tmp_path, "--json", "merge", str(theirs)).stdout)["tasks"]
    assert [task["seconds"] for task in tasks] == [
        task["seconds"] for task in files.read_json(theirs / "status.json")["tasks"]
    ]


def test_a_merge_that_is_refused_is_one_line(bench_file: Path, tmp_path: Path) -> None:
    done = run(bench_file, tmp_path, "merge", str(tmp_path / "nowhere"))
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "nowhere: no results there" in done.stderr
    assert not (tmp_path / "reports").exists()


def statuses(data: Path) -> list[str]:
    found = list(data.glob("reports/*/status.json"))
    return [task["status"] for task in files.read_json(found[0])["tasks"]] if found else []


def test_interrupt_then_resume(bench_file: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        command(bench_file, tmp_path, "all"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and "running" not in statuses(tmp_path)[3:]:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == INTERRUPTED
    assert "resumes" in errors
    assert "Traceback" not in errors
    assert 1 <= statuses(tmp_path).count("interrupted") <= 2, "prefill and decode run together"
    assert not list(tmp_path.rglob(f"*{files.PARTIAL}"))
    assert run(bench_file, tmp_path, "all").returncode == 0


def test_an_interrupt_inside_generated_code_has_the_same_exit_code(tmp_path: Path) -> None:
    """Imports run strings, and CPython 3.11 ends by SIGINT where an interrupt came inside one, caught or not."""
    (tmp_path / "interrupted.py").write_text(
        "from slidesparse import cli\n"
        "@cli.main.command()\n"
        "def generated():\n"
        "    exec('raise KeyboardInterrupt')\n"
        "cli.main(['generated'])\n"
    )
    done = subprocess.run([sys.executable, "-m", "interrupted"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == INTERRUPTED
    assert "resumes" in done.stderr


def test_two_runs_at_once_are_refused(bench_file: Path, finished: Path) -> None:
    with files.exclusive(tree_of(finished)):
        done = run(bench_file, finished, "tune")
    assert done.returncode == 1
    assert "another run" in done.stderr


# -- the runner, with stages of our own ---------------------------------------------------------------


def run_with(monkeypatch: pytest.MonkeyPatch, folder: Path, stage: object) -> tuple[int, list[dict[str, object]]]:
    run = small_run(folder)
    monkeypatch.setattr(runner, "_stage", lambda name: lambda run, tasks: [stage(run, task) for task in tasks])  # type: ignore[operator]
    code = runner.run_tasks(run, run.plan.tasks)
    tasks: list[dict[str, object]] = files.read_json(run.tree.status)["tasks"]
    return code, tasks


def test_an_unexpected_error_ends_its_task_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stage(run: Run, task: Task) -> Outcome:
        if task.number == 3:
            raise ZeroDivisionError("boom")
        return Outcome(ok=1)

    code, tasks = run_with(monkeypatch, tmp_path, stage)
    assert code == 1
    assert [task["status"] for task in tasks].count("succeeded") == 7
    assert "ZeroDivisionError: boom" in str(tasks[2]["note"])


def test_all_cells_skipped_is_not_a_failure(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code, tasks = run_with(monkeypatch, tmp_path, lambda run, task: Outcome(skipped=2, notes=["no GPU"]))
    assert code == 0
    assert {task["status"] for task in tasks} == {"skipped"}


def test_an_interrupt_before_the_stage_begins_is_recorded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It comes just after the status file says `running`."""
    genuine = Status.update

    def interrupted(self: Status, task: Task, status: str, *others: Any, **named: Any) -> None:
        genuine(self, task, status, *others, **named)
        if status == "running":
            raise KeyboardInterrupt

    monkeypatch.setattr(Status, "update", interrupted)
    run = small_run(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        runner.run_tasks(run, run.plan.tasks)
    assert files.read_json(run.tree.status)["tasks"][0]["status"] == "interrupted"


def test_a_full_disk_ends_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def stage(run: Run, task: Task) -> Outcome:
        calls.append(task)
        raise DiskError("x: disk full")

    with pytest.raises(DiskError):
        run_with(monkeypatch, tmp_path, stage)
    assert len(calls) == 1


def test_another_profile_keeps_what_was_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    run_with(monkeypatch, tmp_path, lambda run, task: Outcome(ok=1))
    run = small_run(tmp_path)
    renamed = run.plan.bench.model_copy(update={"profiles": {"second": run.plan.profile}})
    second = Run(type(run.plan)(renamed, "second", tmp_path), run.tree, MACHINE, "run2", run.log)
    runner.run_tasks(second, second.plan.tasks[:1])
    status = files.read_json(run.tree.status)
    assert [task["status"] for task in status["other_profiles"]["test"]] == ["succeeded"] * 8
    assert status["tasks"][1]["status"] == "pending"
