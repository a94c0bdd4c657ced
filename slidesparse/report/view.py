"""What all sections share: the order of things, marks, words, and which cells should be there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pandas as pd

from slidesparse.config import Stopping
from slidesparse.dtypes import DType
from slidesparse.plan import SQUARE, Phase, throughput_cells
from slidesparse.report import compare
from slidesparse.report.attainable import Attainable
from slidesparse.report.collect import Records
from slidesparse.report.markdown import fixed, known, significant
from slidesparse.report.published import BASELINE

CHECKED, UNCHECKED, FAILED, SKIPPED, NOT_RUN = "✓", "○", "✗", "⊘", "·"
NOISY, HOST_BOUND = "†", "‡"
FASTER, SLOWER, SAME = "▲", "▼", "="
LEGEND = {
    CHECKED: "measured, and equal to its independent reference (INT8: bit for bit; FP8: within the stated bound)",
    UNCHECKED: "measured, not checked: not used in any conclusion",
    FAILED: "failed",
    SKIPPED: "skipped: this machine cannot run it",
    NOT_RUN: "not run",
}
LINEAR_TASK, CALIBRATE_TASK = "whole linear layers", "what this machine can do"
TASKS = {"kernel_dense": "kernel, dense", "kernel_high": "kernel, sparse high", "kernel_low": "kernel, sparse low"}
POWER_CAP = "power cap"


def throttled(frame: pd.DataFrame) -> pd.Series[bool]:
    """Rows that something slowed down beyond the power cap, which is how a GPU limits itself under load."""
    reasons = frame["throttle"].astype(str).str.split(", ")
    return reasons.map(lambda names: any(name not in ("", POWER_CAP) for name in names)).astype(bool)


@dataclass(frozen=True)
class View:
    """Records, and what was computed from them, as the sections see it."""

    records: Records

    @cached_property
    def speedups(self) -> pd.DataFrame:
        return compare.speedups(self.records)

    @cached_property
    def over_published_base(self) -> pd.DataFrame:
        """The same with the dense side that published figures and other machines have, where it was measured."""
        return compare.speedups(self.records, BASELINE)

    @cached_property
    def over_stock(self) -> pd.DataFrame:
        return compare.over_stock(self.records)

    def ratios(self, kind: str, model: str, dtype: str, emulation: bool) -> pd.DataFrame:
        """The speed-ups over dense of one table."""
        return _of(self.speedups, kind, model, dtype, emulation)

    def stock_ratios(self, kind: str, model: str, dtype: str, emulation: bool) -> pd.DataFrame:
        """The same over the engine's own kernels."""
        return _of(self.over_stock, kind, model, dtype, emulation)

    @cached_property
    def attainable(self) -> Attainable:
        return Attainable.of(self.records.calibration)

    @property
    def emulation(self) -> bool:
        return self.records.emulation

    def groups(self, frame: pd.DataFrame) -> Iterator[tuple[str, str, bool, pd.DataFrame]]:
        """(model, type, emulation, rows): emulated and real rows never share a table."""
        if frame.empty:
            return
        for model in self.models(frame):
            for dtype in self.dtypes(frame):
                for emulation in (False, True):
                    same = (frame["model"] == model) & (frame["dtype"] == dtype) & (frame["emulation"] == emulation)
                    if same.any():
                        yield model, dtype, emulation, frame[same]

    @property
    def profile_name(self) -> str:
        name = self.records.environment.get("profile") or self.records.status.get("profile") or ""
        return str(name)

    def command(self, target: str) -> str:
        """The command that makes a missing table."""
        return f"make {target} PROFILE={self.profile_name}" if self.profile_name else f"make {target}"

    @property
    def device(self) -> str:
        """Name of the GPU as its driver gives it, empty without one."""
        gpu = (self.records.environment.get("machine") or {}).get("gpu")
        return str(gpu.get("name", "")) if isinstance(gpu, dict) else ""

    # -- order ---------------------------------------------------------------------------------------

    def models(self, *frames: pd.DataFrame) -> list[str]:
        """Models of the profile, then others that have rows."""
        profile = self.records.profile
        first = list(profile.models) if profile else []
        return first + sorted({m for f in frames if not f.empty for m in f["model"]} - set(first))

    def dtypes(self, *frames: pd.DataFrame) -> list[str]:
        profile = self.records.profile
        first = [dtype.value for dtype in profile.dtypes] if profile else []
        known = [*(dtype.value for dtype in DType), ""]
        return first + sorted({d for f in frames if not f.empty for d in f["dtype"]} - set(first), key=known.index)

    @cached_property
    def _backend_order(self) -> dict[str, int]:
        profile = self.records.profile
        backends = profile.backends if profile else None
        names = [*backends.engine_dense, *backends.dense, *backends.every_sparse] if backends else []
        return {name: index for index, name in enumerate(names)}

    def sorted_variants(self, variants: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """(backend, sparsity): dense first, then by backend and pattern."""
        order = self._backend_order
        return sorted(
            set(variants), key=lambda v: (bool(v[1]), order.get(v[0], len(order)), v[0], compare.pattern_order(v[1]))
        )

    # -- what should be there --------------------------------------------------------------------------

    def planned(self, phase: Phase) -> list[tuple[str, str, str, str, int]]:
        """(model, dtype, backend, sparsity, M) of the profile's cells; empty without a profile."""
        profile = self.records.profile
        if profile is None:
            return []
        return [
            (c.model, c.dtype.value, c.variant.backend, str(c.variant.sparsity or ""), c.m)
            for c in throughput_cells(profile, phase)
        ]

    def planned_kernel(self) -> list[tuple[str, str, str, str, str, int, int, int]]:
        """(task, model, dtype, backend, sparsity, M, N, K): the profile's lists times the shapes seen in records."""
        profile, frame = self.records.profile, self.records.kernel
        if profile is None or frame.empty:
            return []
        dense = [("kernel_dense", backend, "") for backend in profile.backends.dense]
        lists = {"kernel_high": profile.sparsity.kernel_high, "kernel_low": profile.sparsity.kernel_low}
        sparse = [(t, b, str(s)) for t, patterns in lists.items() for b in profile.backends.sparse for s in patterns]
        cells: list[tuple[str, str, str, str, str, int, int, int]] = []
        for model in (*profile.models, SQUARE):
            rows = frame[frame["model"] == model]
            shapes = list(dict.fromkeys(zip(rows["N"].astype(int), rows["K_model"].astype(int), strict=True)))
            sizes = [(m, n, k) for m in profile.kernel.m for n, k in shapes]
            if model == SQUARE:
                sizes = [(size, size, size) for size in profile.kernel.square]
            for dtype in profile.types:
                for task, backend, sparsity in dense + sparse:
                    cells += [(task, model, dtype.value, backend, sparsity, *size) for size in sizes]
        return cells

    def kernel_task(self, sparsity: str) -> str:
        """Which of the tasks 6 to 8 a pattern belongs to."""
        profile = self.records.profile
        if not sparsity:
            return "kernel_dense"
        if profile is not None and sparsity in {str(s) for s in profile.sparsity.kernel_high}:
            return "kernel_high"
        if profile is not None and sparsity in {str(s) for s in profile.sparsity.kernel_low}:
            return "kernel_low"
        return "kernel_high" if compare.pattern_order(sparsity) <= 10 else "kernel_low"


def _of(frame: pd.DataFrame, kind: str, model: str, dtype: str, emulation: bool) -> pd.DataFrame:
    same = (frame["kind"] == kind) & (frame["model"] == model) & (frame["dtype"] == dtype)
    return frame[same & (frame["emulation"] == emulation)]


def ratio_name(emulation: bool) -> str:
    """How a ratio of times is called: on a CPU it is no speed-up of the hardware in question."""
    return "time ratio (emulation)" if emulation else "speed-up"


def title(model: str, dtype: str, emulation: bool) -> str:
    """Heading of what was measured on one model and type."""
    return f"{model} {dtype}{' (emulation)' if emulation else ''}"


def stopping_text(what: str, stop: Stopping) -> str:
    """The stopping rule in a sentence."""
    steady = "" if stop.steady_rel is None else f" windows, until two agree to {stop.steady_rel * 100:g} %"
    return (
        f"{what} is repeated until the 95 % interval of its median is within ±{stop.ci_rel * 100:g} %, at least "
        f"{stop.min_samples} and at most {stop.max_samples} times, for at most {stop.cap_s:g} s; "
        f"warm-up {stop.warmup_s:g} s{steady}."
    )


def figure_name(kind: str, model: str, dtype: str, emulation: bool) -> str:
    """File name of a figure."""
    return f"{kind}_{model}-{DType(dtype).suffix}{'_emulation' if emulation else ''}.svg"


def state(row: pd.Series | None) -> str:
    """The mark of one cell."""
    if row is None:
        return NOT_RUN
    if row["status"] != "ok":
        return SKIPPED if row["status"] == "skipped" else FAILED
    if row["verified"] in compare.CHECKED:
        return CHECKED
    return FAILED if row["verified"] == "failed" else UNCHECKED


def ratio_cell(row: pd.Series) -> str:
    """`▲ 1.31 [1.29, 1.33]` with the marks of noise, host-bound steps and missing checks."""
    sign = {"faster": FASTER, "slower": SLOWER, "no difference shown": SAME}.get(row["verdict"], "")
    on = ((NOISY, row["noisy"]), (HOST_BOUND, row["host_bound"]), (UNCHECKED, not row["checked"]))
    return " ".join(part for part in (sign, interval(row), "".join(mark for mark, is_on in on if is_on)) if part)


def measured(row: pd.Series, figure: str, digits: int = 4) -> str:
    """`1,501 [1,496, 1,507]`: a row's figure and the interval that the row has of it."""
    low, high = (significant(row[name], digits) for name in ("ci_low", "ci_high"))
    return significant(row[figure], digits) + (f" [{low}, {high}]" if known(row["ci_low"]) else "")


def interval(row: pd.Series | Mapping[str, Any]) -> str:
    """`1.31 [1.29, 1.33]`; a third decimal where two would round away the side of 1 that the interval is on."""
    low, high = row["low"], row["high"]
    if row["verdict"] == "no interval":
        return fixed(row["ratio"], 2)
    hidden = row["verdict"] != "no difference shown" and "1.00" in (fixed(low, 2), fixed(high, 2))
    decimals = 3 if hidden else 2
    return f"{fixed(row['ratio'], decimals)} [{fixed(low, decimals)}, {fixed(high, decimals)}]"
