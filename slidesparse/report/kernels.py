"""Kernel section (tasks 6 to 8): latency, paired ratios, checks, best algorithms, for each model and type."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import pandas as pd

from slidesparse.pattern import Sparsity
from slidesparse.plan import SQUARE
from slidesparse.report import compare
from slidesparse.report.collect import EMULATION
from slidesparse.report.markdown import Table, code, fixed, integer, once, percent, significant, text
from slidesparse.report.throughput import facts
from slidesparse.report.view import (
    CHECKED,
    FAILED,
    NOISY,
    NOT_RUN,
    SKIPPED,
    TASKS,
    View,
    figure_name,
    ratio_cell,
    state,
    stopping_text,
    title,
)

Group = tuple[str, str, bool]
"""Model, type, emulation."""
Key = tuple[str, str, int, int, int]
"""backend, sparsity, M, N, K before lifting."""
Point = tuple[int, int, int]
"""M, N, K before lifting."""


@dataclass(frozen=True)
class KernelBlock:
    """One model (or all square shapes) and type."""

    title: str
    emulation: bool
    figure: str
    """Its file name, drawn where there are ratios."""
    matrix: Table
    latency: Table
    shares: bool
    """Latencies carry the share of the attainable rate that they reach."""
    ratios: Table
    epilogue: Table
    """Ratios of the library's sparse GEMM and a second kernel over a GEMM with its epilogue; empty without such."""
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


@dataclass(frozen=True)
class _Grid:
    """Where points stand in the tables: a line for each shape and a column for each M, or all squares on one line."""

    lines: Mapping[str, Mapping[str, Point]]
    """Name of a line -> name of a column -> point."""
    columns: list[str]
    head: str

    @classmethod
    def of(cls, model: str, points: Iterable[Point], names: Mapping[tuple[int, int], str]) -> _Grid:
        points = list(dict.fromkeys(points))
        if model == SQUARE:
            squares = {f"{m:,}": (m, n, k) for m, n, k in sorted(points)}
            return cls({"M = N = K": squares}, list(squares), "shape")
        ms = sorted({m for m, _, _ in points})
        shapes = dict.fromkeys((n, k) for _, n, k in points)
        lines = {_shape(names, n, k): {f"M={m}": (m, n, k) for m in ms} for n, k in shapes}
        return cls(lines, [f"M={m}" for m in ms], "layer (N x K)")


def _block(view: View, group: Group, frame: pd.DataFrame, planned: set[Key]) -> KernelBlock:
    rows: dict[Key, pd.Series] = {
        (r["backend"], r["sparsity"], int(r["M"]), int(r["N"]), int(r["K_model"])): r for _, r in frame.iterrows()
    }
    keys = [*rows, *sorted(planned - set(rows))]
    variants = view.sorted_variants((key[0], key[1]) for key in keys)
    names = {(n, k): row["layer"] for (_, _, _, n, k), row in rows.items() if row["layer"]}
    grid = _Grid.of(group[0], ((key[2], key[3], key[4]) for key in keys), names)
    noise = dict(zip(rows, compare.noisy(frame, compare.limit_of(view.records.profile, "kernel")), strict=True))

    latency, algorithms = [], []
    for line, points in grid.lines.items():
        for variant in variants:
            cells = [rows.get((*variant, *points[column])) for column in grid.columns]
            noisy = [noise.get((*variant, *points[column]), False) for column in grid.columns]
            lead = [line, compare.label(*variant)]
            latency.append([*lead, *(_latency(view, group, row, n) for row, n in zip(cells, noisy, strict=True))])
            algorithms.append([*lead, *(_algorithm(row) for row in cells)])
    return KernelBlock(
        title=title(*group),
        emulation=group[2],
        figure=figure_name("kernel", *group),
        matrix=_matrix(view, grid, variants, rows),
        latency=Table([grid.head, "latency, µs", *grid.columns], once(latency), left=2),
        shares=any("%" in cell for line in latency for cell in line[2:]),
        ratios=_ratios(view, group, grid),
        epilogue=_epilogue(grid, variants, rows, noise),
        algorithms=Table([grid.head, "best algorithm", *grid.columns], once(algorithms), left=2),
        not_run=len(planned - set(rows)),
        facts=_facts(view, frame),
    )


def _matrix(view: View, grid: _Grid, variants: list[tuple[str, str]], rows: Mapping[Key, pd.Series]) -> Table:
    """Checks and fates of all points of a variant."""
    head = ["variant", "task", "exact", "within bound", "check failed", "not checked", "cell ✗", "cell ⊘", "not run",
            "points checked"]  # fmt: skip
    lines = []
    for variant in variants:
        points = [rows.get((*variant, *point)) for line in grid.lines.values() for point in line.values()]
        seen = [row for row in points if row is not None and (row["status"] == "ok" or row["verified"] == "failed")]
        verified = [str(row["verified"]) for row in seen]
        marks = [state(row) for row in points]
        counts = [integer(verified.count(kind)) for kind in ("exact", "within_bound", "failed", "not_checked")]
        fates = [integer(marks.count(mark)) for mark in (FAILED, SKIPPED, NOT_RUN)]
        whole = f"{marks.count(CHECKED)} of {len(marks)}"
        lines.append([compare.label(*variant), TASKS[view.kernel_task(variant[1])], *counts, *fates, whole])
    return Table(head, lines, left=2)


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


def _latency(view: View, group: Group, row: pd.Series | None, noisy: bool) -> str:
    """`77.4 (71 %) †`: in brackets the attainable time over this one, where it is known."""
    if row is None or row["status"] != "ok":
        return state(row)
    best = None
    if not group[2]:
        pattern = Sparsity.parse(row["sparsity"]) if row["sparsity"] else None
        size = (int(row["M"]), int(row["N"]), int(row["K_model"]))
        best = view.attainable.microseconds(group[1], pattern, *size, str(row["path"]))
    share = "" if best is None else f" ({percent(best / row['lat_us_1'], 2)})"
    return f"{significant(row['lat_us_1'], 4)}{share}{' ' + NOISY if noisy else ''}"


def _algorithm(row: pd.Series | None) -> str:
    if row is None or row["status"] != "ok":
        return state(row)
    return f"{code(row['algorithm'] or int(row['alg_id_1']))} of {integer(row['alg_count'])}"


def _ratios(view: View, group: Group, grid: _Grid) -> Table:
    frame = view.ratios("kernel", *group)
    cells = {(r["backend"], r["sparsity"], r["m"], r["n"], r["k"]): ratio_cell(r) for _, r in frame.iterrows()}
    base = str(frame["baseline"].iloc[0]) if len(frame) else "dense"
    variants = view.sorted_variants(zip(frame["backend"], frame["sparsity"], strict=True))
    head = [grid.head, f"against {base}", "bound on a GPU" if group[2] else "bound"]
    attainable = not group[2] and any(dtype == group[1] for dtype, _ in view.attainable.tensor)
    rows = []
    for line, points in grid.lines.items():
        for backend, sparsity in variants:
            bounds = [fixed(compare.bound(sparsity), 3) if sparsity else ""]
            if attainable:
                bounds.append(_attainable(view, group[1], sparsity, points.values()))
            found = [cells.get((backend, sparsity, *points[column]), "") for column in grid.columns]
            rows.append([line, compare.label(backend, sparsity), *bounds, *found])
    return Table([*head, *(["attainable"] if attainable else []), *grid.columns], once(rows), left=2)


def _epilogue(
    grid: _Grid, variants: list[tuple[str, str]], rows: Mapping[Key, pd.Series], noise: Mapping[Key, bool]
) -> Table:
    def cell(key: Key) -> str:
        row = rows.get(key)
        if row is None or row["status"] != "ok" or not row["over_two_kernels"] > 0:
            return ""
        marks = {"noisy": noise.get(key, False), "host_bound": False, "checked": row["verified"] in compare.CHECKED}
        return ratio_cell(pd.Series(compare.paired(row, "over_two_kernels") | marks))

    lines = []
    for line, points in grid.lines.items():
        for variant in variants:
            cells = [cell((*variant, *points[column])) for column in grid.columns]
            if any(cells):
                lines.append([line, compare.label(*variant), *cells])
    return Table([grid.head, "against two kernels", *grid.columns], once(lines), left=2)


def _attainable(view: View, dtype: str, sparsity: str, points: Iterable[Point]) -> str:
    """The attainable bound at the points of a line: one figure, or a range where padding of K' differs."""
    if not sparsity:
        return ""
    pattern = Sparsity.parse(sparsity)
    bounds = [view.attainable.speedup(dtype, pattern, [(n, k)]) for _, n, k in points]
    shown = sorted({fixed(bound, 3) for bound in bounds if bound is not None})
    return " to ".join(dict.fromkeys((shown[0], shown[-1]))) if shown else ""


def _shape(names: Mapping[tuple[int, int], str], n: int, k: int) -> str:
    name = names.get((n, k), "")
    return f"{name} ({n} x {k})" if name else f"{n} x {k}"
