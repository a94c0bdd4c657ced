"""Sections on the run as a whole: status, environment, failures, test matrix, quality of the measurements."""

from __future__ import annotations

from typing import Any

import pandas as pd

from slidesparse.plan import calibrate_cells, linear_cells
from slidesparse.report import compare
from slidesparse.report.collect import PHASES
from slidesparse.report.markdown import MISSING, Table, code, fixed, integer, percent, size, text
from slidesparse.report.view import (
    CALIBRATE_TASK,
    CHECKED,
    FAILED,
    LINEAR_TASK,
    NOT_RUN,
    POWER_CAP,
    SKIPPED,
    TASKS,
    UNCHECKED,
    View,
    state,
    throttled,
)

MACHINE = "this machine"
"""Stands for a model where rates of the machine itself are counted."""
ENDED = ("succeeded", "failed", "skipped")


def machine_name(view: View) -> str:
    """What the title names: the GPU, or the CPU of a machine without one."""
    machine = view.records.environment.get("machine") or {}
    name = view.device or str(machine.get("cpu", ""))
    return name or view.records.tree.tag


def status_table(view: View) -> Table:
    """The eight tasks of the reference run, and ours."""
    head = ["#", "task", "status", "note", "seconds", "cells", "ok", "of these done before", "failed", "skipped"]
    rows = []
    for task in view.records.status.get("tasks") or []:
        status = str(task.get("status", "pending"))
        mark = {"succeeded": CHECKED, "failed": FAILED, "interrupted": FAILED, "skipped": SKIPPED}.get(status, NOT_RUN)
        ran = status not in ("pending",)
        counts = [integer(task.get(k, -1)) if ran else "" for k in ("ok", "done_before", "failed", "skipped")]
        rows.append([
            str(task.get("number", "")), text(task.get("title", task.get("name", ""))), f"{mark} {status}",
            text(task.get("note", "")), fixed(task.get("seconds", -1), 1) if ran else "",
            integer(task.get("cells", -1)), *counts,
        ])  # fmt: skip
    return Table(head, rows, left=4)


def status_line(view: View) -> str:
    """`8 succeeded, 0 failed, 0 skipped`, and whatever is neither."""
    tasks = view.records.status.get("tasks") or []
    states = [str(task.get("status", "pending")) for task in tasks]
    parts = [f"{states.count(name)} {name}" for name in ENDED]
    parts += [f"{states.count(name)} {name}" for name in sorted(set(states) - set(ENDED))]
    total = sum(float(task.get("seconds") or 0) for task in tasks)
    return f"{', '.join(parts)}; {fixed(total, 1)} s in all"


def environment_table(view: View) -> Table:
    """Machine, versions, commit, lock file, runs."""
    environment = view.records.environment
    machine: dict[str, Any] = environment.get("machine") or {}
    gpu = machine.get("gpu")
    rows: list[list[str]] = []
    if machine:
        rows.append(["GPU", _gpu(gpu, machine.get("gpu_count")) if isinstance(gpu, dict) else "none"])
        rows.append(
            [
                "CPU",
                f"{text(machine.get('cpu', MISSING))}, {machine.get('cores', MISSING)} cores, {machine.get('arch')}",
            ]
        )
        rows.append(["memory", size(machine.get("memory_bytes", -1))])
        rows.append(["CUDA of the torch build", text(machine.get("cuda") or "none")])
    packages = environment.get("packages") or {}
    rows += [[text(name), code(version)] for name, version in sorted(packages.items())]
    if environment.get("commit"):
        rows.append(["source commit", code(environment["commit"])])
    if environment.get("lock_sha256"):
        rows.append(["lock file, SHA-256", code(environment["lock_sha256"])])
    if view.profile_name:
        rows.append(["profile", code(view.profile_name)])
    profile = view.records.profile
    if profile is not None:
        rows.append(["models", f"{', '.join(profile.models)} (source: {profile.source}, seed {profile.seed})"])
    runs = environment.get("runs") or []
    if runs:
        commits = list(dict.fromkeys(str(run.get("commit", "")) for run in runs if run.get("commit")))
        rows.append(
            ["runs that wrote here", f"{len(runs)}; commits {', '.join(code(_short(c)) for c in commits) or MISSING}"]
        )
    return Table(["what", "value"], rows, left=2)


def _short(commit: str) -> str:
    """Ten digits of a commit, and whether there were changes beyond it."""
    digits, mark, changes = commit.partition("+")
    return f"{digits[:10]}{mark}{changes}"


def _gpu(gpu: dict[str, Any], count: object) -> str:
    major, minor = gpu.get("compute_capability", (0, 0))
    number = f"{count} x " if isinstance(count, int) and count > 1 else ""
    return (
        f"{number}{text(gpu.get('name', ''))}, compute capability {major}.{minor}, "
        f"{size(gpu.get('memory_bytes', -1))}, driver {text(gpu.get('driver', MISSING))}"
    )


# -- every table with a status, seen as cells ---------------------------------------------------------


def _cells(view: View) -> pd.DataFrame:
    """One row a recorded cell: task, what (model, type, variant), size, status, verified, reason."""
    records = view.records
    parts = []
    for title, frame in (("base model preparation", records.prepare), ("SlideSparse conversion", records.convert)):
        if not frame.empty:
            sparsity = frame.get("sparsity", "")
            verified = frame.get("verified", "not_checked")
            parts.append(frame.assign(task=title, backend="", sparsity=sparsity, verified=verified, size=""))
    if not records.tune.empty:
        tune = records.tune
        shape = "M=" + tune["M"].astype(str) + " N=" + tune["N"].astype(str) + " K=" + tune["K"].astype(str)
        parts.append(tune.assign(task="offline tuning", size=tune["operation"] + " " + tune["algorithm"] + " " + shape))
    for phase in PHASES:
        frame = records.throughput[phase]
        if not frame.empty:
            parts.append(frame.assign(task=f"{phase} benchmark", size="M=" + frame["m"].astype(str)))
    if not records.kernel.empty:
        kernel = records.kernel
        shape = "M=" + kernel["M"].astype(str) + " " + kernel["layer"]
        parts.append(kernel.assign(task=[TASKS[view.kernel_task(s)] for s in kernel["sparsity"]], size=shape))
    if not records.linear.empty:
        parts.append(records.linear.assign(task=LINEAR_TASK, size="M=" + records.linear["M"].astype(str)))
    if not records.calibration.empty:
        rates = records.calibration
        what = [f"{r['quantity']}{' 2:4' * r['sparse']}{' with loads' * r['loads']}" for _, r in rates.iterrows()]
        parts.append(rates.assign(task=CALIBRATE_TASK, model=MACHINE, backend="", sparsity="", size=what))
    names = ["task", "model", "dtype", "backend", "sparsity", "size", "status", "verified", "reason"]
    return pd.concat([part[names] for part in parts], ignore_index=True) if parts else pd.DataFrame(columns=names)


def errors_table(view: View) -> Table:
    """Failed and skipped cells; those with the same reason on one line."""
    cells = _cells(view)
    bad = cells[(cells["status"] != "ok") | (cells["verified"] == "failed")]
    rows = []
    names = ["task", "model", "dtype", "backend", "sparsity", "status", "reason"]
    for key, group in bad.groupby(names, sort=False):
        task, model, dtype, backend, sparsity, status, reason = (str(part) for part in key)
        sizes = [text(s) for s in group["size"] if s]
        shown = ", ".join(sizes[:6]) + (f" and {len(sizes) - 6} more" if len(sizes) > 6 else "")
        mark = SKIPPED if status == "skipped" else FAILED
        what = f"{model} {dtype} {compare.label(backend, sparsity)}".strip()
        rows.append([task, what, f"{mark} {status}", shown, text(reason) or MISSING, integer(len(group))])
    return Table(["task", "what", "status", "where", "reason", "cells"], rows, left=5)


def matrix_table(view: View) -> Table:
    """The full test matrix: planned, checked and the rest for each task, model and type."""
    cells = _cells(view)
    head = ["task", "model", "type", f"checked {CHECKED}", f"not checked {UNCHECKED}", f"failed {FAILED}",
            f"skipped {SKIPPED}", f"not run {NOT_RUN}", "planned", "pass rate"]  # fmt: skip
    cells = cells.assign(mark=[state(row) for _, row in cells.iterrows()])
    planned = _planned(view)
    order = [
        "base model preparation",
        "SlideSparse conversion",
        "offline tuning",
        "prefill benchmark",
        "decode benchmark",
    ]
    counted = {str(t.get("title")): int(t.get("cells") or 0) for t in view.records.status.get("tasks") or []}
    rows: list[list[str]] = []
    for task in [*order, *TASKS.values(), LINEAR_TASK, CALIBRATE_TASK]:
        before = len(rows)
        for model in view.models(cells):
            for dtype in view.dtypes(cells):
                part = cells[(cells["task"] == task) & (cells["model"] == model) & (cells["dtype"] == dtype)]
                total = max(planned.get((task, model, dtype), 0), len(part))
                if total == 0:
                    continue
                marks = list(part["mark"])
                counts = [marks.count(mark) for mark in (CHECKED, UNCHECKED, FAILED, SKIPPED)]
                # A prepared checkpoint has no reference to be compared with: written whole is all that can be asked.
                passed = counts[0] + (counts[1] if task == order[0] else 0)
                name = task if task != order[2] else f"{task} (candidates)"
                numbers = [*counts, total - len(part), total]
                rows.append([name, model, dtype or MISSING, *(integer(c) for c in numbers), percent(passed / total, 3)])
        if len(rows) == before and counted.get(task):
            missing = integer(counted[task])
            rows.append([task, "all", "all", "0", "0", "0", "0", missing, missing, "0 %"])
    return Table(head, rows, left=3)


def _planned(view: View) -> dict[tuple[str, str, str], int]:
    profile = view.records.profile
    count: dict[tuple[str, str, str], int] = {}
    if profile is None:
        return count
    for model in profile.models:
        for dtype in profile.dtypes:
            count[("base model preparation", model, dtype.value)] = 1
            count[("SlideSparse conversion", model, dtype.value)] = len(profile.sparsity.end_to_end)
    for phase in PHASES:
        for model, dtype_name, *_ in view.planned(phase):
            key = (f"{phase} benchmark", model, dtype_name)
            count[key] = count.get(key, 0) + 1
    for task, model, dtype_name, *_ in view.planned_kernel():
        key = (TASKS[task], model, dtype_name)
        count[key] = count.get(key, 0) + 1
    for linear in linear_cells(profile):
        key = (LINEAR_TASK, linear.model, linear.dtype.value)
        count[key] = count.get(key, 0) + 1
    for rate in calibrate_cells(profile):
        key = (CALIBRATE_TASK, MACHINE, rate.dtype.value if rate.dtype else "")
        count[key] = count.get(key, 0) + 1
    return count


def checks_table(view: View) -> Table:
    """How the rows of each table were verified."""
    cells = _cells(view)
    kinds = ["exact", "within_bound", "not_checked", "failed"]
    rows = []
    for task, part in cells[cells["task"] != "base model preparation"].groupby("task", sort=False):
        for dtype in view.dtypes(part):
            done = part[(part["dtype"] == dtype) & ((part["status"] == "ok") | (part["verified"] == "failed"))]
            if len(done):
                counts = [integer(int((done["verified"] == kind).sum())) for kind in kinds]
                rows.append([str(task), dtype or MISSING, *counts])
    return Table(["task", "type", "exact", "within bound", "not checked", "check failed"], rows, left=2)


def quality_table(view: View) -> Table:
    """Noise, host-bound steps and throttling, counted."""
    head = ["measurement", "limit of the interval", "rows measured", "wider than the limit", "ended by time cap",
            "host-bound", "at the power cap", "throttled beyond it"]  # fmt: skip
    frames = {phase: view.records.throughput[phase] for phase in PHASES} | {
        "kernel": view.records.kernel,
        "linear": view.records.linear,
        "tune": view.records.tune,
        "calibrate": view.records.calibration,
    }
    rows = []
    for kind, frame in frames.items():
        if frame.empty:
            continue
        done, limit = frame[frame["status"] == "ok"], compare.limit_of(view.records.profile, kind)
        host = integer(int(done["host_bound"].sum())) if "host_bound" in done else MISSING
        wide = MISSING if limit is None else integer(int((done["ci_rel"] > limit).sum()))
        # A rate has no limit to reach: it is measured for a set time.
        capped = MISSING if kind == "calibrate" else integer(int((done["stop"] == "time cap").sum()))
        rows.append([
            kind, MISSING if limit is None else f"±{limit * 100:g} %", integer(len(done)), wide, capped, host,
            integer(int(done["throttle"].astype(str).str.contains(POWER_CAP).sum())),
            integer(int(throttled(done).sum())),
        ])  # fmt: skip
    return Table(head, rows)
