"""What `plan` calls recorded: the cells whose rows are there, found where the stages put them."""

from __future__ import annotations

from pathlib import Path

import pytest
from fixtures.result_trees import CPU, GPU, Machine, Writer

from slidesparse import overview


@pytest.mark.parametrize(("profile", "machine"), [("smoke", CPU), ("kernels", GPU)])
def test_every_cell_with_a_row_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, profile: str, machine: Machine
) -> None:
    writer = Writer(tmp_path, profile, machine)
    monkeypatch.setattr(overview, "result_tree", lambda plan: writer.tree)
    wanted = [task for task in writer.plan.tasks if task.stage not in ("tune", "kernel")]
    before = overview.plan_overview(writer.plan)["tasks"]
    assert {task["recorded"] for task in before} == {0}
    for task in (*wanted, writer.plan.tasks[5]):
        writer.task(task)
    after = {task["name"]: task for task in overview.plan_overview(writer.plan)["tasks"]}
    for task in (*wanted, writer.plan.tasks[5]):
        assert after[task.name]["recorded"] == len(task.cells), task.name
        assert after[task.name]["at_most_s"] == 0
    assert after["kernel_low"]["recorded"] == 0


def test_a_failed_rate_is_not_recorded_and_its_neighbours_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Writer(tmp_path, "bitnet-2b", GPU)
    writer.changes = {"tensor cores FP16 2:4 with loads": {"status": "failed", "reason": "illegal instruction"}}
    monkeypatch.setattr(overview, "result_tree", lambda plan: writer.tree)
    writer.task(writer.plan.tasks[9])
    cells = overview.plan_overview(writer.plan)["tasks"][9]["list"]
    assert [cell["cell"] for cell in cells if not cell["recorded"]] == ["tensor cores FP16 2:4 with loads"]
