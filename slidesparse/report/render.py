"""Records -> `report.md` and its figures. Same records, same bytes: no clock, no machine, no random order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined

from slidesparse.files import write_text
from slidesparse.plan import STOCK
from slidesparse.report import (
    calibration,
    comparison,
    conclusions,
    figures,
    kernels,
    linear,
    markdown,
    models,
    overview,
    published,
    steps,
    throughput,
)
from slidesparse.report import view as views
from slidesparse.report.collect import collect, trees_in
from slidesparse.report.view import View
from slidesparse.result_tree import ResultTree


def render_report(tree: ResultTree, others: Sequence[Path] = ()) -> Path:
    """Regenerate `report.md` of a result tree, and `figures/`, from its records; returns its path.

    `others`: result folders of other machines (`reports/TAG`, or a published tree) to set beside this one.

    Raises:
        SlideSparseError: one of `others` is not a result folder.
        DiskError: the report cannot be written.
    """
    view = View(collect(tree))
    beside = [View(collect(other)) for folder in others for other in trees_in(folder)]
    drawn = figures.draw_all(view, tree.figures)
    machines, alone = comparison.machines_section(view, beside) if beside else ([], [])
    found = comparison.published_section(view)
    environment = Environment(
        loader=PackageLoader("slidesparse.report", "templates"),
        undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, autoescape=False,
    )  # fmt: skip
    environment.filters.update(text=markdown.text, code=markdown.code)
    text = environment.get_template("report.md.j2").render(
        view=view,
        records=view.records,
        machine=overview.machine_name(view),
        figures={name: (tree.figures / name).relative_to(tree.root).as_posix() for name in drawn},
        legend=views.LEGEND,
        marks=views,
        STOCK=STOCK,
        overview=overview,
        models=models,
        phases=[throughput.phase_section(view, "prefill"), throughput.phase_section(view, "decode")],
        steps=steps.step_section(view),
        kernel=kernels.kernel_section(view),
        linear=linear.linear_section(view),
        calibration=calibration.calibration_section(view),
        published=found,
        tolerance=published.TOLERANCE,
        signs=comparison.SIGNS,
        others=beside,
        machines=machines,
        alone=alone,
        headline=conclusions.headline(view),
        conclusions=conclusions.conclusions(view, found),
    )
    write_text(tree.report, text)
    return tree.report
