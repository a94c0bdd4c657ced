"""Figures: ratios over M, with intervals and bounds. Same records, same bytes of SVG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from slidesparse.files import write_text
from slidesparse.plan import SQUARE, STOCK
from slidesparse.report import compare, step_figure, steps
from slidesparse.report.profiled import profiled
from slidesparse.report.view import View, figure_name, ratio_name

STYLE = {
    "svg.hashsalt": "slidesparse",
    "svg.fonttype": "none",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6e4b1f", "#444444")
"""Okabe and Ito's palette, told apart by colour-blind readers."""
GROUP = ("kind", "model", "dtype", "emulation")
"""What one figure is of."""
NO_METADATA = {"Date": None, "Creator": None, "Format": None, "Type": None}


@dataclass(frozen=True)
class Panel:
    """Ratios of one axes. `bounds`: L/(L-2) is drawn, which binds what differs from its base in the products alone."""

    name: str
    ratios: pd.DataFrame
    axis: str = "dense time / time"
    bounds: bool = True


def draw_all(view: View, folder: Path) -> set[str]:
    """Write a figure for each (kind, model, type, emulation) with ratios and each (model, type) with profiled steps.

    Returns their file names. SVGs that an earlier report left in the folder and this one does not show are
    removed.

    Raises:
        DiskError: the folder cannot be written.
    """
    names: set[str] = set()
    frame = view.speedups[view.speedups["sparsity"] != ""]
    keys = pd.concat([frame[list(GROUP)], view.over_stock[list(GROUP)]]).drop_duplicates()
    for kind, model, dtype, emulation in sorted(keys.itertuples(index=False, name=None)):
        name = figure_name(kind, model, dtype, emulation)
        group = (kind, model, dtype, emulation)
        part = frame[frame[list(GROUP)].eq(list(group)).all(axis=1)]
        heading = f"{compare.KIND_NAMES[kind]}, {model} {dtype}: {ratio_name(emulation)}"
        panels = _panels(part) if kind == "kernel" else _over_both(view.stock_ratios(*group), part)
        if len(panels) == 1 or kind == "kernel":
            heading += f" against {panels[0].ratios['baseline'].iloc[0]}"
        write_text(folder / name, svg(view, heading, panels))
        names.add(name)
    for model, dtype, parts in profiled(view):
        name = figure_name(steps.KIND, model, dtype, False)
        heading = f"Where the time of a step goes, {model} {dtype}"
        write_text(folder / name, step_figure.svg(heading, parts, STYLE, NO_METADATA))
        names.add(name)
    for stale in sorted(folder.glob("*.svg")):
        if stale.name not in names:
            stale.unlink()
    return names


def _over_both(stock: pd.DataFrame, dense: pd.DataFrame) -> list[Panel]:
    """Over the engine's own kernels, where that was measured, and over dense."""
    panels = []
    if len(stock):
        panels.append(Panel(f"against stock ({STOCK})", stock, "stock time / time", bounds=False))
    if len(dense):
        panels.append(Panel(f"against {dense['baseline'].iloc[0]}" if panels else "", dense))
    return panels


def _panels(part: pd.DataFrame) -> list[Panel]:
    """One for each layer's shape; square shapes are one line of sizes."""
    if (part["model"] == SQUARE).all():
        return [Panel("M = N = K", part)]
    shapes = dict.fromkeys(zip(part["layer"], part["n"], part["k"], strict=True))
    return [
        Panel(f"{layer} (N={n}, K={k})", part[(part["layer"] == layer) & (part["n"] == n) & (part["k"] == k)])
        for layer, n, k in shapes
    ]


def svg(view: View, title: str, panels: Sequence[Panel]) -> str:
    """One figure."""
    with matplotlib.rc_context(STYLE):  # type: ignore[arg-type]
        columns = min(2, len(panels))
        lines = -(-len(panels) // columns)
        figure = Figure(figsize=(5.2 * columns + 1.4, 2.9 * lines + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=10)
        grid = figure.subplots(lines, columns, squeeze=False, sharex=True)
        variants = view.sorted_variants(
            (b, s) for p in panels for b, s in zip(p.ratios["backend"], p.ratios["sparsity"], strict=True)
        )
        for index, axes in enumerate(grid.flat):
            if index >= len(panels):
                axes.set_visible(False)
                continue
            _panel(axes, variants, panels[index])
        drawn = [axes.get_legend_handles_labels() for axes in grid.flat]
        by_label = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
        figure.legend(list(by_label.values()), list(by_label), loc="outside right upper", frameon=False, fontsize=8)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=NO_METADATA)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


def _panel(axes: Axes, variants: list[tuple[str, str]], panel: Panel) -> None:
    part = panel.ratios
    axes.axhline(1.0, color="#888888", linewidth=0.8)
    emulation = bool(part["emulation"].any())
    many = len({backend for backend, _ in variants}) > 1
    for index, (backend, sparsity) in enumerate(variants):
        rows = part[(part["backend"] == backend) & (part["sparsity"] == sparsity)].sort_values("m")
        if rows.empty:
            continue
        colour = COLOURS[index % len(COLOURS)]
        limit = compare.bound(sparsity)
        label = compare.label(backend, sparsity) if many else sparsity
        low = (rows["ratio"] - rows["low"]).clip(lower=0).fillna(0.0)
        high = (rows["high"] - rows["ratio"]).clip(lower=0).fillna(0.0)
        axes.errorbar(
            rows["m"], rows["ratio"], yerr=[low, high], color=colour, marker="o", markersize=3, linewidth=1.2,
            capsize=2, label=label if emulation or not sparsity else f"{label} (bound {limit:.3f})",
        )  # fmt: skip
        if panel.bounds and not emulation:
            axes.axhline(limit, color=colour, linewidth=0.6, linestyle=":")
    axes.set_xscale("log", base=2)
    ms = sorted(set(part["m"]))
    axes.set_xticks(ms, [str(m) for m in ms])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("M")
    axes.set_ylabel(panel.axis)
    if panel.name:
        axes.set_title(panel.name, fontsize=9)
