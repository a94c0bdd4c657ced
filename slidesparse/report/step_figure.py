"""Figure of profiled steps: a bar for each variant, its categories stacked, the sum of its bounds marked."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from slidesparse.measure import step_categories as categories
from slidesparse.report import compare
from slidesparse.report.profiled import Steps

COLOURS = {
    categories.LINEAR: "#0072b2", categories.DEQUANTISE: "#b3541e", categories.FUSED: "#d55e00",
    categories.QUANTISE: "#f0a35e", categories.NORM: "#e69f00", categories.GATE: "#f0e442",
    categories.ATTENTION: "#009e73", categories.CACHE: "#8fd3bd", categories.HEAD: "#56b4e9",
    categories.SAMPLING: "#cc79a7", categories.COMMUNICATION: "#6e4b1f", categories.REST: "#777777",
    categories.IDLE: "#e4e4e4",
}  # fmt: skip
"""Warm colours lie between the products."""


def svg(title: str, steps: Sequence[Steps], style: dict[str, object], metadata: dict[str, None]) -> str:
    """One figure, an axes for each phase and M."""
    with matplotlib.rc_context(style):  # type: ignore[arg-type]
        bars = max(len(part.variants) for part in steps)
        columns = min(2, len(steps))
        lines = -(-len(steps) // columns)
        figure = Figure(figsize=(5.2 * columns + 2.2, (0.34 * bars + 0.9) * lines + 0.5), layout="constrained")
        figure.suptitle(title, fontsize=10)
        grid = figure.subplots(lines, columns, squeeze=False)
        for index, axes in enumerate(grid.flat):
            if index < len(steps):
                _bars(axes, steps[index])
            else:
                axes.set_visible(False)
        drawn = [axes.get_legend_handles_labels() for axes in grid.flat]
        by_label = {label: handle for handles, labels in drawn for handle, label in zip(handles, labels, strict=True)}
        order = [name for name in (*categories.CATEGORIES, BOUND) if name in by_label]
        figure.legend([by_label[name] for name in order], order, loc="outside right upper", frameon=False, fontsize=8)
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata=metadata)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


BOUND = "sum of the bounds"


def _bars(axes: Axes, steps: Steps) -> None:
    for place, step in enumerate(steps.variants):
        left = 0.0
        for category in categories.CATEGORIES:
            width = step.us(category) / 1e3
            if width:
                axes.barh(place, width, left=left, color=COLOURS[category], height=0.7, label=category)
            left += width
        if step.bounds:
            end = sum(step.bounds.values()) / 1e3
            axes.plot([end, end], [place - 0.42, place + 0.42], color="black", linewidth=1.6, label=BOUND)
    axes.set_yticks(range(len(steps.variants)), [step.name for step in steps.variants])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("ms of a step")
    axes.set_title(f"{compare.KIND_NAMES[steps.phase]}, M={steps.m}", fontsize=9)
