"""What the records support, sentence by sentence. A statement is made only from checked ratios with an interval."""

from __future__ import annotations

import pandas as pd

from slidesparse.report import compare
from slidesparse.report.collect import PHASES
from slidesparse.report.comparison import Published
from slidesparse.report.markdown import fixed
from slidesparse.report.view import View

KINDS = (*PHASES, "kernel")


def headline(view: View) -> list[str]:
    """One line for each measurement, model and type: the best pattern, and how many cells win or lose."""
    lines = []
    for (kind, model, dtype), part in _supported(view):
        best = part.loc[part["ratio"].idxmax()]
        lines.append(
            f"{str(kind).capitalize()}, {model} {dtype}: {_counts(part, view)}; largest {view.ratio_name} "
            f"{_ratio(best)} ({compare.label(best['backend'], best['sparsity'])}, {_place(best)})."
        )
    return lines


def conclusions(view: View, published: Published) -> list[str]:
    """All statements, in the order: each pattern, limits of what was measured, published figures."""
    lines = []
    if view.emulation:
        lines.append(
            "**What sparsity buys on sparse tensor cores is not answered by this machine**: every number here was "
            "measured on CPU emulation. The time ratios say that the pipeline works, not that hardware is faster or slower."
        )
    for (kind, model, dtype), part in _supported(view):
        for backend, sparsity in view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True)):
            rows = part[(part["backend"] == backend) & (part["sparsity"] == sparsity)]
            lines.append(
                _statement(view, f"{str(kind).capitalize()}, {model} {dtype}, {compare.label(backend, sparsity)}", rows)
            )
    lines += _limits(view)
    if published.same and published.summary:
        lines.append(_published(published))
    elif not view.emulation:
        lines.append("No figures are published for this GPU: the comparison is side by side only.")
    if not any(True for _ in _supported(view)):
        lines.append("No checked ratio of sparse to dense was recorded, so nothing can be said about sparsity here.")
    return lines


def _supported(view: View) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    frame = view.speedups
    good = frame[frame["checked"].astype(bool) & (frame["verdict"] != "no interval") & (frame["sparsity"] != "")]
    groups = {
        (str(a), str(b), str(c)): part for (a, b, c), part in good.groupby(["kind", "model", "dtype"], sort=False)
    }
    order = [(k, m, d) for m in view.models(good) for d in view.dtypes(good) for k in KINDS]
    return [(key, groups[key]) for key in sorted(groups, key=order.index)]


def _statement(view: View, subject: str, rows: pd.DataFrame) -> str:
    low, high = rows.loc[rows["ratio"].idxmin()], rows.loc[rows["ratio"].idxmax()]
    bound = float(rows["bound"].iloc[0])
    line = f"{subject}: {_counts(rows, view)}; {view.ratio_name} from {_ratio(low)} ({_place(low)}) to {_ratio(high)} ({_place(high)})"
    if not view.emulation:
        line += f", bound {fixed(bound, 3)}"
        over = rows[rows["low"] > bound]
        if len(over):
            line += (
                f"; **{len(over)} above the bound**, which sparse hardware cannot explain: look at the dense side first"
            )
        if (rows["verdict"] == "slower").all():
            line += "; **sparse loses at every size measured**"
    return line + "."


def _counts(rows: pd.DataFrame, view: View) -> str:
    count = rows["verdict"].value_counts()
    faster, slower = ("takes less time than dense", "more time") if view.emulation else ("faster than dense", "slower")
    total = len(rows)
    return (
        f"{faster} at {count.get('faster', 0)} of {total}, {slower} at {count.get('slower', 0)}, "
        f"no difference shown at {count.get('no difference shown', 0)}"
    )


def _ratio(row: pd.Series) -> str:
    return f"{fixed(row['ratio'], 2)} [{fixed(row['low'], 2)}, {fixed(row['high'], 2)}]"


def _place(row: pd.Series) -> str:
    return f"M={row['m']}" + (f", {row['layer']}" if row["layer"] else "")


def _limits(view: View) -> list[str]:
    frame = view.speedups
    lines = []
    unchecked = int((~frame["checked"].astype(bool)).sum())
    if unchecked:
        lines.append(
            f"{unchecked} of {len(frame)} ratios rest on rows that were not checked; no statement above uses them."
        )
    if int(frame["noisy"].sum()):
        lines.append(
            f"{int(frame['noisy'].sum())} of {len(frame)} ratios have a side that is noisier than the profile allows; "
            "their intervals are wide accordingly."
        )
    if int(frame["host_bound"].sum()):
        lines.append(f"{int(frame['host_bound'].sum())} ratios are host-bound: they measure dispatch, not the product.")
    frames = [f for f in (*view.records.throughput.values(), view.records.kernel) if not f.empty]
    failed = sum(int((f["status"] == "failed").sum()) for f in frames)
    skipped = sum(int((f["status"] == "skipped").sum()) for f in frames)
    throttled = sum(int((f["throttle"] != "").sum()) for f in frames)
    if failed or skipped:
        lines.append(
            f"{failed} measured cells failed and {skipped} were skipped; they are listed with their reasons above."
        )
    if throttled:
        lines.append(f"{throttled} rows were measured while the GPU was throttled.")
    return lines


def _published(published: Published) -> str:
    names = ("reproduced", "higher", "lower", "not measured")
    counts = [sum(int(row[3 + i].replace(",", "")) for row in published.summary.rows) for i in range(len(names))]
    total = sum(int(row[-1].replace(",", "")) for row in published.summary.rows)
    parts = [f"{count} {name}" for name, count in zip(names, counts, strict=True)]
    return f"Of {total} speed-ups published for this GPU ({published.same}): {', '.join(parts)}."
