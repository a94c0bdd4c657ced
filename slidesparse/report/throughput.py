"""Prefill and decode sections: configuration, pass matrix, performance, where each variant stands, every cell."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.plan import Phase
from slidesparse.report import compare, standing
from slidesparse.report.collect import EMULATION
from slidesparse.report.markdown import Table, code, fixed, integer, known, percent, seconds, significant, size, text
from slidesparse.report.view import (
    CHECKED,
    HOST_BOUND,
    NOISY,
    NOT_RUN,
    View,
    figure_name,
    ratio_cell,
    state,
    stopping_text,
    title,
)


@dataclass(frozen=True)
class PhaseBlock:
    """One model and type in one phase."""

    title: str
    emulation: bool
    figure: str
    """Its file name, drawn where there are ratios."""
    matrix: Table
    performance: Table
    over_stock: Table
    """Paired ratios over the engine's own kernels."""
    graphs: Table
    """GPU time of a decode step's CUDA graph, and its paired ratio over the engine's own kernels."""
    ratios: Table
    """Over our dense."""
    pairing: str
    """Whether the variants' steps were interleaved."""
    standing: list[str]
    """A sentence for each variant."""
    details: Table
    facts: list[str]
    """Code paths that ran, and how they were checked."""
    not_run: int


@dataclass(frozen=True)
class PhaseSection:
    """A whole phase. `missing`: nothing was recorded at all."""

    phase: Phase
    title: str
    missing: bool
    configuration: list[str]
    cells: Table
    blocks: list[PhaseBlock]
    files: list[str]


def phase_section(view: View, phase: Phase) -> PhaseSection:
    """Everything recorded on a phase."""
    frame = view.records.throughput[phase]
    blocks = []
    for model, dtype, emulation, rows in view.groups(frame):
        blocks.append(_block(view, phase, (model, dtype, emulation), rows))
    files = [] if frame.empty else list(dict.fromkeys(frame["file"]))
    cells = _cell_table(phase, frame)
    return PhaseSection(
        phase, phase.capitalize(), frame.empty, _configuration(view, phase, frame), cells, blocks, files
    )


def _configuration(view: View, phase: Phase, frame: pd.DataFrame) -> list[str]:
    lines = []
    profile = view.records.profile
    if profile is not None:
        section = profile.prefill if phase == "prefill" else profile.decode
        lines.append(stopping_text("Each cell", section.stopping))
    if not frame.empty:
        engines = [code(name) for name in dict.fromkeys(frame["engine"]) if name]
        if engines:
            lines.append(f"Engine: {', '.join(engines)}.")
    return lines


def _cell_table(phase: Phase, frame: pd.DataFrame) -> Table:
    """The definition of the cells, once for each M."""
    names = ["m", "prompt_len", "max_num_seqs", "num_prompts", f"N_{phase}"]
    head = ["M", "prompt length", "sequences a step", "prompts a pass", "steps a pass"]
    if phase == "decode":
        head[-1] = "output tokens a prompt"
    if frame.empty:
        return Table(head, [], left=0)
    cells = frame[names].drop_duplicates().sort_values("m", kind="stable")
    return Table(head, [[integer(value) for value in row] for row in cells.itertuples(index=False)], left=0)


Group = tuple[str, str, bool]
"""Model, type, emulation."""


def _block(view: View, phase: Phase, group: Group, frame: pd.DataFrame) -> PhaseBlock:
    model, dtype, emulation = group
    cells_of = (cell for cell in view.planned(phase) if cell[:2] == (model, dtype))
    planned = {cell[2:] for cell in cells_of if cell[2].startswith(EMULATION) == emulation}
    rows = {(r["backend"], r["sparsity"], int(r["m"])): r for _, r in frame.iterrows()}
    variants = view.sorted_variants((b, s) for b, s, _ in {*planned, *rows})
    ms = sorted({m for _, _, m in {*planned, *rows}})
    limit = compare.limit_of(view.records.profile, phase)
    noise = dict(zip(rows, compare.noisy(frame, limit), strict=True))
    columns = [f"M={m}" for m in ms]

    matrix, performance = [], []
    for backend, sparsity in variants:
        name = compare.label(backend, sparsity)
        marks = [state(rows.get((backend, sparsity, m))) for m in ms]
        wanted = [m for m in ms if (backend, sparsity, m) in planned or (backend, sparsity, m) in rows]
        matrix.append([name, *marks, f"{marks.count(CHECKED)} of {len(wanted)}"])
        cells = []
        for m, mark in zip(ms, marks, strict=True):
            row = rows.get((backend, sparsity, m))
            good = row is not None and row["status"] == "ok"
            cells.append(_rate(row, noise[(backend, sparsity, m)]) if good and row is not None else mark)
        performance.append([name, *cells])
    not_run = sum(row.count(NOT_RUN) for row in matrix)
    stock, dense = view.stock_ratios(phase, *group), view.ratios(phase, *group)
    return PhaseBlock(
        title=title(model, dtype, emulation),
        emulation=emulation,
        figure=figure_name(phase, model, dtype, emulation),
        matrix=Table(["variant", *columns, "checked"], matrix),
        performance=Table(["tokens/s", *columns], performance),
        over_stock=_ratios(view, stock, ms),
        graphs=_graphs(rows, variants, ms),
        ratios=_ratios(view, dense, ms, "bound on a GPU" if emulation else "bound"),
        pairing=_pairing(any(standing.stock_itself(b, s) for b, s in variants), stock, dense),
        standing=standing.standing(view, stock, dense, emulation),
        details=_details(view, frame),
        facts=facts(view, frame),
        not_run=not_run,
    )


def _rate(row: pd.Series, noisy: bool) -> str:
    half = f" ± {percent(row['ci_rel'], 2)}" if known(row["ci_rel"]) else ""
    marks = (NOISY if noisy else "") + (HOST_BOUND if row["host_bound"] else "")
    return f"{significant(row['tokens_per_s'], 4)}{half}{' ' + marks if marks else ''}"


def _ratios(view: View, frame: pd.DataFrame, ms: list[int], limit: str = "") -> Table:
    """`limit`: heading of the column of L/(L-2), which only binds what differs from its base in the products alone."""
    base = str(frame["baseline"].iloc[0]) if len(frame) else "dense"
    rows = []
    for backend, sparsity in view.sorted_variants(zip(frame["backend"], frame["sparsity"], strict=True)):
        part = frame[(frame["backend"] == backend) & (frame["sparsity"] == sparsity)]
        found = {int(row["m"]): ratio_cell(row) for _, row in part.iterrows()}
        bounds = [fixed(compare.bound(sparsity), 3) if sparsity else ""] if limit else []
        rows.append([compare.label(backend, sparsity), *bounds, *(found.get(m, "") for m in ms)])
    return Table([f"against {base}", *([limit] if limit else []), *(f"M={m}" for m in ms)], rows)


def _graphs(rows: dict[tuple[str, str, int], pd.Series], variants: list[tuple[str, str]], ms: list[int]) -> Table:
    """Empty where no row has it: prefill, engines without graphs."""
    lines = []
    for backend, sparsity in variants:
        found = [rows.get((backend, sparsity, m)) for m in ms]
        cells = [_graph(row) if row is not None and row["status"] == "ok" else "" for row in found]
        if any(cells):
            lines.append([compare.label(backend, sparsity), *cells])
    return Table(["ms of a step's graph", *(f"M={m}" for m in ms)], lines)


def _graph(row: pd.Series) -> str:
    if not known(row.get("graph_ms", -1.0)):
        return ""
    ratio = row["graph_over_stock"]
    interval = f"[{fixed(row['graph_over_stock_low'], 2)}, {fixed(row['graph_over_stock_high'], 2)}]"
    return significant(row["graph_ms"], 4) + (f" ({fixed(ratio, 2)} {interval})" if known(ratio) else "")


def _pairing(has_stock: bool, stock: pd.DataFrame, dense: pd.DataFrame) -> str:
    """What the ratios are of: steps that ran in turns, or measurements one after the other."""
    lines = []
    if has_stock and stock.empty:
        lines.append(
            "No ratio over the engine's own kernels: their steps were not interleaved with those of the others."
        )
    alone = int((~dense["paired"].astype(bool)).sum())
    if len(dense) and alone == len(dense):
        lines.append(
            "**Not interleaved**: the variants were measured one after the other, so the ratios to dense are those of "
            "two independent medians of tokens/s; drift between them is in the ratio."
        )
    elif alone:
        lines.append(f"{alone} of {len(dense)} ratios to dense are of two independent medians: not interleaved.")
    if len(stock) or len(dense) > alone:
        lines.append(
            "Paired ratios: the variants' steps ran in turns, in random order; a ratio is the median over the rounds."
        )
    return " ".join(lines)


def _details(view: View, frame: pd.DataFrame) -> Table:
    head = ["variant", "M", "check", "tuning look-ups", "passes", "stop", "step, ms", "output tokens/s",
            "steady tokens/s", "start-up, s", "compile, s", "measuring, s", "peak memory", "clock, MHz", "power, W",
            "°C", "throttle"]  # fmt: skip
    rows = []
    for backend, sparsity in view.sorted_variants(zip(frame["backend"], frame["sparsity"], strict=True)):
        part = frame[(frame["backend"] == backend) & (frame["sparsity"] == sparsity) & (frame["status"] == "ok")]
        for _, row in part.sort_values("m", kind="stable").iterrows():
            rows.append([
                compare.label(backend, sparsity), integer(row["m"]), state(row), text(row["tuning"]),
                integer(row["passes"]), text(row["stop"]), significant(row["step_ms"], 4),
                significant(row["output_tokens_per_s"], 4), significant(row["steady_tokens_per_s"], 4),
                seconds(row["startup_s"]), seconds(row["compile_s"]), seconds(row["measure_s"]),
                size(row["peak_rss_mib"] * 2**20), integer(row["clock_mhz"]), fixed(row["power_w"], 1),
                fixed(row["temperature_c"], 1), text(row["throttle"]),
            ])  # fmt: skip
    return Table(*without_empty(head, rows), left=4)


def facts(view: View, frame: pd.DataFrame, most: int = 12) -> list[str]:
    """Each code path and each check of measured rows once, with the variants that it is true of.

    Where there are more than `most` of a kind, one example and their number: every row has its own in the files.
    """
    lines = []
    done = frame[frame["status"] == "ok"]
    for column, words in (("path", "Code path that ran"), ("check", "Check")):
        said = done[done[column] != ""]
        count = said[column].nunique()
        if count > most:
            example = code(said[column].iloc[0]) if column == "path" else text(said[column].iloc[0])
            lines.append(
                f"{words}: {integer(count)} different ones, each in its row of the result files; e.g. {example}"
            )
            continue
        for value, rows in said.groupby(column, sort=False):
            variants = view.sorted_variants(zip(rows["backend"], rows["sparsity"], strict=True))
            shown = code(value) if column == "path" else text(value)
            lines.append(f"{words}, {', '.join(compare.label(*v) for v in variants)}: {shown}")
    return sorted(lines, key=lambda line: not line.startswith("Code"))


def without_empty(head: list[str], rows: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Leave out number columns that no row has a value for (power on a machine that does not tell)."""
    keep = [c for c in range(len(head)) if c < 4 or any(row[c] not in ("", "–") for row in rows)]
    return [head[c] for c in keep], [[row[c] for c in keep] for row in rows]
