"""Where each variant stands, in a sentence: how its steps compare with the engine's own kernels and with our dense."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from slidesparse.plan import STOCK
from slidesparse.report import compare
from slidesparse.report.markdown import fixed
from slidesparse.report.view import View

STOCK_NAME = "stock vLLM"


def standing(view: View, stock: pd.DataFrame, dense: pd.DataFrame, emulation: bool) -> list[str]:
    """A sentence for each variant of one model, type and phase, from its checked ratios alone.

    `stock`, `dense`: ratios over the engine's own kernels and over our dense (`compare.SPEEDUP_COLUMNS`).
    """
    frames = [(STOCK_NAME, stock), (f"dense ({_base(dense)})", dense)]
    variants = view.sorted_variants(
        (backend, sparsity)
        for _, frame in frames
        for backend, sparsity in zip(frame["backend"], frame["sparsity"], strict=True)
        if not stock_itself(backend, sparsity)
    )
    lines, silent = [], []
    for backend, sparsity in variants:
        parts = []
        for name, frame in frames:
            rows = frame[(frame["backend"] == backend) & (frame["sparsity"] == sparsity)]
            if compare.supported(rows).any():
                parts.append(against(rows, name, sorted({int(m) for m in frame["m"]}), emulation))
        if parts:
            lines.append(f"**{compare.label(backend, sparsity)}**: {'; '.join(parts)}.")
        else:
            silent.append(compare.label(backend, sparsity))
    return lines + ([f"No checked ratio: {', '.join(silent)}."] if silent else [])


def stock_itself(backend: str, sparsity: str) -> bool:
    """Is it the engine's own kernels?"""
    return backend == STOCK and not sparsity


def against(rows: pd.DataFrame, name: str, every: Sequence[int], emulation: bool) -> str:
    """`0.95 to 1.02 times the rate of stock vLLM (faster at M=8192, 16384; slower at M=512 to 2048; ...)`.

    `rows`: some of them checked. `every`: all M of the table, ascending.
    """
    good = rows[compare.supported(rows)]
    left = len(rows) - len(good)
    words = {
        "faster": "less time" if emulation else "faster",
        "slower": "more time" if emulation else "**slower**",
        "no difference shown": "no difference shown",
    }
    said = []
    for verdict, word in words.items():
        ms = sorted(int(m) for m in good.loc[good["verdict"] == verdict, "m"])
        if ms:
            said.append(f"{word} at {sizes(ms, every)}")
    turns = "" if good["paired"].all() else ", not interleaved"
    return f"{span(good)} times the rate of {name} ({'; '.join(said)}{f'; {left} not checked' if left else ''}{turns})"


def span(rows: pd.DataFrame) -> str:
    """The least and the largest of some ratios: `0.95 to 1.02`."""
    low, high = (fixed(value, 2) for value in (rows["ratio"].min(), rows["ratio"].max()))
    return low if low == high else f"{low} to {high}"


def sizes(ms: Sequence[int], every: Sequence[int]) -> str:
    """`M=512 to 2048, 8192`: runs of sizes that follow each other in `every`; `every M` for all of several."""
    if list(ms) == list(every) and len(ms) > 1:
        return "every M"
    runs: list[list[int]] = []
    for m in ms:
        if runs and every.index(m) == every.index(runs[-1][-1]) + 1:
            runs[-1].append(m)
        else:
            runs.append([m])
    said = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"M={', '.join(said)}"


def _base(dense: pd.DataFrame) -> str:
    return str(dense["baseline"].iloc[0]) if len(dense) else ""
