"""Sections on checkpoints and tuning: preparation, conversion, candidates and winners."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.dtypes import DType
from slidesparse.report import compare
from slidesparse.report.activations import activation_table
from slidesparse.report.markdown import Table, code, integer, known, percent, seconds, significant, size, text
from slidesparse.report.view import FAILED, SKIPPED, View, state, title

WORST_LAYERS = 5


def prepare_table(view: View) -> Table:
    """One row a quantised checkpoint."""
    frame = view.records.prepare
    head = ["model", "source", "quantisation", "parameters", "in linears", "s", "disk floor, s", "read", "written",
            "peak memory", "weight error"]  # fmt: skip
    rows = []
    for _, row in _ordered(view, frame).iterrows():
        name = f"{row['model']} {row['dtype']}"
        if row["status"] != "ok":
            rows.append([f"{name} {_fate(row)}", *[""] * (len(head) - 1)])
            continue
        rows.append([
            name, text(row["source"]), text(row["quantization"]), integer(row["parameters"]),
            integer(row["linear_parameters"]),
            seconds(row["seconds"]), seconds(row["floor_s"]),
            size(row["bytes_read"]), size(row["bytes_written"]),
            size(row["peak_rss_mib"] * 2**20), percent(row["weight_error_rel"]),
        ])  # fmt: skip
    return Table(head, rows, left=3)


def convert_table(view: View) -> Table:
    """One row a pruned checkpoint."""
    frame = view.records.convert
    head = ["model", "pattern", "lossless proof", "weights", "zero before", "removed", "share", "energy removed",
            "groups unpruned", "s", "disk floor, s", "written", "peak memory"]  # fmt: skip
    rows = []
    for _, row in _ordered(view, frame).iterrows():
        name = f"{row['model']} {row['dtype']}"
        if row["status"] != "ok":
            rows.append([name, row["sparsity"], _fate(row), *[""] * (len(head) - 3)])
            continue
        rows.append([
            name, row["sparsity"], f"{state(row)} {row['verified'].replace('_', ' ')}", integer(row["weights"]),
            percent(_share(row["natural_zeros"], row["weights"])), integer(row["weights_removed"]),
            percent(row["removed_fraction"]), percent(row["energy_removed"]),
            percent(_share(row["groups_unpruned"], row["groups"])),
            seconds(row["seconds"]), seconds(row["floor_s"]),
            size(row["bytes_written"]), size(row["peak_rss_mib"] * 2**20),
        ])  # fmt: skip
    return Table(head, rows, left=3)


def convert_facts(view: View) -> list[str]:
    """Methods, layouts and what the proof was, as recorded."""
    frame = view.records.convert
    if frame.empty:
        return []
    done = frame[frame["status"] == "ok"]
    facts = [f"{name}: {', '.join(text(v) for v in dict.fromkeys(done[name]) if v)}" for name in ("method", "layout")]
    checks = [text(v) for v in dict.fromkeys(done["check"]) if v]
    return [f for f in facts if not f.endswith(": ")] + [f"proof: {check}" for check in checks[:4]]


def worst_layers(view: View) -> Table:
    """The layers that lose the largest share of energy, for each converted model."""
    frame = view.records.layers
    head = [
        "converted model",
        "layers",
        "not proven",
        "median energy removed",
        "worst layer",
        "N x K",
        "removed",
        "energy removed",
    ]
    rows = []
    for name, group in [] if frame.empty else _by_pattern(frame):
        unproven = integer(int((~group["verified"].isin(compare.CHECKED)).sum()))
        worst = group.sort_values("energy_removed", ascending=False, kind="stable").head(WORST_LAYERS)
        for place, (_, row) in enumerate(worst.iterrows()):
            lead = ["", "", "", ""]
            if place == 0:
                lead = [str(name), integer(len(group)), unproven, percent(float(group["energy_removed"].median()))]
            shape = f"{row['n']} x {row['k']}"
            rows.append(
                [*lead, code(row["layer"]), shape, percent(row["removed_fraction"]), percent(row["energy_removed"])]
            )
    return Table(head, rows)


# -- tuning -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TuneBlock:
    """Tuning of one model and type."""

    title: str
    summary: Table
    activations: Table
    """Activation kernels beside a copy of as many bytes."""
    winners: list[tuple[str, Table]]
    """One table an operation."""


def tune_blocks(view: View) -> list[TuneBlock]:
    """How many candidates there were, and what choosing gained over taking the median one."""
    blocks = []
    for model, dtype, emulation, rows in view.groups(view.records.tune):
        name = title(model, dtype, emulation)
        blocks.append(TuneBlock(name, _tune_summary(view, rows), activation_table(view, rows), _winners(view, rows)))
    return blocks


def _tune_summary(view: View, frame: pd.DataFrame) -> Table:
    head = ["operation", "variant", "grid", "sizes", "candidates a size", "won most often",
            "gain over median candidate", "largest gain", "checked", "failed", "skipped"]  # fmt: skip
    rows = []
    for operation in dict.fromkeys(frame["operation"]):
        part = frame[frame["operation"] == operation]
        for backend, sparsity in view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True)):
            cells = part[(part["backend"] == backend) & (part["sparsity"] == sparsity)]
            ok = cells[(cells["status"] == "ok") & (cells["lat_us"] > 0)]
            sizes = cells.groupby(["M", "N", "K"])
            counts = ok.groupby(["M", "N", "K"]).size()
            won = ok.loc[ok["winner"], "algorithm"].value_counts()
            gains = _gains(ok)
            best = code(sorted(won[won == won.max()].index)[0]) if len(won) else ""
            gain = [f"{significant(value, 3)}x" if len(gains) else "" for value in (gains.median(), gains.max())]
            rows.append([
                operation.replace("_", " "), compare.label(backend, sparsity), str(cells["granularity"].iloc[0]),
                integer(sizes.ngroups), _candidates(cells, counts), best, *gain,
                integer(int(cells["verified"].isin(compare.CHECKED).sum())),
                integer(int((cells["status"] == "failed").sum())), integer(int((cells["status"] == "skipped").sum())),
            ])  # fmt: skip
    return Table(head, rows, left=3)


def _candidates(cells: pd.DataFrame, timed: pd.Series[int]) -> str:
    """`8 of 50`: those timed to the end, and how many there were where a first, short look left some out."""
    known_counts = cells.loc[cells["candidates"] > 0, "candidates"].astype(int)
    every = _range(known_counts)
    return f"{_range(timed)} of {every}" if every and every != _range(timed) else _range(timed)


def _gains(ok: pd.DataFrame) -> pd.Series[float]:
    """Median candidate's latency over the winner's, one value a size."""
    sizes = ["M", "N", "K"]
    winner = ok[ok["winner"]].groupby(sizes)["lat_us"].min()
    return (ok.groupby(sizes)["lat_us"].median() / winner).dropna()


def _winners(view: View, frame: pd.DataFrame) -> list[tuple[str, Table]]:
    tables = []
    for operation in dict.fromkeys(frame["operation"]):
        part = frame[(frame["operation"] == operation) & frame["winner"] & (frame["status"] == "ok")]
        ms = sorted(set(part["M"].astype(int)))
        rows = []
        for backend, sparsity in view.sorted_variants(zip(part["backend"], part["sparsity"], strict=True)):
            cells = part[(part["backend"] == backend) & (part["sparsity"] == sparsity)]
            for n, k in sorted(set(zip(cells["N"].astype(int), cells["K"].astype(int), strict=True))):
                at = cells[(cells["N"] == n) & (cells["K"] == k)].set_index("M")
                shape = " ".join(f"{name}={value}" for name, value in (("N", n), ("K", k)) if value)
                cell = [
                    f"{code(at.loc[m, 'algorithm'])} {significant(at.loc[m, 'lat_us'], 3)}" if m in at.index else ""
                    for m in ms
                ]
                rows.append([compare.label(backend, sparsity), shape, *cell])
        if rows:
            tables.append(
                (operation.replace("_", " "), Table(["variant", "size", *(f"M={m}" for m in ms)], rows, left=2))
            )
    return tables


# -- helpers ------------------------------------------------------------------------------------------


def _ordered(view: View, frame: pd.DataFrame) -> pd.DataFrame:
    if frame.empty:
        return frame
    models, dtypes = view.models(frame), view.dtypes(frame)
    keys = pd.DataFrame({"a": frame["model"].map(models.index), "b": frame["dtype"].map(dtypes.index)})
    keys["c"] = frame["sparsity"].map(compare.pattern_order) if "sparsity" in frame else 0
    return frame.loc[keys.sort_values(["a", "b", "c"], kind="stable").index]


def _by_pattern(frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """Groups of layers by converted model: `BitNet-2B-INT8-SlideSparse-2_10` after `...-2_8`."""

    def order(name: str) -> tuple[str, int, float]:
        base, _, slug = name.partition("-SlideSparse-")
        model, _, suffix = base.rpartition("-")
        position = [dtype.suffix for dtype in DType].index(suffix) if suffix in ("INT8", "FP8") else -1
        return model, position, compare.pattern_order(slug) if slug else 0.0

    groups = dict(list(frame.groupby("converted", sort=False)))
    return [(str(name), groups[name]) for name in sorted(groups, key=lambda n: order(str(n)))]


def _fate(row: pd.Series) -> str:
    return f"{SKIPPED if row['status'] == 'skipped' else FAILED} {row['status']}"


def _share(part: float, whole: float) -> float:
    return part / whole if known(part) and known(whole) and whole else -1.0


def _range(counts: pd.Series[int]) -> str:
    if counts.empty:
        return ""
    low, high = int(counts.min()), int(counts.max())
    return str(low) if low == high else f"{low} to {high}"
