"""Kernel section (tasks 6 to 8): latency, paired ratios, checks, best algorithms, for each model and type."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.report import compare
from slidesparse.report.collect import EMULATION
from slidesparse.report.markdown import Table, code, fixed, integer, significant, text
from slidesparse.report.throughput import facts
from slidesparse.report.view import CHECKED, NOISY, TASKS, View, figure_name, ratio_cell, state, stopping_text, title


@dataclass(frozen=True)
class KernelBlock:
    """One model and type."""

    title: str
    emulation: bool
    figure: str
    """Its file name, drawn where there are ratios."""
    matrix: Table
    latency: Table
    ratios: Table
    algorithms: Table
    not_run: int
    facts: list[str]


@dataclass(frozen=True)
class KernelSection:
    """Tasks 6 to 8. `missing`: tasks without any row, with their names for the command line."""

    missing: list[str]
    configuration: list[str]
    blocks: list[KernelBlock]
    files: list[str]


def kernel_section(view: View) -> KernelSection:
    """Everything recorded on kernels."""
    frame = view.records.kernel
    if frame.empty:
        return KernelSection(list(TASKS.values()), _configuration(view, frame), [], [])
    present = {view.kernel_task(sparsity) for sparsity in frame["sparsity"]}
    planned = view.planned_kernel()
    blocks = []
    for model, dtype, emulation, rows in view.groups(frame):
        cells = (cell for cell in planned if cell[1:3] == (model, dtype))
        wanted = {cell[3:] for cell in cells if cell[3].startswith(EMULATION) == emulation}
        blocks.append(_block(view, (model, dtype, emulation), rows, wanted))
    missing = [text for name, text in TASKS.items() if name not in present]
    return KernelSection(missing, _configuration(view, frame), blocks, list(dict.fromkeys(frame["file"])))


Key = tuple[str, str, int, int, int]
"""backend, sparsity, M, N, K before lifting."""
Group = tuple[str, str, bool]
"""Model, type, emulation."""


def _block(view: View, group: Group, frame: pd.DataFrame, planned: set[Key]) -> KernelBlock:
    rows: dict[Key, pd.Series] = {
        (r["backend"], r["sparsity"], int(r["M"]), int(r["N"]), int(r["K_model"])): r for _, r in frame.iterrows()
    }
    keys = {*planned, *rows}
    variants = view.sorted_variants((key[0], key[1]) for key in keys)
    ms = sorted({key[2] for key in keys})
    names = {(n, k): row["layer"] for (_, _, _, n, k), row in rows.items() if row["layer"]}
    shapes = list(dict.fromkeys((key[3], key[4]) for key in rows))
    noise = dict(zip(rows, compare.noisy(frame, compare.limit_of(view.records.profile, "kernel")), strict=True))

    matrix, latency, algorithms = [], [], []
    for backend, sparsity in variants:
        name = compare.label(backend, sparsity)
        count = dict.fromkeys(("exact", "within_bound", "failed", "not_checked"), 0)
        marks = []
        for n, k in shapes:
            points = [rows.get((backend, sparsity, m, n, k)) for m in ms]
            for row in points:
                if row is not None and (row["status"] == "ok" or row["verified"] == "failed"):
                    count[str(row["verified"])] += 1
            states = [state(row) for row in points]
            marks += states
            shape = _shape(names, n, k)
            latency.append([shape, name, *(
                _latency(row, noise[(backend, sparsity, m, n, k)])
                if row is not None and row["status"] == "ok" else mark
                for m, row, mark in zip(ms, points, states, strict=True)
            )])  # fmt: skip
            algorithms.append([shape, name, *(
                f"{code(row['algorithm'] or int(row['alg_id_1']))} of {integer(row['alg_count'])}"
                if row is not None and row["status"] == "ok" else mark
                for row, mark in zip(points, states, strict=True)
            )])  # fmt: skip
        counts = [integer(count[kind]) for kind in ("exact", "within_bound", "failed", "not_checked")]
        others = [integer(marks.count(mark)) for mark in ("✗", "⊘", "·")]
        matrix.append(
            [name, TASKS[view.kernel_task(sparsity)], *counts, *others, f"{marks.count(CHECKED)} of {len(marks)}"]
        )
    latency.sort(key=lambda row: [_shape(names, *shape) for shape in shapes].index(row[0]))
    algorithms.sort(key=lambda row: [_shape(names, *shape) for shape in shapes].index(row[0]))
    columns = [f"M={m}" for m in ms]
    head = [
        "variant",
        "task",
        "exact",
        "within bound",
        "check failed",
        "not checked",
        "cell ✗",
        "cell ⊘",
        "not run",
        "points checked",
    ]
    return KernelBlock(
        title=title(*group),
        emulation=group[2],
        figure=figure_name("kernel", *group),
        matrix=Table(head, matrix, left=2),
        latency=Table(["layer (N x K)", "latency, µs", *columns], _once(latency), left=2),
        ratios=_ratios(view, group, names, shapes, ms),
        algorithms=Table(["layer (N x K)", "best algorithm", *columns], _once(algorithms), left=2),
        not_run=len(planned - set(rows)),
        facts=_facts(view, frame),
    )


def _configuration(view: View, frame: pd.DataFrame) -> list[str]:
    lines = []
    if view.records.profile is not None:
        stop = stopping_text("Each point", view.records.profile.kernel.stopping)
        lines.append(f"{stop} Samples of a sparse point and of its dense twin alternate.")
    if not frame.empty and frame["data"].ne("").any():
        counts = frame["data"].value_counts().sort_index()
        lines.append(f"Weights: {', '.join(f'{kind} ({count} points)' for kind, count in counts.items() if kind)}.")
    return lines


def _facts(view: View, frame: pd.DataFrame) -> list[str]:
    """Code paths with their variants; one example of each kind of check (every point has its own figure)."""
    done = frame[frame["status"] == "ok"]
    lines = [line for line in facts(view, done.assign(check="")) if line]
    for name, rows in done[done["verified"].isin(compare.CHECKED)].groupby("verified", sort=True):
        lines.append(f"Check {code(name)}, for example: {text(rows['check'].iloc[0])}")
    return lines


def _latency(row: pd.Series, noisy: bool) -> str:
    return f"{significant(row['lat_us_1'], 4)}{' ' + NOISY if noisy else ''}"


def _ratios(
    view: View, group: Group, names: dict[tuple[int, int], str], shapes: list[tuple[int, int]], ms: list[int]
) -> Table:
    frame = view.ratios("kernel", *group)
    cells = {(r["backend"], r["sparsity"], r["m"], r["n"], r["k"]): ratio_cell(r) for _, r in frame.iterrows()}
    base = str(frame["baseline"].iloc[0]) if len(frame) else "dense"
    variants = view.sorted_variants(zip(frame["backend"], frame["sparsity"], strict=True))
    rows = [
        [
            _shape(names, n, k),
            compare.label(b, s),
            fixed(compare.bound(s), 3) if s else "",
            *(cells.get((b, s, m, n, k), "") for m in ms),
        ]
        for n, k in shapes
        for b, s in variants
    ]
    return Table(
        ["layer (N x K)", f"against {base}", "bound on a GPU" if group[2] else "bound", *(f"M={m}" for m in ms)],
        _once(rows),
        left=2,
    )


def _shape(names: dict[tuple[int, int], str], n: int, k: int) -> str:
    name = names.get((n, k), "")
    return f"{name} ({n} x {k})" if name else f"{n} x {k}"


def _once(rows: list[list[str]]) -> list[list[str]]:
    """Say a shape once, not on every line of its group."""
    shown = []
    last = ""
    for row in rows:
        shown.append(["", *row[1:]] if row[0] == last else row)
        last = row[0]
    return shown
