"""Profiled engine steps from the records: time and bound of each part, variants side by side."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import pandas as pd

from slidesparse.measure import step_categories as categories
from slidesparse.measure.step_categories import CATEGORIES, GROUPS
from slidesparse.pattern import Sparsity
from slidesparse.plan import Phase
from slidesparse.report import compare, linear
from slidesparse.report.collect import PHASES
from slidesparse.report.markdown import known
from slidesparse.report.view import View


@dataclass(frozen=True)
class Step:
    """One profiled step of one variant."""

    backend: str
    sparsity: str
    rows: pd.DataFrame
    """By category."""
    measured_us: float
    """Median of the same step without a profiler; -1: not measured."""
    view: View

    @property
    def name(self) -> str:
        return compare.label(self.backend, self.sparsity)

    @property
    def whole_us(self) -> float:
        return float(self.rows["step_us"].iloc[0])

    @property
    def busy_us(self) -> float:
        """Time in which any kernel runs."""
        return float(self.rows["busy_us"].iloc[0])

    def us(self, category: str) -> float:
        return float(self.rows["us"].get(category, 0.0))

    def row(self, category: str) -> pd.Series | None:
        return self.rows.loc[category] if category in self.rows.index else None  # type: ignore[return-value]

    @cached_property
    def groups(self) -> dict[str, float]:
        """Time of each group of categories, in their order."""
        times: dict[str, float] = {}
        for category in CATEGORIES:
            times[GROUPS[category]] = times.get(GROUPS[category], 0.0) + self.us(category)
        return times

    @cached_property
    def bounds(self) -> dict[str, float]:
        """Shortest time of each group that ran, where this machine's rates say one."""
        found = {}
        for category, row in self.rows.iterrows():
            group = GROUPS.get(str(category), "")
            if self.groups.get(group):
                bound = self._bound(row)
                if bound is not None:
                    found[group] = bound
        return {group: found[group] for group in self.groups if group in found}

    @property
    def over(self) -> float:
        """The whole step over the sum of its bounds."""
        return self.whole_us / sum(self.bounds.values())

    def _bound(self, row: pd.Series) -> float | None:
        """Products each by itself, with a 16-bit output; other work by its operations and bytes."""
        if row["layers"]:
            sparsity = Sparsity.parse(self.sparsity) if self.sparsity and row.name == categories.LINEAR else None
            times = [
                self.view.attainable.microseconds(row["operands"], sparsity, int(row["rows"]), n, k, "-> bfloat16")
                for n, k in linear.shapes(row)
            ]
            known_times = [time for time in times if time is not None]
            return int(row["blocks"]) * sum(known_times) if len(known_times) == len(times) else None
        if not known(row["bytes_moved"]):
            return None
        operations = int(row["operations"]) if known(row["operations"]) else 0
        return self.view.attainable.roofline(int(row["bytes_moved"]), operations, row["operands"])


@dataclass(frozen=True)
class Steps:
    """The profiled steps of one phase and M, side by side."""

    phase: Phase
    m: int
    variants: list[Step]


def profiled(view: View) -> Iterator[tuple[str, str, list[Steps]]]:
    """(model, type, steps by phase and M) of what was profiled."""
    frame = view.records.steps
    if frame.empty:
        return
    good = frame[(frame["status"] == "ok") & (frame["us"] >= 0)]
    for model in view.models(good):
        for dtype in view.dtypes(good):
            rows = good[(good["model"] == model) & (good["dtype"] == dtype)]
            found = [
                _steps(view, phase, m, rows[(rows["phase"] == phase) & (rows["M"] == m)])
                for phase in PHASES
                for m in sorted({int(m) for m in rows.loc[rows["phase"] == phase, "M"]})
            ]
            if found:
                yield model, dtype, found


def _steps(view: View, phase: Phase, m: int, rows: pd.DataFrame) -> Steps:
    variants = view.sorted_variants(zip(rows["backend"], rows["sparsity"], strict=True))
    steps = []
    for backend, sparsity in variants:
        own = rows[(rows["backend"] == backend) & (rows["sparsity"] == sparsity)]
        first = own.iloc[0]
        steps.append(Step(backend, sparsity, own.set_index("category"), _measured_us(view, phase, m, first), view))
    return Steps(phase, m, steps)


def _measured_us(view: View, phase: Phase, m: int, row: pd.Series) -> float:
    frame = view.records.throughput[phase]
    if frame.empty:
        return -1.0
    same = (
        frame[["model", "dtype", "backend", "sparsity"]].eq(row[["model", "dtype", "backend", "sparsity"]]).all(axis=1)
    )
    found = frame.loc[same & (frame["m"] == m) & (frame["status"] == "ok") & (frame["step_ms"] > 0), "step_ms"]
    return 1e3 * float(found.iloc[-1]) if len(found) else -1.0
