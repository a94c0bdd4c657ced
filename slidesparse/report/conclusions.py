"""What the records support. A statement is made only from checked ratios of sparse to dense with an interval."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.dtypes import DType
from slidesparse.plan import SQUARE
from slidesparse.report import calibration, compare, linear, steps
from slidesparse.report.comparison import Published
from slidesparse.report.markdown import Table, fixed, integer
from slidesparse.report.standing import STOCK_NAME, span
from slidesparse.report.view import HOST_BOUND, NOISY, View, interval, ratio_name, throttled, title


@dataclass(frozen=True)
class Conclusions:
    """Sentences, and the counts that they rest on."""

    statements: list[str]
    table: Table
    limits: list[str]


def headline(view: View) -> list[str]:
    """One line for each measurement, model and type: how many cells win or lose, and the extremes.

    Square shapes and 16-bit types are left to the conclusions: they are no part of a model that runs here.
    """
    lines = []
    for (kind, model, dtype, emulation), part in _supported(view):
        if model == SQUARE or not DType(dtype).quantised:
            continue
        low, high = (f"{_shown(row)} ({_name(row)}, {_place(row)})" for row in _extremes(part))
        lines.append(
            f"{compare.KIND_NAMES[kind]}, {title(model, dtype, emulation)}: {_counts(part, emulation)}; "
            f"{ratio_name(emulation)} from {low} to {high}."
        )
    for (kind, model, dtype, emulation), part in _over_stock(view):
        spans = [f"{compare.label(b, s)} {span(rows)}" for b, s, rows in _by_variant(view, part)]
        lines.append(
            f"{compare.KIND_NAMES[kind]}, {title(model, dtype, emulation)}, times the rate of {STOCK_NAME}, all M: "
            f"{', '.join(spans)}."
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
        subject = f"{compare.KIND_NAMES[kind]}, {title(model, dtype, emulation)}"
        if kind == compare.LINEAR:
            statements.append(
                f"{subject}, quantisation and dequantisation included: {linear.outcome(view, part, emulation)}"
            )
            statements += _over_bound(view, subject, part, emulation)
            statements += _over_reference(view, subject, part)
        else:
            statements += _statements(view, subject, part, emulation) + _over_bound(view, subject, part, emulation)
    for (kind, model, dtype, emulation), part in _over_stock(view):
        subject = f"{compare.KIND_NAMES[kind]}, {title(model, dtype, emulation)}, against {STOCK_NAME}"
        statements += _statements(view, subject, part, emulation, STOCK_NAME)
    statements += steps.summary(view) + _attainable(view)
    if published.same and published.summary:
        statements.append(_published(published))
    elif not published.same and not view.emulation:
        statements.append("No figures are published for this GPU: the comparison is side by side only.")
    return Conclusions(statements, _table(view, supported), _limits(view))


Group = tuple[str, str, str, bool]
"""Kind, model, type, emulation."""


def _supported(view: View) -> list[tuple[Group, pd.DataFrame]]:
    frame = view.speedups
    good = frame[compare.supported(frame) & (frame["sparsity"] != "")]
    return [
        ((kind, model, dtype, emulation), part)
        for model, dtype, emulation, rows in view.groups(good)
        for kind in compare.KINDS
        if not (part := rows[rows["kind"] == kind]).empty
    ]


def _by_variant(view: View, part: pd.DataFrame) -> list[tuple[str, str, pd.DataFrame]]:
    variants = view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True))
    return [(b, s, part[(part["backend"] == b) & (part["sparsity"] == s)]) for b, s in variants]


def _over_stock(view: View) -> list[tuple[Group, pd.DataFrame]]:
    """Ratios over the engine's own kernels that support a statement, our dense among them."""
    frame = view.over_stock
    good = frame[compare.supported(frame)]
    return [
        ((kind, model, dtype, emulation), part)
        for model, dtype, emulation, rows in view.groups(good)
        for kind in compare.KINDS
        if not (part := rows[rows["kind"] == kind]).empty
    ]


def _statements(view: View, subject: str, part: pd.DataFrame, emulation: bool, other: str = "dense") -> list[str]:
    """Which variants win everywhere, lose everywhere, or neither."""
    wins: list[str] = []
    losses: list[str] = []
    mixed: list[str] = []
    for backend, sparsity, rows in _by_variant(view, part):
        name = compare.label(backend, sparsity)
        verdicts = set(rows["verdict"])
        (wins if verdicts == {"faster"} else losses if verdicts == {"slower"} else mixed).append(name)
    faster, slower = ("less time than", "more time") if emulation else ("faster than", "slower")
    loses = f"{slower} at every size"
    if not emulation:
        loses = "**sparse loses at every size measured**" if other == "dense" else f"**{loses} measured**"
    pairs = [
        (f"{faster} {other} at every size{'' if emulation else ' measured'}", wins),
        (loses, losses),
        ("depends on the size, or no difference shown", mixed),
    ]
    return [f"{subject}: " + "; ".join(f"{words}: {', '.join(names)}" for words, names in pairs if names) + "."]


def _over_bound(view: View, subject: str, part: pd.DataFrame, emulation: bool) -> list[str]:
    """Ratios whose whole interval lies above L/(L-2)."""
    over = []
    for backend, sparsity, rows in _by_variant(view, part):
        above = int((rows["low"] > rows["bound"]).sum())
        if above and not emulation:
            over.append(f"{compare.label(backend, sparsity)} ({above} of {len(rows)})")
    if not over:
        return []
    return [
        f"{subject}: above the bound, which sparse hardware cannot explain, so look at the dense side first: "
        f"{', '.join(over)}."
    ]


def _over_reference(view: View, subject: str, part: pd.DataFrame) -> list[str]:
    """Ours against the reference's pipeline, for the model and type of `part`."""
    first, frame = part.iloc[0], view.records.linear
    same = frame[["model", "dtype", "emulation"]].eq(first[["model", "dtype", "emulation"]]).all(axis=1)
    line = linear.over_reference(frame[same])
    return [f"{subject}: {line}"] if line else []


def _attainable(view: View) -> list[str]:
    """What the machine's own rates leave for each pattern."""
    lines = []
    for dtype, gains in calibration.gains(view).items():
        none = [pattern for pattern, gain in gains.items() if gain <= 1]
        left = f"; nothing is left for {', '.join(none)} there" if none else ""
        lines.append(
            f"Tensor cores of this machine, {dtype}: where arithmetic bounds both sides, 2:4 can be up to "
            f"{fixed(gains['2:4'], 2)} times as fast as dense{left}."
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
                f"{compare.KIND_NAMES[kind]}, {title(model, dtype, emulation)}", compare.label(backend, sparsity),
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
    frames = [f for f in (*view.records.throughput.values(), view.records.linear, view.records.kernel) if not f.empty]
    failed, skipped = (sum(int((f["status"] == name).sum()) for f in frames) for name in ("failed", "skipped"))
    hot = sum(int(throttled(f).sum()) for f in frames)
    if failed or skipped:
        lines.append(f"{failed} benchmark cells failed and {skipped} were skipped: section 13 gives the reasons.")
    if hot:
        lines.append(f"{hot} rows were measured while the GPU was throttled beyond its power cap.")
    return lines


def _published(published: Published) -> str:
    parts = [f"{count} {name}" for name, count in published.outcomes.items()]
    total = sum(published.outcomes.values())
    return f"Of {total} speed-ups published for this GPU ({published.same}): {', '.join(parts)}."
