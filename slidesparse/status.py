"""`status.json`: the last word on each task of each profile, and how long its work took. Nothing else writes it."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

from slidesparse import files, records
from slidesparse.errors import DiskError, RecordError
from slidesparse.plan import Plan, Task
from slidesparse.result_tree import ResultTree
from slidesparse.run import Outcome, Run

Entry = dict[str, Any]
"""What the file says of one task."""
INCOMPLETE = "incomplete"
"""Of a task put together from runs that left some of its cells out."""
_STANDING = ("succeeded", "running", "skipped", INCOMPLETE)
_WORK = ("run_id", "types", "parts")
"""Whose work the seconds of an entry are: a run and the types of its cells; `parts`, where several ran apart."""
_PART = ("run_id", "types", "status", "seconds", "note")


class Status:
    """The file of one result tree, kept over runs of single stages and other profiles."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._entries = {task.number: self._entry(task, "pending") for task in run.plan.tasks}
        self._others: dict[str, list[Entry]] = {}
        if run.tree.status.exists():
            self._others = _profiles(load(run.tree.status))
            for entry in self._others.pop(run.plan.profile_name, []):
                self._entries[entry["number"]] = entry
        self._started = _now()

    def update(
        self, task: Task, status: str, seconds: float = 0.0, outcome: Outcome | None = None, note: str = ""
    ) -> None:
        entry = self._entry(task, status, seconds, outcome or Outcome(), note)
        nothing_new = outcome is not None and not outcome.failed and outcome.done_before == outcome.ok
        before = self._entries[task.number]
        if status == "running" or (nothing_new and before["status"] in _STANDING):
            # A run that finds all cells done leaves standing how long they took and what there was to say.
            if before["seconds"]:
                entry |= {name: before[name] for name in ("seconds", *_WORK) if name in before}
            entry["note"] = before["note"] if "parts" in before else entry["note"] or before["note"]
        self._entries[task.number] = entry
        state = {
            "profile": self._run.plan.profile_name,
            "run_id": self._run.run_id,
            "tag": self._run.tree.tag,
            "started_utc": self._started,
            "updated_utc": _now(),
            "tasks": [self._entries[number] for number in sorted(self._entries)],
            "log": f"logs/{self._run.run_id}.log",
            "other_profiles": self._others,
        }
        files.write_json(self._run.tree.status, state)

    def try_update(self, task: Task, status: str, seconds: float, note: str) -> None:
        """As `update`, on a disk that may not take it."""
        try:
            self.update(task, status, seconds, note=note)
        except DiskError as error:
            self._run.log.error("%s", error)

    def _entry(
        self, task: Task, status: str, seconds: float = 0.0, outcome: Outcome | None = None, note: str = ""
    ) -> Entry:
        outcome = outcome or Outcome()
        work = {"run_id": self._run.run_id, "types": _types(task), "seconds": seconds}
        return _entry(task, status, outcome, note or "; ".join(outcome.notes), work)


def load(path: Path) -> dict[str, Any]:
    """The whole file. Raises SlideSparseError when it is missing or not JSON, RecordError when it is another thing."""
    state = files.read_json(path)
    if not isinstance(state, dict) or not {"profile", "run_id", "tag", "tasks"} <= set(state):
        raise RecordError(f"{path}: not a status file; move it aside")
    return state


def merge(plan: Plan, tree: ResultTree, theirs: dict[str, Any]) -> None:
    """Take over what the file of another tree says, once its tables have been taken over.

    Cells are counted in the tables as they now are, those that no run has recorded too: the plan is the whole profile.
    Seconds are added: time of GPUs, not of a clock on the wall. A run counts once, however often its tree is merged.

    Raises:
        DiskError: disk full, or the folder cannot be written.
        RecordError: a table or the file here cannot be read.
    """
    ours = load(tree.status) if tree.status.exists() else {}
    known = _profiles(ours) if ours else {}
    entries = {name: known.get(name, []) + found for name, found in _profiles(theirs).items()}
    for name in {plan.profile_name: None} | entries:
        if name in plan.bench.profiles:
            whole = plan if name == plan.profile_name else Plan(plan.bench, name, plan.data)
            known[name] = _put_together(whole, tree, entries.get(name, known.get(name, [])))
        else:  # of another bench file: nothing is known of its cells
            known.setdefault(name, entries[name])
    tasks = known.pop(plan.profile_name)
    state = theirs | ours | {"profile": plan.profile_name, "tasks": tasks, "other_profiles": known}
    if state != ours:
        files.write_json(tree.status, state | {"updated_utc": _now()})


def _put_together(plan: Plan, tree: ResultTree, entries: Iterable[Entry]) -> list[Entry]:
    """One entry a task of the plan: its cells by the tables, its seconds and notes by the runs that worked on it."""
    recorded = lru_cache(maxsize=None)(lambda path, names: records.outcomes(records.read(path), names))
    parts: dict[int, dict[str, Entry]] = {task.number: {} for task in plan.tasks}
    for entry in entries:
        for part in entry.get("parts", [entry]):
            if part["status"] != "pending" and entry["number"] in parts:
                parts[entry["number"]][part["run_id"]] = {name: part[name] for name in _PART if name in part}
    together = []
    for task in plan.tasks:
        places = [tree.place(cell) for cell in task.cells]
        words = [recorded(path, tuple(key)).get(tuple(key.values())) for path, key in places]
        outcome = Outcome(words.count("ok"), words.count("failed"), words.count("skipped"), words.count("ok"))
        runs = [parts[task.number][run_id] for run_id in sorted(parts[task.number])]
        together.append(_of_parts(task, outcome, runs, whole=None not in words))
    return together


def _of_parts(task: Task, outcome: Outcome, runs: list[Entry], whole: bool) -> Entry:
    """The entry of a task that `runs` worked on, oldest first. `whole`: every cell has a row."""
    status = outcome.status if whole or outcome.failed else INCOMPLETE
    if not runs:
        status = "pending"
    elif not whole and "failed" in (run["status"] for run in runs):
        status = "failed"
    # What a run that broke off had to say is past once all cells are there.
    ended = [run for run in runs if status not in ("succeeded", "skipped") or run["status"] in _STANDING]
    notes = dict.fromkeys(run["note"] for run in ended if run["note"])
    if len(runs) > 1:
        spans = [f"{' + '.join(run.get('types', [])) or run['run_id']} {run['seconds']:.1f} s" for run in runs]
        notes = {f"{', '.join(spans[:-1])} and {spans[-1]}, run apart": None} | notes
    work: Entry = {
        "run_id": runs[-1]["run_id"] if runs else "",
        "types": list(dict.fromkeys(name for run in runs for name in run.get("types", []))),
        "seconds": sum(run["seconds"] for run in runs),
    }
    entry = _entry(task, status, outcome, "; ".join(notes), work)
    return entry | {"parts": runs} if len(runs) > 1 else entry


def _entry(task: Task, status: str, outcome: Outcome, note: str, work: Entry) -> Entry:
    return {
        "number": task.number,
        "name": task.name,
        "title": task.title,
        "status": status,
        "seconds": round(work["seconds"], 3),
        "cells": len(task.cells),
        "ok": outcome.ok,
        "failed": outcome.failed,
        "skipped": outcome.skipped,
        "done_before": outcome.done_before,
        "note": note,
        "types": work["types"],
        "run_id": work["run_id"],
    }


def _profiles(state: dict[str, Any]) -> dict[str, list[Entry]]:
    """Entries by profile. Those of older versions, which name no run, get the one that the file was written by."""
    found = state.get("other_profiles", {}) | {state["profile"]: state["tasks"]}
    return {
        name: [entry | {"run_id": entry.get("run_id", state["run_id"])} for entry in entries]
        for name, entries in found.items()
    }


def _types(task: Task) -> list[str]:
    return list(dict.fromkeys(cell.dtype.value for cell in task.cells if cell.dtype is not None))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
