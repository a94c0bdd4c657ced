"""Sections that look beyond this machine: published figures, and result folders of other machines."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from slidesparse.dtypes import DType
from slidesparse.plan import SQUARE
from slidesparse.report import compare, published
from slidesparse.report.collect import PHASES
from slidesparse.report.markdown import MISSING, Table, fixed, integer, text
from slidesparse.report.overview import machine_name
from slidesparse.report.view import CHECKED, View, ratio_cell

REFERENCE_MODEL = "BitNet-2B"
"""Model of the published runs; its figures are shown where this machine ran another one."""
SQUARES = "M = N = K"
SIGNS = {"reproduced": "=", "higher": ">", "lower": "<", "not measured": "·"}


@dataclass(frozen=True)
class Titled:
    """A table under a heading of its own."""

    title: str
    table: Table


@dataclass(frozen=True)
class Published:
    """Everything that the section on published figures shows."""

    gpus: Table
    tasks: Table
    same: str
    """The published GPU that this machine is, or empty."""
    outcomes: dict[str, int]
    """How many published ratios are reproduced, higher, lower, not measured; empty unless `same`."""
    summary: Table
    """The same by measurement, model and type."""
    reproduction: list[Titled]
    side_by_side: list[Titled]
    over_bound: int
    total: int


def published_section(view: View) -> Published:
    """Reproduction cell by cell on a GPU that figures were published for, side by side anywhere else."""
    same = published.same_machine(view.device)
    found = published.beside(view.over_published_base, same) if same else pd.DataFrame()
    everything = published.speedups()
    bounds = everything["sparsity"].map(compare.bound)
    return Published(
        gpus=_gpu_table(view),
        tasks=_task_table(view),
        same=same,
        outcomes={} if found.empty else {name: int((found["outcome"] == name).sum()) for name in SIGNS},
        summary=_summary(found),
        reproduction=_reproduction(found),
        side_by_side=_side_by_side(view, same),
        over_bound=int((everything["ratio"] > bounds * (1 + published.TOLERANCE)).sum()),
        total=len(everything),
    )


def _gpu_table(view: View) -> Table:
    """Architecture, FP8, and how many of the sparse cells each machine has a figure for."""
    ratios = published.speedups()
    end_to_end = ratios[ratios["kind"] != "kernel"]
    grid = end_to_end[[*published.KIND[:1], "model", "sparsity", "m"]].drop_duplicates()
    rows = []
    for _, machine in published.machines().iterrows():
        cells = end_to_end[end_to_end["gpu"] == machine["gpu"]]
        outcomes = [_published_outcome(cells, dtype, bool(machine["fp8"]), len(grid)) for dtype in ("INT8", "FP8E4M3")]
        title = f"{machine['gpu']} ({text(machine['description'])})" if machine["description"] else machine["gpu"]
        rows.append([
            title, machine["architecture"], f"{machine['compute_capability']:.1f}",
            "yes" if machine["fp8"] else "no", *outcomes, fixed(machine["bitnet_run_hours"], 2),
        ])  # fmt: skip
    rows.append(_this_machine(view))
    head = [
        "machine",
        "architecture",
        "compute capability",
        "FP8 tensor cores",
        "INT8 end to end",
        "FP8 end to end",
        "one BitNet-2B run, h",
    ]
    return Table(head, rows, left=2)


def _published_outcome(cells: pd.DataFrame, dtype: str, supported: bool, planned: int) -> str:
    if not supported and dtype == "FP8E4M3":
        return "skipped: no FP8"
    count = int((cells["dtype"] == dtype).sum())
    return f"{count} of {planned} ratios" if count else "no figures published"


def _this_machine(view: View) -> list[str]:
    machine = view.records.environment.get("machine") or {}
    gpu = machine.get("gpu")
    capability = tuple(gpu.get("compute_capability", (0, 0))) if isinstance(gpu, dict) else (0, 0)
    known_gpus = published.machines()
    # Compute capability names the architecture; those of published machines are the ones that can be looked up.
    names = known_gpus.loc[known_gpus["compute_capability"].astype(int) == capability[0], "architecture"]
    if capability[0] == 8:
        names = pd.Series(["Ada" if capability[1] == 9 else "Ampere"])
    architecture = str(names.iloc[0]) if len(names) else (f"CPU, {machine.get('arch', '')}" if not gpu else MISSING)
    fp8 = ("yes" if capability >= (8, 9) else "no") if gpu else "emulated"
    frames = [view.records.throughput[phase] for phase in PHASES]
    outcomes = []
    for dtype in ("INT8", "FP8E4M3"):
        rows = [f[f["dtype"] == dtype] for f in frames if not f.empty]
        total = sum(len(r) for r in rows)
        done = sum(int(compare.checked(r).sum()) for r in rows)
        skipped = sum(int((r["status"] == "skipped").sum()) for r in rows)
        outcomes.append(
            f"{done} of {total} cells {CHECKED}" + (f", {skipped} skipped" if skipped else "") if total else "not run"
        )
    reference = published.reference_seconds()
    tasks = [t for t in view.records.status.get("tasks") or [] if t.get("number") in reference]
    hours = sum(float(t.get("seconds") or 0) for t in tasks) / 3600
    bitnet = (
        view.records.profile is not None and view.records.profile.models == (REFERENCE_MODEL,) and not view.emulation
    )
    name = f"**{text(machine_name(view))}** (this machine)"
    number = f"{capability[0]}.{capability[1]}" if gpu else MISSING
    return [name, architecture, number, fp8, *outcomes, fixed(hours, 2) if bitnet else MISSING]


def _task_table(view: View) -> Table:
    """Seconds of the reference run beside ours; the same work only under the same profile."""
    ours = {int(t["number"]): t for t in view.records.status.get("tasks") or [] if "number" in t}
    rows = []
    for number, seconds in published.reference_seconds().items():
        task = ours.get(number, {})
        ran = task.get("status") not in (None, "pending")
        here = fixed(task.get("seconds", -1), 1) if ran else "not run"
        rows.append([str(number), text(task.get("title", "")), fixed(seconds, 1), here])
    return Table(
        ["#", "task", "GB10 reference run, s", f"this machine ({view.profile_name or 'profile unknown'}), s"],
        rows,
        left=2,
    )


# -- the same GPU ---------------------------------------------------------------------------------------


def _summary(found: pd.DataFrame) -> Table:
    head = ["measurement", "model", "type", *SIGNS, "published ratios"]
    rows = []
    if not found.empty:
        for (kind, model, dtype), part in found.groupby(["kind", "model", "dtype"], sort=False):
            counts = [integer(int((part["outcome"] == name).sum())) for name in SIGNS]
            rows.append([str(kind), str(model), str(dtype), *counts, integer(len(part))])
    return Table(head, rows, left=3)


def _reproduction(found: pd.DataFrame) -> list[Titled]:
    if found.empty:
        return []
    tables = []
    for (kind, model, dtype), part in found.groupby(["kind", "model", "dtype"], sort=False):
        cells = {}
        part = _squares(part)
        for _, row in part.iterrows():
            sign = SIGNS[row["outcome"]]
            pair = f"{fixed(row['ratio'], 2)} {sign} {fixed(row['ratio_published'], 2)}"
            cells[(row["sparsity"], row["n"], row["k"], row["m"])] = pair
        ms = sorted(set(part["m"]))
        rows = []
        for sparsity in sorted(set(part["sparsity"]), key=compare.pattern_order):
            for n, k in sorted({key[1:3] for key in cells if key[0] == sparsity}):
                shape = [f"{n} x {k}" if n else SQUARES] if kind == "kernel" else []
                rows.append([sparsity, *shape, *(cells.get((sparsity, n, k, m), "") for m in ms)])
        head = ["pattern", *(["N x K"] if kind == "kernel" else []), *(f"M={m}" for m in ms)]
        tables.append(Titled(f"{str(kind).capitalize()}, {model} {dtype}", Table(head, rows)))
    return tables


def _squares(ratios: pd.DataFrame) -> pd.DataFrame:
    """Square shapes as one shape of many sizes: their n and k follow from m."""
    return ratios.assign(n=0, k=0) if (ratios["model"] == SQUARE).all() else ratios


# -- side by side ---------------------------------------------------------------------------------------


def _side_by_side(view: View, same: str) -> list[Titled]:
    """Published ratios by GPU; ours beside them where both ran the model, and never where ours are emulation."""
    ratios = published.speedups()
    ours = view.over_published_base
    ours = ours[ours["checked"].astype(bool) & (ours["sparsity"] != "") & ~ours["emulation"].astype(bool)]
    shared = [m for m in view.models() if m in set(ratios["model"])] or [REFERENCE_MODEL]
    if SQUARE in set(ours["model"]):
        shared.append(SQUARE)
    tables = []
    for model in shared:
        for kind in (*PHASES, "kernel"):
            for dtype in dict.fromkeys(["INT8", "FP8E4M3", *view.dtypes(ours)]):
                select = f"kind == '{kind}' and model == '{model}' and dtype == '{dtype}'"
                theirs, mine = ratios.query(select), ours.query(select)
                sources = {gpu: theirs[theirs["gpu"] == gpu] for gpu in published.machines()["gpu"]}
                if not same:
                    for backend in dict.fromkeys(mine["backend"]):
                        sources[f"**here**, {backend}"] = mine[mine["backend"] == backend]
                table = _ratios_by_source({name: rows for name, rows in sources.items() if not rows.empty})
                if table:
                    kind_name = compare.KIND_NAMES[kind]
                    if kind == "kernel":
                        kind_name += f" ({SQUARES})" if model == SQUARE else " (geometric mean over the layer shapes)"
                    tables.append(Titled(f"{kind_name}, {model} {dtype}", table))
    return tables


def _ratios_by_source(sources: dict[str, pd.DataFrame]) -> Table:
    """Rows: pattern and source; columns: M. Several shapes at one M give their geometric mean."""
    ms = sorted({int(m) for rows in sources.values() for m in rows["m"]})
    patterns = sorted({s for rows in sources.values() for s in rows["sparsity"]}, key=compare.pattern_order)
    lines = []
    for sparsity in patterns:
        lead = [sparsity, fixed(compare.bound(sparsity), 3)]
        for name, rows in sources.items():
            part = rows[rows["sparsity"] == sparsity]
            if part.empty:
                continue
            means = {int(m): compare.geometric_mean(group["ratio"]) for m, group in part.groupby("m")}
            lines.append([lead[0], name, lead[1], *(fixed(means[m], 2) if m in means else "" for m in ms)])
            lead = ["", ""]
    return Table(["pattern", "machine", "bound", *(f"M={m}" for m in ms)], lines, left=2)


def machines_section(view: View, others: list[View]) -> tuple[list[Titled], list[str]]:
    """Ratios of this and other machines where at least two measured the same model, and what only one measured."""
    views = [view, *others]
    tables, alone = [], []
    groups = {
        (str(m), str(d), str(k))
        for v in views
        for k, m, d in v.over_published_base[["kind", "model", "dtype"]].itertuples(index=False)
    }
    order = [dtype.value for dtype in DType]
    for model, dtype, kind in sorted(groups, key=lambda g: (g[0], order.index(g[1]), compare.KINDS.index(g[2]))):
        sources: dict[str, pd.DataFrame] = {}
        for v in views:
            frame = v.over_published_base
            same = (frame["kind"] == kind) & (frame["model"] == model) & (frame["dtype"] == dtype)
            part = frame[same & (frame["sparsity"] != "")]
            for (backend, emulation), rows in part.groupby(["backend", "emulation"], sort=True):
                label = f"{v.records.tree.tag.partition('_py')[0]}, {backend}{' (emulation)' if emulation else ''}"
                sources[label] = _squares(rows)
        machines = {label.partition(",")[0] for label in sources}
        name = f"{compare.KIND_NAMES[kind]}, {model} {dtype}"
        if len(machines) > 1:
            whole = {"kernel": SQUARES, compare.LINEAR: "decoder block"}.get(kind, "whole model")
            tables.append(Titled(name, _machines_table(sources, whole)))
        elif machines:
            alone.append(f"{name}: only {', '.join(sorted(machines))}")
    return tables, alone


def _machines_table(sources: dict[str, pd.DataFrame], whole: str) -> Table:
    """Rows: pattern, layer (or `whole`) and machine; columns: M."""
    everything = pd.concat(list(sources.values()))
    ms = sorted(set(everything["m"].astype(int)))
    rows = []
    for sparsity in sorted(set(everything["sparsity"]), key=compare.pattern_order):
        part = everything[everything["sparsity"] == sparsity]
        lead = [sparsity, fixed(compare.bound(sparsity), 3)]
        for n, k in dict.fromkeys(zip(part["n"], part["k"], strict=True)):
            shape = f"{n} x {k}" if n else whole
            for label, frame in sources.items():
                at = frame[(frame["sparsity"] == sparsity) & (frame["n"] == n) & (frame["k"] == k)]
                found = {int(row["m"]): ratio_cell(row) for _, row in at.iterrows()}
                if found:
                    rows.append([lead[0], shape, label, lead[1], *(found.get(m, "") for m in ms)])
                    lead, shape = ["", ""], ""
    return Table(["pattern", "N x K", "machine", "bound", *(f"M={m}" for m in ms)], rows, left=3)
