"""Section on task 10: what this machine's memory and tensor cores can do, and what 2:4 can buy on them at most."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from slidesparse.dtypes import DType
from slidesparse.pattern import Sparsity
from slidesparse.plan import calibrate_cells
from slidesparse.report import compare
from slidesparse.report.attainable import COPY, TENSOR_CORES
from slidesparse.report.markdown import MISSING, Table, code, fixed, integer, significant, text
from slidesparse.report.throughput import without_empty
from slidesparse.report.view import View, interval, measured, state

PATTERNS = ("2:4", "2:6", "2:8", "2:10", "2:12", "2:14", "2:16", "2:inf")


@dataclass(frozen=True)
class CalibrationSection:
    """`rows`: anything recorded, be it a failure. `wanted`: the profile has the task."""

    rows: bool
    wanted: bool
    copy: str
    """Copy bandwidth with its interval; empty if it was not measured."""
    rates: Table
    """By type: dense and sparse rate, without and with loads, and their ratios."""
    patterns: Table
    """What each pattern can attain, by type."""
    details: Table
    not_run: int


def calibration_section(view: View) -> CalibrationSection:
    """Everything recorded on the machine's own rates."""
    frame, profile = view.records.calibration, view.records.profile
    planned = len(calibrate_cells(profile)) if profile else 0
    done = frame[(frame["status"] == "ok") & (frame["rate"] > 0)] if len(frame) else frame
    copies = done[done["quantity"] == COPY] if len(done) else done
    copy = "" if copies.empty else f"{measured(copies.iloc[-1], 'rate')} {text(copies.iloc[-1]['unit'])}"
    return CalibrationSection(
        rows=not frame.empty,
        wanted=planned > 0 or profile is None,
        copy=copy,
        rates=_rates(done),
        patterns=_patterns(gains(view)),
        details=_details(frame),
        not_run=max(0, planned - len(frame)),
    )


def _types(present: Iterable[object]) -> list[str]:
    found = set(present)
    return [dtype.value for dtype in DType if dtype.value in found]


def _rates(done: pd.DataFrame) -> Table:
    head = ["type", "dense", "sparse", "sparse / dense", "dense, with loads", "sparse, with loads",
            "sparse / dense, with loads"]  # fmt: skip
    if done.empty:
        return Table(head, [])
    cores = done[done["quantity"] == TENSOR_CORES]
    rates = {(r["dtype"], bool(r["loads"]), bool(r["sparse"])): r for _, r in cores.iterrows()}
    lines = []
    for dtype in _types(cores["dtype"]):
        cells = []
        for loads in (False, True):
            dense, sparse = rates.get((dtype, loads, False)), rates.get((dtype, loads, True))
            cells += [MISSING if row is None else measured(row, "rate") for row in (dense, sparse)]
            if dense is None or sparse is None:
                cells.append(MISSING)
            else:
                cells.append(interval(compare.ratio_of(sparse, dense, "rate")))
        lines.append([dtype, *cells])
    return Table(head, lines)


def gains(view: View) -> dict[str, dict[str, float]]:
    """Attainable speed-up by type and pattern: (sparse / dense rate, with loads) / expansion, K' without padding."""
    rates = view.attainable.tensor
    return {
        dtype: {p: rates[dtype, True] / rates[dtype, False] / Sparsity.parse(p).expansion for p in PATTERNS}
        for dtype in _types(dtype for dtype, _ in rates)
        if (dtype, False) in rates and (dtype, True) in rates
    }


def _patterns(found: dict[str, dict[str, float]]) -> Table:
    lines = [
        [name, fixed(compare.bound(name), 3), *(fixed(by_pattern[name], 3) for by_pattern in found.values())]
        for name in (PATTERNS if found else ())
    ]
    return Table(["pattern", "bound L/(L-2)", *found], lines)


def _details(frame: pd.DataFrame) -> Table:
    head = ["rate of", "type", "instruction", "check", "with loads", "rate", "loads, GB/s", "samples", "stop",
            "clock, MHz", "power, W", "°C", "throttle"]  # fmt: skip
    lines = []
    for _, row in frame.iterrows():
        what = row["quantity"] if not row["dtype"] else f"{row['quantity']}, {'2:4' if row['sparse'] else 'dense'}"
        lead = [text(what), row["dtype"] or MISSING, code(row["instruction"]), state(row)]
        loads = "" if not row["dtype"] else "yes" if row["loads"] else "no"
        if row["status"] != "ok":
            lines.append([*lead, loads, *[""] * (len(head) - 5)])
            continue
        lines.append([
            *lead, loads, f"{measured(row, 'rate')} {text(row['unit'])}", significant(row["load_rate"], 4),
            integer(row["samples"]), text(row["stop"]), integer(row["clock_mhz"]), fixed(row["power_w"], 1),
            fixed(row["temperature_c"], 1), text(row["throttle"]),
        ])  # fmt: skip
    return Table(*without_empty(head, lines), left=4)
