"""What the records support. A statement is made only from checked ratios of sparse to dense with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.report import compare
from slidesparse.report.collect import PHASES
from slidesparse.report.comparison import Published
from slidesparse.report.markdown import Table, fixed, integer
from slidesparse.report.view import HOST_BOUND, NOISY, View, interval, ratio_name, title

KINDS = (*PHASES, "kernel")


@dataclass(frozen=True)
class Conclusions:
    """Sentences, and the counts that they rest on."""

    statements: list[str]
    table: Table
    limits: list[str]


def headline(view: View) -> list[str]:
    """One line for each measurement, model and type: how many cells win or lose, and the extremes."""
    lines = []
    for (kind, model, dtype, emulation), part in _supported(view):
        low, high = (f"{_shown(row)} ({_name(row)}, {_place(row)})" for row in _extremes(part))
        lines.append(
            f"{kind.capitalize()}, {title(model, dtype, emulation)}: {_counts(part, emulation)}; "
            f"{ratio_name(emulation)} from {low} to {high}."
        )
    return lines


def conclusions(view: View, published: Published) -> Conclusions:
    """Generated from data: nothing is said of what was not measured and checked."""
    supported = _supported(view)
    statements = []
    if view.emulation:
        statements.append(
            "**What sparsity buys on sparse tensor cores is not answered by this machine**: every number here was "
            "measured on CPU emulation. The time ratios show that the pipeline works, not that any hardware is "
            "faster or slower with sparsity."
        )
    elif view.records.partly_emulation:
        statements.append("Rows marked *emulation* ran on the CPU; they say nothing about this machine's GPU.")
    if not supported:
        statements.append("No checked ratio of sparse to dense was recorded: nothing can be said about sparsity here.")
    for (kind, model, dtype, emulation), part in supported:
        statements += _statements(view, f"{kind.capitalize()}, {title(model, dtype, emulation)}", part, emulation)
    if published.same and published.summary:
        statements.append(_published(published))
    elif not published.same and not view.emulation:
        statements.append("No figures are published for this GPU: the comparison is side by side only.")
    return Conclusions(statements, _table(view, supported), _limits(view))


Group = tuple[str, str, str, bool]
"""Kind, model, type, emulation."""


def _supported(view: View) -> list[tuple[Group, pd.DataFrame]]:
    frame = view.speedups
    good = frame[frame["checked"].astype(bool) & (frame["verdict"] != "no interval") & (frame["sparsity"] != "")]
    return [
        ((kind, model, dtype, emulation), part)
        for model, dtype, emulation, rows in view.groups(good)
        for kind in KINDS
        if not (part := rows[rows["kind"] == kind]).empty
    ]


def _by_variant(view: View, part: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    variants = view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True))
    return [(b, s, part[(part["backend"] == b) & (part["sparsity"] == s)]) for b, s in variants]


def _statements(view: View, subject: str, part: pd.DataFrame, emulation: bool) -> list[str]:
    """Which patterns win everywhere, lose everywhere, or neither; and ratios that the hardware cannot explain."""
    wins: list[str] = []
    losses: list[str] = []
    mixed: list[str] = []
    over: list[str] = []
    for backend, sparsity, rows in _by_variant(view, part):
        name = compare.label(backend, sparsity)
        verdicts = set(rows["verdict"])
        (wins if verdicts == {"faster"} else losses if verdicts == {"slower"} else mixed).append(name)
        above = int((rows["low"] > rows["bound"]).sum())
        if above and not emulation:
            over.append(f"{name} ({above} of {len(rows)})")
    if emulation:
        pairs = [
            ("less time than dense at every size", wins),
            ("more time at every size", losses),
            ("depends on the size, or no difference shown", mixed),
        ]
    else:
        pairs = [
            ("faster than dense at every size measured", wins),
            ("**sparse loses at every size measured**", losses),
            ("depends on the size, or no difference shown", mixed),
        ]
    lines = [f"{subject}: " + "; ".join(f"{words}: {', '.join(names)}" for words, names in pairs if names) + "."]
    if over:
        lines.append(
            f"{subject}: above the bound, which sparse hardware cannot explain, so look at the dense side first: "
            f"{', '.join(over)}."
        )
    return lines


def _table(view: View, supported: list[tuple[Group, pd.DataFrame]]) -> Table:
    rows = []
    for (kind, model, dtype, emulation), part in supported:
        for backend, sparsity, cells in _by_variant(view, part):
            count = cells["verdict"].value_counts()
            low, high = _extremes(cells)
            bound = fixed(compare.bound(sparsity), 3)
            rows.append([
                f"{kind.capitalize()}, {title(model, dtype, emulation)}", compare.label(backend, sparsity),
                *(integer(int(count.get(name, 0))) for name in ("faster", "no difference shown", "slower")),
                f"{_shown(low)} ({_place(low)})", f"{_shown(high)} ({_place(high)})", bound,
            ])  # fmt: skip
    head = ["measurement", "variant", "faster", "no difference shown", "slower", "lowest", "highest", "bound"]
    if view.emulation:
        head[2:5] = ["less time", "no difference shown", "more time"]
        head[-1] = "bound on a GPU"
    return Table(head, rows, left=2)


def _counts(rows: pd.DataFrame, emulation: bool) -> str:
    count = rows["verdict"].value_counts()
    faster, slower = ("less time than dense", "more time") if emulation else ("faster than dense", "slower")
    return (
        f"{faster} at {count.get('faster', 0)} of {len(rows)} points, {slower} at {count.get('slower', 0)}, "
        f"no difference shown at {count.get('no difference shown', 0)}"
    )


def _extremes(rows: pd.DataFrame) -> tuple[pd.Series, pd.Series]:
    order = rows.sort_values("ratio", kind="stable")
    return order.iloc[0], order.iloc[-1]


def _shown(row: pd.Series) -> str:
    """Ratio and interval, marked where a side of it is noisy or host-bound."""
    marks = (NOISY if row["noisy"] else "") + (HOST_BOUND if row["host_bound"] else "")
    return f"{interval(row)} {marks}".rstrip()


def _name(row: pd.Series) -> str:
    return compare.label(row["backend"], row["sparsity"])


def _place(row: pd.Series) -> str:
    return f"M={row['m']}" + (f", {row['layer']}" if row["layer"] else "")


def _limits(view: View) -> list[str]:
    """What the statements do not rest on, and what weakens them."""
    frame, lines = view.speedups, []
    unchecked = int((~frame["checked"].astype(bool)).sum())
    noisy, host = int(frame["noisy"].sum()), int(frame["host_bound"].sum())
    if unchecked:
        lines.append(f"{unchecked} of {len(frame)} ratios rest on rows that were not checked; no statement uses them.")
    if noisy:
        lines.append(f"{noisy} of {len(frame)} ratios have a side that is noisier than the profile allows.")
    if host:
        lines.append(f"{host} of {len(frame)} ratios are host-bound: they measure dispatch, not the product.")
    frames = [f for f in (*view.records.throughput.values(), view.records.kernel) if not f.empty]
    failed, skipped = (sum(int((f["status"] == name).sum()) for f in frames) for name in ("failed", "skipped"))
    throttled = sum(int((f["throttle"] != "").sum()) for f in frames)
    if failed or skipped:
        lines.append(f"{failed} benchmark cells failed and {skipped} were skipped: section 10 gives the reasons.")
    if throttled:
        lines.append(f"{throttled} rows were measured while the GPU was throttled.")
    return lines


def _published(published: Published) -> str:
    parts = [f"{count} {name}" for name, count in published.outcomes.items()]
    total = sum(published.outcomes.values())
    return f"Of {total} speed-ups published for this GPU ({published.same}): {', '.join(parts)}."
