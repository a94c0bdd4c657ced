"""Speed-ups with intervals, and what they say. Statistics themselves are in `measure/statistics.py`.

The row's own paired ratio of interleaved samples, where it has one. Where it has none (older and published files): end
to end the ratio of two independent medians of tokens/s, kernels the ratio of the two files' latencies, both with the
MOVER interval on logarithms (`statistics.unpaired_ratio`). Against the engine's own kernels: paired ratios alone.
Only a ratio of two checked rows supports a statement; one whose interval contains 1 shows no difference.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import pandas as pd

from slidesparse.config import Profile, Stopping
from slidesparse.measure.statistics import Interval, unpaired_ratio
from slidesparse.pattern import Sparsity
from slidesparse.plan import STOCK, Phase, throughput_cells
from slidesparse.report.collect import PHASES, Records

Verdict = Literal["faster", "slower", "no difference shown", "no interval"]
CHECKED = ("exact", "within_bound")
LINEAR = "linear"
KINDS = (*PHASES, LINEAR, "kernel")
"""What speed-ups are of, as sections and conclusions order it."""
KIND_NAMES = {"prefill": "Prefill", "decode": "Decode", LINEAR: "Whole linear layers", "kernel": "Kernel"}
SPEEDUP_COLUMNS = (
    "kind", "model", "dtype", "backend", "sparsity", "baseline", "m", "n", "k", "layer",
    "emulation", "ratio", "low", "high", "bound", "checked", "noisy", "host_bound", "verdict", "paired",
)  # fmt: skip


def pattern_order(sparsity: str) -> float:
    """Dense first, then by L, 2:inf last."""
    if not sparsity:
        return 0.0
    length = Sparsity.parse(sparsity).l
    return float("inf") if length is None else float(length)


def bound(sparsity: str) -> float:
    """L/(L-2), and 1 for dense."""
    return Sparsity.parse(sparsity).speedup_bound if sparsity else 1.0


def label(backend: str, sparsity: str) -> str:
    """`cusparselt 2:8`."""
    return f"{backend} {sparsity}".strip()


def verdict(low: float, high: float) -> Verdict:
    """What an interval of a ratio (1: the same) shows."""
    if not low > 0 or not high > 0:
        return "no interval"
    if low > 1:
        return "faster"
    return "slower" if high < 1 else "no difference shown"


def checked(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows that were measured and agreed with their reference."""
    return (frame["status"] == "ok") & frame["verified"].isin(CHECKED)


def supported(ratios: pd.DataFrame) -> pd.Series[bool]:
    """Ratios that support a statement: both sides checked, and an interval."""
    return ratios["checked"].astype(bool) & (ratios["verdict"] != "no interval")


def noisy(frame: pd.DataFrame, limit: float | None) -> pd.Series[bool]:
    """Measured rows whose interval is wider than the profile's limit, or that the time cap ended."""
    wide = frame["stop"] == "time cap"
    if limit is not None:
        wide = wide | (frame["ci_rel"] > limit)
    return (frame["status"] == "ok") & wide


def limit_of(profile: Profile | None, kind: str) -> float | None:
    """The profile's limit of the relative half width, of a task's name; None where it sets none."""
    stopping = stopping_of(profile, kind)
    return None if stopping is None else stopping.ci_rel


def stopping_of(profile: Profile | None, kind: str) -> Stopping | None:
    """The profile's stopping rule of `prefill`, `decode`, `kernel`, `linear` or `tune`; calibration has none."""
    if profile is None:
        return None
    linear = None if profile.linear is None else profile.linear.stopping
    rules = {
        "prefill": profile.prefill.stopping, "decode": profile.decode.stopping, "kernel": profile.kernel.stopping,
        "linear": linear, "tune": profile.tune.stopping,
    }  # fmt: skip
    return rules.get(kind)


def baseline(backends: list[str], order: Iterable[str] = ()) -> str:
    """The dense backend that ratios are taken against: the first of `order`, else of all, that is not stock."""
    names = [*(name for name in order if name in backends), *sorted(backends)]
    return next((name for name in names if name != STOCK), names[0] if names else "")


def dense_variants(profile: Profile | None, phase: Phase) -> list[str]:
    """Backends of the profile's dense variants, end to end, in its order: `over_dense` is against the first of ours."""
    cells = throughput_cells(profile, phase) if profile else ()
    return list(dict.fromkeys(cell.variant.backend for cell in cells if cell.variant.sparsity is None))


def geometric_mean(ratios: pd.Series[float]) -> float:
    """The mean that treats a ratio and its inverse alike."""
    return math.exp(float(ratios.map(math.log).mean()))


def speedups(records: Records, base: str = "") -> pd.DataFrame:
    """All ratios of a tree, columns SPEEDUP_COLUMNS, in the order of the tables. Empty frame with columns if none.

    `base`: end to end, the dense backend to compare with where it was measured, in place of the profile's first.
    """
    rows = [row for phase in PHASES for row in _end_to_end(records, phase, base)] + _linear(records) + _kernel(records)
    return pd.DataFrame(rows, columns=list(SPEEDUP_COLUMNS))


def over_stock(records: Records) -> pd.DataFrame:
    """Paired ratios of prefill and decode over the engine's own kernels, columns SPEEDUP_COLUMNS."""
    rows: list[dict[str, object]] = []
    for phase in PHASES:
        for group in _groups(records, phase):
            twins = _dense_rows(group, STOCK)
            for _, row in group[group["over_stock"] > 0].iterrows():
                # Without a row of the engine's own nothing says that it was checked.
                twin = twins.loc[row["m"]] if row["m"] in twins.index else row.where(row.index != "checked", False)
                rows.append(_place(phase, row) | _shared(row, twin, STOCK, int(row["m"])) | paired(row, "over_stock"))
    return pd.DataFrame(rows, columns=list(SPEEDUP_COLUMNS))


def _end_to_end(records: Records, phase: Phase, wanted: str) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for group in _groups(records, phase):
        present = sorted(set(group.loc[group["sparsity"] == "", "backend"]))
        order = dense_variants(records.profile, phase)
        first, base = baseline(present, order), baseline(present, (wanted, *order))
        dense = _dense_rows(group, base)
        for _, row in group.iterrows():
            if row["m"] not in dense.index or (row["backend"] == base and not row["sparsity"]):
                continue
            twin = dense.loc[row["m"]]
            in_turns = base == first and row["over_dense"] > 0
            ratio = paired(row, "over_dense") if in_turns else ratio_of(row, twin, "tokens_per_s")
            rows.append(_place(phase, row) | _shared(row, twin, base, int(row["m"])) | ratio)
    return rows


def _groups(records: Records, phase: Phase) -> Iterator[pd.DataFrame]:
    """Measured rows of one phase, by model, type and emulation."""
    frame = records.throughput[phase]
    if frame.empty:
        return
    frame = frame.assign(checked=checked(frame), noisy=noisy(frame, limit_of(records.profile, phase)))
    for _, group in frame[frame["status"] == "ok"].groupby(["model", "dtype", "emulation"], sort=False):
        yield group


def _dense_rows(group: pd.DataFrame, name: str) -> pd.DataFrame:
    """Dense rows of a backend, by M."""
    return group[(group["backend"] == name) & (group["sparsity"] == "")].set_index("m")


def _place(phase: Phase, row: pd.Series) -> dict[str, object]:
    return {"kind": phase, "model": row["model"], "dtype": row["dtype"], "n": 0, "k": 0, "layer": ""}


def _linear(records: Records) -> list[dict[str, object]]:
    frame = records.linear
    if frame.empty:
        return []
    frame = frame.assign(
        checked=checked(frame), noisy=noisy(frame, limit_of(records.profile, "linear")), host_bound=False
    )
    rows: list[dict[str, object]] = []
    base = records.profile.backends.dense[0] if records.profile else "dense"
    for _, row in frame[(frame["status"] == "ok") & (frame["speedup"] > 0)].iterrows():
        place = {"kind": LINEAR, "model": row["model"], "dtype": row["dtype"], "n": 0, "k": 0, "layer": ""}
        # Both sides of a row were checked before they were timed together.
        rows.append(place | _shared(row, row, base, int(row["M"])) | paired(row, "speedup"))
    return rows


def _kernel(records: Records) -> list[dict[str, object]]:
    frame = records.kernel
    if frame.empty:
        return []
    frame = frame.assign(
        checked=checked(frame), noisy=noisy(frame, limit_of(records.profile, "kernel")), host_bound=False
    )
    rows: list[dict[str, object]] = []
    for (model, dtype, _), group in frame[frame["status"] == "ok"].groupby(["model", "dtype", "emulation"], sort=False):
        present = sorted(set(group.loc[group["sparsity"] == "", "backend"]))
        base = baseline(present, records.profile.backends.dense if records.profile else ())
        dense = group[(group["backend"] == base) & (group["sparsity"] == "")]
        twins = {(row["M"], row["N"], row["K_model"]): row for _, row in dense.iterrows()}
        for _, row in group.iterrows():
            if row["backend"] == base and not row["sparsity"]:
                continue
            twin = twins.get((row["M"], row["N"], row["K_model"]))
            if row["speedup"] > 0:
                # The twin was checked before it was timed beside this row: its trust is this row's own.
                ratio, twin = paired(row, "speedup"), row
            elif twin is not None:
                ratio = ratio_of(twin, row, "lat_us_1")
            else:
                continue
            place = {"kind": "kernel", "model": model, "dtype": dtype, "n": int(row["N"]), "k": int(row["K_model"])}
            layer = row["layer"] or f"{row['N']}x{row['K_model']}"
            rows.append(place | {"layer": layer} | _shared(row, twin, base, int(row["M"])) | ratio)
    return rows


def _shared(row: pd.Series, twin: pd.Series, base: str, m: int) -> dict[str, object]:
    return {
        "backend": row["backend"],
        "sparsity": row["sparsity"],
        "baseline": base,
        "m": m,
        "emulation": bool(row["emulation"]),
        "bound": bound(row["sparsity"]),
        "checked": bool(row["checked"] and twin["checked"]),
        "noisy": bool(row["noisy"] or twin["noisy"]),
        "host_bound": bool(row["host_bound"] or twin["host_bound"]),
    }


def paired(row: pd.Series, name: str) -> dict[str, object]:
    """A ratio that a row brings with it, in columns NAME, NAME_low and NAME_high."""
    low, high = float(row[f"{name}_low"]), float(row[f"{name}_high"])
    return {"ratio": float(row[name]), "low": low, "high": high, "verdict": verdict(low, high), "paired": True}


def ratio_of(numerator: pd.Series, denominator: pd.Series, figure: str) -> dict[str, object]:
    """Ratio of two rows' figures, measured independently, with its interval where both have one."""
    ratio = float(numerator[figure]) / float(denominator[figure])
    if not all(row["ci_low"] > 0 and row["ci_high"] > 0 for row in (numerator, denominator)):
        return {
            "ratio": ratio, "low": float("nan"), "high": float("nan"), "verdict": "no interval", "paired": False,
        }  # fmt: skip
    found = unpaired_ratio(_interval(numerator, figure), _interval(denominator, figure))
    return {
        "ratio": ratio, "low": found.low, "high": found.high, "verdict": verdict(found.low, found.high),
        "paired": False,
    }  # fmt: skip


def _interval(row: pd.Series, figure: str) -> Interval:
    return Interval(float(row[figure]), float(row["ci_low"]), float(row["ci_high"]))
