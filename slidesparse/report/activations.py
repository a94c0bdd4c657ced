"""Activation kernels beside memory: each against a copy of as many bytes."""

from __future__ import annotations

import pandas as pd

from slidesparse.report import compare
from slidesparse.report.attainable import Attainable
from slidesparse.report.markdown import Table, known, once, significant
from slidesparse.report.view import View

OPERATIONS = {
    "quantise": "quantise",
    "quantise_lift": "quantise + lift",
    "norm_quantise": "norm + quantise",
    "norm_quantise_lift": "norm + quantise + lift",
    "add_norm_quantise": "add + norm + quantise",
    "add_norm_quantise_lift": "add + norm + quantise + lift",
    "gate_norm_quantise": "gate + norm + quantise",
    "gate_norm_quantise_lift": "gate + norm + quantise + lift",
    "dequantise_bias": "dequantise + bias",
}


def activation_table(view: View, frame: pd.DataFrame) -> Table:
    """Winners of tuning: µs, and in brackets the share of a copy of the same bytes that ran in the same rounds, then
    that of the copy bandwidth of task 10 (large buffers). Empty where no copy was timed (CPU, older records)."""
    if "copy_us" not in frame:
        return Table([], [])
    done = frame[frame["operation"].isin(OPERATIONS) & frame["winner"] & (frame["status"] == "ok")]
    done = done[done["copy_us"] > 0]
    ms = sorted(set(done["M"].astype(int)))
    large = Attainable.of(view.records.calibration).copy
    rows = []
    for operation, name in OPERATIONS.items():
        part = done[done["operation"] == operation]
        for backend, sparsity in view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True)):
            cells = part[(part["backend"] == backend) & (part["sparsity"] == sparsity)]
            for n, k in sorted(set(zip(cells["N"].astype(int), cells["K"].astype(int), strict=True))):
                at = {int(row["M"]): row for _, row in cells[(cells["N"] == n) & (cells["K"] == k)].iterrows()}
                figures = [_figure(at[m], large) if m in at else "" for m in ms]
                rows.append([name, compare.label(backend, sparsity), f"K={k}" if k else f"N={n}", *figures])
    return Table(["kernel", "variant", "size", *(f"M={m:,}" for m in ms)], once(rows), left=3)


def _figure(row: pd.Series, large: float | None) -> str:
    seconds, moved = float(row["lat_us"]) * 1e-6, float(row["bytes_moved"])
    shares = [float(row["copy_us"]) / float(row["lat_us"])]
    if large is not None and known(moved):
        shares.append(moved / seconds / (large * 1e9))
    return f"{significant(row['lat_us'], 3)} ({', '.join(f'{share:.0%}' for share in shares)})"
