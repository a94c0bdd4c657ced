"""What `plan`, `status` and `doctor` print: the dry run, the state of a run, the findings."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from rich.console import Console
from rich.table import Table

from slidesparse import files, records
from slidesparse.doctor import Finding, disk_need
from slidesparse.model_size import checkpoint_bytes
from slidesparse.plan import Cell, ConvertCell, Plan, PrepareCell, Task
from slidesparse.runner import result_tree

ASSUMED_DISK_MIB_S = 250
"""Used for the expected time of prepare and convert until a run has measured the disk."""
MARKS = {"succeeded": "green", "failed": "red", "interrupted": "red", "skipped": "yellow", "running": "cyan"}


def plan_overview(plan: Plan) -> dict[str, Any]:
    """Every task with its cells, which of them are recorded, and the time and disk expected."""
    tree = result_tree(plan)
    finished = lru_cache(maxsize=None)(lambda path, names: records.finished(records.read(path), names))

    def recorded(cell: Cell) -> bool:
        path, key = tree.place(cell)
        return tuple(key.values()) in finished(path, tuple(key))

    tasks = []
    for task in plan.tasks:
        cells = [{"cell": str(cell), "recorded": recorded(cell)} for cell in task.cells]
        left = sum(not cell["recorded"] for cell in cells)
        tasks.append(
            {
                "number": task.number,
                "name": task.name,
                "title": task.title,
                "cells": len(cells),
                "recorded": len(cells) - left,
                "at_most_s": round(_at_most(plan, task) * left / max(len(cells), 1), 1),
                "list": cells,
            }
        )
    return {
        "profile": plan.profile_name,
        "description": plan.profile.description,
        "source": plan.profile.source,
        "reports": str(tree.root),
        "tasks": tasks,
        "disk_need_bytes": disk_need(plan),
        "disk_free_bytes": shutil.disk_usage(files.existing_parent(plan.data)).free,
    }


def print_plan(overview: dict[str, Any], with_cells: bool) -> None:
    """The dry run as a table; with every cell if asked for."""
    console = Console()
    table = Table(title=f"profile {overview['profile']}: {overview['description']}", title_justify="left")
    for name, justify in (("#", "right"), ("task", "left"), ("cells", "right"), ("recorded", "right")):
        table.add_column(name, justify=justify)  # type: ignore[arg-type]
    table.add_column("time left, at most", justify="right")
    for task in overview["tasks"]:
        numbers = (str(task["cells"]), str(task["recorded"]), _duration(task["at_most_s"]))
        table.add_row(str(task["number"]), task["title"], *numbers)
    console.print(table)
    if with_cells:
        for task in overview["tasks"]:
            for cell in task["list"]:
                console.print(
                    f"{task['number']} {'done' if cell['recorded'] else 'to do'}  {cell['cell']}", highlight=False
                )
    need, free = overview["disk_need_bytes"] / 2**30, overview["disk_free_bytes"] / 2**30
    console.print(f"models from: {overview['source']}; disk needed in all {need:.1f} GiB, free {free:.1f} GiB")
    console.print(f"records: {overview['reports']}", soft_wrap=True)
    console.print(
        "Time is the sum of the stopping rules' caps (and of bytes over disk speed): most cells stop earlier."
    )


def read_status(plan: Plan) -> dict[str, Any]:
    """`status.json` of this machine, or all tasks pending where nothing ran yet."""
    tree = result_tree(plan)
    if tree.status.exists():
        state: dict[str, Any] = files.read_json(tree.status)
        return state
    tasks = [
        {"number": t.number, "name": t.name, "title": t.title, "status": "pending", "seconds": 0.0, "note": "", "ok": 0}
        | {"cells": len(t.cells), "failed": 0, "skipped": 0, "done_before": 0}
        for t in plan.tasks
    ]
    return {"profile": plan.profile_name, "run_id": "", "tag": tree.tag, "tasks": tasks, "log": ""}


def print_status(state: dict[str, Any]) -> None:
    """The status table of a run."""
    console = Console()
    table = Table(title=f"profile {state['profile']} on {state['tag']}", title_justify="left")
    for name in ("#", "task", "status"):
        table.add_column(name)
    for name in ("seconds", "ok", "failed", "skipped"):
        table.add_column(name, justify="right")
    for task in state["tasks"]:
        colour = MARKS.get(task["status"], "white")
        counts = (str(task["ok"]), str(task["failed"]), str(task["skipped"]))
        label = f"[{colour}]{task['status']}[/{colour}]"
        table.add_row(str(task["number"]), task["title"], label, f"{task['seconds']:.1f}", *counts)
    console.print(table)
    for task in state["tasks"]:
        if task["note"]:
            line = f"{task['number']} {task['name']}: {task['note']}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    count = [sum(task["status"] == status for task in state["tasks"]) for status in ("succeeded", "failed", "skipped")]
    console.print(f"{count[0]} succeeded, {count[1]} failed, {count[2]} skipped")


def print_findings(findings: Iterable[Finding], as_lines: bool = False) -> None:
    """What `doctor` found: one line each, with the advice where something is missing.

    as_lines: unbroken lines, for long details, instead of a table as wide as the terminal.
    """
    if as_lines:
        for finding in findings:
            advice = f" -> {finding.advice}" if finding.advice else ""
            print(f"{finding.status}: {finding.name}: {finding.detail}{advice}")
        return
    console = Console()
    colours = {"ok": "green", "warning": "yellow", "missing": "red"}
    table = Table(show_header=False, box=None)
    for finding in findings:
        colour = colours[finding.status]
        text = finding.detail if not finding.advice else f"{finding.detail} -> {finding.advice}"
        table.add_row(f"[{colour}]{finding.status}[/{colour}]", finding.name, text)
    console.print(table)


# -- time expected ------------------------------------------------------------------------------------


def _at_most(plan: Plan, task: Task) -> float:
    """Seconds of a whole task if every cell ran into its cap; prepare and convert: bytes over disk speed."""
    profile = plan.profile
    if task.stage in ("prepare", "convert"):
        return sum(_bytes_moved(plan, cell) for cell in task.cells) / (ASSUMED_DISK_MIB_S * 2**20)
    if task.stage == "calibrate":
        return len(task.cells) * profile.calibrate.seconds
    stages = {
        "tune": profile.tune,
        "prefill": profile.prefill,
        "decode": profile.decode,
        "kernel": profile.kernel,
        "linear": profile.linear,
    }
    part = stages[task.stage]
    assert part is not None  # a stage that the profile leaves out has no task
    stopping = part.stopping
    return len(task.cells) * (stopping.warmup_s + stopping.cap_s)


def _bytes_moved(plan: Plan, cell: Cell) -> int:
    assert isinstance(cell, PrepareCell | ConvertCell)
    sizes = checkpoint_bytes(plan.bench.models[cell.model])
    return sizes.base + sizes.prepared if isinstance(cell, PrepareCell) else sizes.converted


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
