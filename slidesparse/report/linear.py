"""Section on task 9: whole linear layers, ours against the best dense ones and against the reference's pipeline."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pandas as pd

from slidesparse.pattern import Sparsity
from slidesparse.plan import linear_cells
from slidesparse.report import compare
from slidesparse.report.collect import EMULATION
from slidesparse.report.markdown import Table, code, fixed, known, once, significant, text
from slidesparse.report.throughput import facts, without_empty
from slidesparse.report.view import (
    View,
    figure_name,
    interval,
    ratio_cell,
    state,
    stopping_text,
    title,
)

Group = tuple[str, str, bool]
"""Model, type, emulation."""
Key = tuple[str, str, int]
"""backend, sparsity, M."""
_LAYER = re.compile(r"(\d+) ?x ?(\d+)")
"""Shapes in the column `layers`: `qkv 3840x2560; o 2560x2560`."""


@dataclass(frozen=True)
class LinearBlock:
    """One model and type."""

    title: str
    emulation: bool
    figure: str
    """Its file name, drawn where there are ratios."""
    outcome: str
    """Where sparse wins, where it loses, and where neither is shown, in words; empty without checked ratios."""
    over_reference: str
    """The same against the reference's pipeline; empty where that was not measured."""
    results: Table
    steps: Table
    layers: str
    facts: list[str]
    not_run: int


@dataclass(frozen=True)
class LinearSection:
    """`missing`: nothing was recorded. `wanted`: the profile has the task."""

    missing: bool
    wanted: bool
    configuration: list[str]
    blocks: list[LinearBlock]
    files: list[str]


def linear_section(view: View) -> LinearSection:
    """Everything recorded on whole layers."""
    frame, profile = view.records.linear, view.records.profile
    stopping = compare.stopping_of(profile, compare.LINEAR)
    planned = [] if profile is None else [
        (c.model, c.dtype.value, c.variant.backend, str(c.variant.sparsity or ""), c.m) for c in linear_cells(profile)
    ]  # fmt: skip
    blocks = []
    for model, dtype, emulation, rows in view.groups(frame):
        wanted = {c[2:] for c in planned if c[:2] == (model, dtype) and c[2].startswith(EMULATION) == emulation}
        blocks.append(_block(view, (model, dtype, emulation), rows, wanted))
    configuration = [] if stopping is None else [stopping_text("Each cell", stopping)]
    files = [] if frame.empty else list(dict.fromkeys(frame["file"]))
    return LinearSection(frame.empty, bool(planned) or profile is None, configuration, blocks, files)


def outcome(view: View, ratios: pd.DataFrame, emulation: bool) -> str:
    """Where sparse wins, where it loses and where that cannot be told: `2:6, 2:8 (M=64, 512)`, from checked ratios."""
    good = ratios[compare.supported(ratios)]
    if good.empty:
        return ""
    wins, loses = ("less time than dense", "more time") if emulation else ("sparse wins", "sparse loses")
    words = {"faster": wins, "slower": loses, "no difference shown": "cannot be told"}
    parts = []
    many, every = good["backend"].nunique() > 1, sorted({int(m) for m in ratios["m"]})
    for verdict, phrase in words.items():
        named: dict[str, list[str]] = {}
        for backend, sparsity in view.sorted_variants(zip(good["backend"], good["sparsity"], strict=True)):
            variant = good[(good["backend"] == backend) & (good["sparsity"] == sparsity)]
            ms = sorted(int(m) for m in variant.loc[variant["verdict"] == verdict, "m"])
            where = "every M" if ms == every and len(ms) > 1 else f"M={', '.join(map(str, ms))}"
            if ms:
                named.setdefault(where, []).append(compare.label(backend, sparsity) if many else sparsity)
        said = [f"{', '.join(names)} ({where})" for where, names in named.items()]
        parts.append(f"**{phrase}**: {', '.join(said) or 'nowhere'}")
    left = len(ratios) - len(good)
    return "; ".join(parts) + (f"; not checked or without interval: {left} ratios" if left else "") + "."


def _block(view: View, group: Group, frame: pd.DataFrame, planned: set[Key]) -> LinearBlock:
    _, dtype, emulation = group
    rows: dict[Key, pd.Series] = {(r["backend"], r["sparsity"], int(r["M"])): r for _, r in frame.iterrows()}
    ratios = view.ratios(compare.LINEAR, *group)
    found = {(r["backend"], r["sparsity"], int(r["m"])): r for _, r in ratios.iterrows()}
    order = view.sorted_variants((b, s) for b, s, _ in {*planned, *rows})
    done = frame[frame["status"] == "ok"]
    return LinearBlock(
        title=title(*group),
        emulation=emulation,
        figure=figure_name(compare.LINEAR, *group),
        outcome=outcome(view, ratios, emulation),
        over_reference=over_reference(frame),
        results=_results(view, dtype, emulation, order, {**dict.fromkeys(planned), **rows}, found),
        steps=_steps(order, rows),
        layers=", ".join(code(value) for value in dict.fromkeys(done["layers"]) if value),
        facts=_facts(view, done),
        not_run=len(planned - set(rows)),
    )


def _results(
    view: View,
    dtype: str,
    emulation: bool,
    order: list[tuple[str, str]],
    rows: dict[Key, pd.Series | None],
    ratios: dict[Key, pd.Series],
) -> Table:
    """One line for each M and pattern."""
    attainable = not emulation and (dtype, True) in view.attainable.tensor
    head = ["M", "variant", "check", "ours, µs", "dense, µs", "ratio" if emulation else "speed-up",
            "bound on a GPU" if emulation else "bound", *(["attainable"] if attainable else []),
            "over the reference's pipeline"]  # fmt: skip
    lines: list[list[str]] = []
    for m in sorted({key[2] for key in rows}):
        for backend, sparsity in order:
            if (backend, sparsity, m) not in rows:
                continue
            row, ratio = rows[backend, sparsity, m], ratios.get((backend, sparsity, m))
            lead = [f"{m:,}", compare.label(backend, sparsity), state(row)]
            if row is None or row["status"] != "ok":
                lines.append([*lead, *[""] * (len(head) - len(lead))])
                continue
            bounds = [fixed(compare.bound(sparsity), 3)]
            if attainable:
                bound = view.attainable.speedup(dtype, Sparsity.parse(sparsity), shapes(row))
                bounds.append("" if bound is None else fixed(bound, 3))
            times = [significant(row[name], 4) for name in ("lat_us", "dense_us")]
            lines.append([*lead, *times, "" if ratio is None else ratio_cell(ratio), *bounds, _over(row)])
    if not any(line[-1] for line in lines):
        head, lines = head[:-1], [line[:-1] for line in lines]
    return Table(head, once(lines), left=3)


def shapes(row: pd.Series) -> list[tuple[int, int]]:
    """(N, K) of the layers that a row timed."""
    return [(int(n), int(k)) for n, k in _LAYER.findall(str(row["layers"]))]


def _over(row: pd.Series) -> str:
    return interval(compare.paired(row, "over_reference")) if known(row["over_reference"]) else ""


def over_reference(frame: pd.DataFrame) -> str:
    """Counts and extremes of the ratio reference pipeline / ours, from checked rows."""
    good = frame[compare.checked(frame) & (frame["over_reference"] > 0)].sort_values("over_reference", kind="stable")
    if good.empty:
        return ""
    verdicts = [compare.verdict(low, high) for low, high in zip(
        good["over_reference_low"], good["over_reference_high"], strict=True
    )]  # fmt: skip
    low, high = (
        f"{interval(compare.paired(row, 'over_reference'))} ({row['sparsity']}, M={int(row['M'])})"
        for row in (good.iloc[0], good.iloc[-1])
    )
    return (
        f"Ours takes less time than the reference's pipeline at {verdicts.count('faster')} of {len(good)} points, more "
        f"at {verdicts.count('slower')}; reference over ours: from {low} to {high}."
    )


def _steps(order: list[tuple[str, str]], rows: dict[Key, pd.Series]) -> Table:
    """Each step alone, for all layers; together they may take longer than the whole, which overlaps or fuses them."""
    names = ["quantise_us", "gemm_us", "dequantise_us"]
    lines = []
    for m in sorted({key[2] for key in rows}):
        for backend, sparsity in order:
            row = rows.get((backend, sparsity, m))
            if row is not None and row["status"] == "ok" and any(known(row[name]) for name in names):
                cells = [significant(row[name], 4) for name in (*names, "lat_us", "reference_us")]
                lines.append([f"{m:,}", compare.label(backend, sparsity), *cells])
    head = [
        "M",
        "variant",
        "quantise + lift, µs",
        "GEMM, µs",
        "dequantise, µs",
        "whole, µs",
        "reference's pipeline, µs",
    ]
    return Table(*without_empty(head, once(lines)), left=2)


def _facts(view: View, done: pd.DataFrame) -> list[str]:
    """Paths of all three sides, and an example of each kind of check."""
    lines = facts(view, done.assign(check=""), most=4)
    for column, words in (("dense_path", "Dense side"), ("reference_path", "Reference's pipeline")):
        values = [code(value) for value in dict.fromkeys(done[column]) if value]
        more = f" and {len(values) - 1} more, each in its row" if len(values) > 1 else ""
        lines += [f"{words}: {values[0]}{more}"] if values else []
    weights = [text(value) for value in dict.fromkeys(done["data"]) if value]
    lines += [f"Weights: {', '.join(weights)}"] if weights else []
    for name, part in done[done["verified"].isin(compare.CHECKED)].groupby("verified", sort=True):
        lines.append(f"Check {code(name)}, for example: {text(part['check'].iloc[0])}")
    return lines
