"""Section on where the time of an engine step goes, and how far each part is from what this machine can attain."""

from __future__ import annotations

import re
from dataclasses import dataclass

from slidesparse.measure import step_categories as categories
from slidesparse.measure.step_categories import CATEGORIES, GROUPS
from slidesparse.report import compare
from slidesparse.report.collect import PHASES
from slidesparse.report.markdown import Table, code, fixed, integer, known, percent, significant
from slidesparse.report.profiled import Step, Steps, profiled
from slidesparse.report.view import View, figure_name

KIND = "steps"
"""First part of the figures' names."""
SHARE_SAID = 0.005
"""Parts of a step below this share of it are left to the tables."""
_KERNEL = re.compile(r"^(.*): ([\d.]+) us in (\d+)$")


@dataclass(frozen=True)
class StepBlock:
    """One phase and M of one model and type."""

    title: str
    times: Table
    bounds: Table
    distances: list[str]
    """A sentence for each variant: what its time beyond the bounds is spent on."""
    rest: list[str]
    """Kernels that no category is known for, by name, where they take more than SHARE_SAID of a step."""
    kernels: Table


@dataclass(frozen=True)
class ModelSteps:
    """All profiled steps of one model and type."""

    title: str
    figure: str
    busy: Table
    """Time in which kernels run, of every profiled step."""
    blocks: list[StepBlock]


@dataclass(frozen=True)
class StepSection:
    """`unmeasured`: why there is nothing; empty if there is."""

    unmeasured: str
    models: list[ModelSteps]
    not_run: int
    """Planned steps without a record, where there are others."""
    files: list[str]


def step_section(view: View) -> StepSection:
    """Everything recorded on the time within steps."""
    frame, profile = view.records.steps, view.records.profile
    models = [
        ModelSteps(
            f"{model} {dtype}",
            figure_name(KIND, model, dtype, False),
            _busy(parts),
            [_block(model, dtype, found) for found in parts],
        )
        for model, dtype, parts in profiled(view)
    ]
    unmeasured = ""
    if not models:
        unmeasured = "no step was profiled"
        if profile is not None and not profile.on_gpu:
            unmeasured = "the backends of this profile run on the CPU, where no GPU kernel runs"
        elif profile is not None and not any(profile.step_profiles.sizes(phase) for phase in PHASES):
            unmeasured = "this profile names no steps to profile (`step_profiles`)"
    files = [] if frame.empty else list(dict.fromkeys(frame["file"]))
    return StepSection(unmeasured, models, _not_run(view), files)


def _not_run(view: View) -> int:
    """Planned steps that have no record, if others have."""
    frame, profile = view.records.steps, view.records.profile
    if frame.empty or profile is None:
        return 0
    have = set(
        zip(
            frame["phase"], frame["model"], frame["dtype"], frame["backend"], frame["sparsity"], frame["M"], strict=True
        )
    )
    wanted = {
        (phase, *cell)
        for phase in PHASES
        for cell in view.planned(phase)
        if cell[-1] in profile.step_profiles.sizes(phase)
    }
    return len(wanted - have)


def _busy(parts: list[Steps]) -> Table:
    """By phase and M; behind each time, how many times the first variant's rate it would be without the host."""
    names = list(dict.fromkeys(step.name for part in parts for step in part.variants))
    lines = []
    for part in parts:
        first = part.variants[0]
        cells = {step.name: significant(step.busy_us, 4) for step in part.variants}
        over = {step.name: first.busy_us / step.busy_us for step in part.variants[1:] if step.busy_us > 0}
        cells |= {name: f"{cells[name]} ({fixed(ratio, 2)})" for name, ratio in over.items()}
        lines.append([f"{part.phase}, M={integer(part.m)}", *(cells.get(name, "") for name in names)])
    return Table(["µs of kernels", *names], lines)


# -- one block -----------------------------------------------------------------------------------------


def _block(model: str, dtype: str, steps: Steps) -> StepBlock:
    return StepBlock(
        title=_title(model, dtype, steps),
        times=_times(steps.variants),
        bounds=_bounds(steps.variants),
        distances=[_distance(step, steps.variants[0]) for step in steps.variants],
        rest=_rest(steps.variants),
        kernels=_kernels(steps.variants),
    )


def _title(model: str, dtype: str, steps: Steps) -> str:
    return f"{compare.KIND_NAMES[steps.phase]} step, {model} {dtype}, M={integer(steps.m)}"


def summary(view: View) -> list[str]:
    """How far the steps of the largest M of each phase are from the sum of their bounds; empty without bounds."""
    lines = []
    for model, dtype, parts in profiled(view):
        for steps in {part.phase: part for part in parts}.values():
            said = [f"{step.name} {fixed(step.over, 2)}" for step in steps.variants if step.bounds]
            if said:
                lines.append(f"{_title(model, dtype, steps)}, over the sum of its own bounds: {', '.join(said)}.")
    return lines


def _times(steps: list[Step]) -> Table:
    lines = []
    for category in CATEGORIES:
        if any(step.us(category) for step in steps):
            cells = [
                f"{significant(step.us(category), 4)} ({percent(step.us(category) / step.whole_us)})"
                if step.us(category) else ""
                for step in steps
            ]  # fmt: skip
            lines.append([category, *cells])
    lines.append(["whole step, profiled", *(significant(step.whole_us, 4) for step in steps)])
    if any(known(step.measured_us) for step in steps):
        lines.append(["whole step, as measured", *(significant(step.measured_us, 4) for step in steps)])
    return Table(["µs of a step", *(step.name for step in steps)], lines)


def _bounds(steps: list[Step]) -> Table:
    """`time / bound = ratio` of every group that has a bound, and of all of them together."""
    groups = [group for group in dict.fromkeys(GROUPS.values()) if any(group in step.bounds for step in steps)]
    lines = [[group, *(_over(step.groups[group], step.bounds.get(group)) for step in steps)] for group in groups]
    if lines:
        lines.append(["these together", *(
            _over(sum(step.groups[group] for group in step.bounds), sum(step.bounds.values()) or None) for step in steps
        )])  # fmt: skip
    return Table(["µs / bound", *(step.name for step in steps)], lines)


def _over(us: float, bound: float | None) -> str:
    return "" if not bound else f"{significant(us, 4)} / {significant(bound, 4)} = {fixed(us / bound, 2)}"


def _distance(step: Step, first: Step) -> str:
    """How far the step is from its bounds, the largest parts first, and how it differs from the first variant."""
    said = f"**{step.name}**: {significant(step.whole_us, 4)} µs"
    if step.bounds:
        beyond = {group: step.groups[group] - bound for group, bound in step.bounds.items()}
        free = {group: us for group, us in step.groups.items() if group not in step.bounds}
        total = sum(step.bounds.values())
        said += f", {fixed(step.over, 2)} times the sum of its bounds ({significant(total, 4)} µs)"
        said += f". Beyond them: {_parts(beyond, step)}; without a bound: {_parts(free, step)}"
    if step is not first:
        delta = {group: us - first.groups[group] for group, us in step.groups.items()}
        said += f". Against {first.name} {_signed(step.whole_us - first.whole_us)} µs: {_parts(delta, step)}"
    return said + "."


def _parts(parts: dict[str, float], step: Step) -> str:
    order = sorted(parts.items(), key=lambda part: -abs(part[1]))
    said = [f"{group} {_signed(us)}" for group, us in order if abs(us) >= SHARE_SAID * step.whole_us]
    return ", ".join(said) or "nothing to speak of"


def _signed(us: float) -> str:
    return f"{'−' if us < 0 else '+'}{significant(abs(us), 3)}"


def _rest(steps: list[Step]) -> list[str]:
    lines = []
    for step in steps:
        row = step.row(categories.REST)
        if row is not None and row["us"] > SHARE_SAID * step.whole_us:
            names = "; ".join(f"{code(name)} {us} µs in {calls}" for name, us, calls in _named(row["kernels"]))
            more = int(row["kinds"]) - len(_named(row["kernels"]))
            lines.append(f"Rest, {step.name}: {names}{f'; and {more} more kernels' if more > 0 else ''}")
    return lines


def _kernels(steps: list[Step]) -> Table:
    lines = []
    for step in steps:
        for category in CATEGORIES:
            row = step.row(category)
            if row is None:
                continue
            for name, us, calls in _named(row["kernels"]):
                share = percent(float(us) / step.whole_us)
                lines.append([step.name, category, code(name), us, calls, share])
    return Table(["variant", "category", "kernel", "µs", "launches", "of the step"], lines, left=3)


def _named(kernels: str) -> list[tuple[str, str, str]]:
    """(name, µs, launches) of the column `kernels`."""
    found = [_KERNEL.match(part) for part in kernels.split("; ")]
    return [(match[1], match[2], match[3]) for match in found if match is not None]
