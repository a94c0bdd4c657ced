"""The published figures (`published/SOURCE.md`), their speed-ups, and whether this machine reproduces them."""

from __future__ import annotations

import io
from collections.abc import Iterable
from functools import lru_cache
from importlib import resources
from typing import Literal

import pandas as pd

from slidesparse.dtypes import DType

TOLERANCE = 0.05
"""A published speed-up is reproduced where our 95 % interval overlaps it +-5 %."""
Outcome = Literal["reproduced", "lower", "higher", "not measured"]
BACKEND, BASELINE = "cusparselt", "cublaslt"
KIND = ["kind", "model", "dtype", "sparsity", "m", "n", "k"]
"""Columns that say what a speed-up is of; n and k are 0 end to end."""


@lru_cache(maxsize=1)
def machines() -> pd.DataFrame:
    """GPUs of published runs: gpu, device (driver's name, empty without figures), architecture, fp8, hours."""
    return _read("machines.csv", text=("gpu", "device", "description", "architecture"))


@lru_cache(maxsize=1)
def reference_seconds() -> dict[int, float]:
    """Task number -> seconds of the reference run on GB10."""
    frame = _read("reference_run.csv")
    return dict(zip(frame["task"].astype(int), frame["seconds"].astype(float), strict=True))


@lru_cache(maxsize=1)
def speedups() -> pd.DataFrame:
    """Published ratios, columns gpu + KIND + ratio; types that `DType` has, failed (0) latencies left out.

    Square shapes have model SQUARE and m = n = k.
    """
    text = ("gpu", "cpu_arch", "stage", "model", "shapes", "dtype", "backend", "sparsity")
    throughput = _read("throughput.csv", text).rename(columns={"stage": "kind", "M": "m"}).assign(n=0, k=0)
    kernel = _read("kernel_latency.csv", text).rename(columns={"shapes": "model", "M": "m", "N": "n", "K": "k"})
    types = {dtype.suffix: dtype.value for dtype in DType}
    kernel = kernel[(kernel["latency_us"] > 0) & kernel["dtype"].isin(types)].assign(kind="kernel")
    ratios = [_ratios(throughput, "tokens_per_s", inverse=False), _ratios(kernel, "latency_us", inverse=True)]
    frame = pd.concat(ratios, ignore_index=True)
    return frame.assign(dtype=frame["dtype"].map(types))


def same_machine(device: str) -> str:
    """The published GPU that has this driver name, else empty: an H100 SXM is not the published H100 PCIe."""
    table = machines()
    match = table[(table["device"] != "") & (table["device"] == device.strip())]
    return "" if match.empty else str(match["gpu"].iloc[0])


def outcome(published: float, low: float, high: float) -> Outcome:
    """Does the interval [low, high] overlap published +-TOLERANCE? `not measured` without an interval."""
    if not low > 0 or not high > 0:
        return "not measured"
    if high < published * (1 - TOLERANCE):
        return "lower"
    return "higher" if low > published * (1 + TOLERANCE) else "reproduced"


def beside(ours: pd.DataFrame, gpu: str, kinds: Iterable[str] = ("prefill", "decode", "kernel")) -> pd.DataFrame:
    """Every published speed-up of a GPU for the models in `ours`, with our ratio and the outcome.

    `ours`: columns of `compare.SPEEDUP_COLUMNS`. Like with like: only checked ratios of the backends that the
    published figures were made with.
    """
    published = speedups()
    published = published[(published["gpu"] == gpu) & published["kind"].isin(list(kinds))]
    published = published[published["model"].isin(set(ours["model"]))]
    # 16-bit types are no part of the reference run: their figures count where this machine measured them too.
    published = published[published["dtype"].isin({*(d.value for d in DType if d.quantised), *ours["dtype"]})]
    same = ours["checked"].astype(bool) & (ours["backend"] == BACKEND) & (ours["baseline"] == BASELINE)
    mine = ours.loc[same, [*KIND, "ratio", "low", "high"]].drop_duplicates(KIND)
    numbers = {"m": int, "n": int, "k": int}
    both = published.astype(numbers).merge(mine.astype(numbers), on=KIND, how="left", suffixes=("_published", ""))
    found = [outcome(*row) for row in zip(both["ratio_published"], both["low"], both["high"], strict=True)]
    return both.assign(outcome=found)


def _ratios(frame: pd.DataFrame, figure: str, inverse: bool) -> pd.DataFrame:
    cell = ["gpu", "kind", "model", "dtype", "m", "n", "k"]
    dense = frame.loc[(frame["sparsity"] == "") & (frame["backend"] == BASELINE), [*cell, figure]]
    sparse = frame.loc[frame["sparsity"] != "", [*cell, "sparsity", figure]]
    both = sparse.merge(dense, on=cell, suffixes=("", "_dense"))
    ratio = both[f"{figure}_dense"] / both[figure] if inverse else both[figure] / both[f"{figure}_dense"]
    return both.assign(ratio=ratio)[["gpu", *KIND, "ratio"]]


def _read(name: str, text: tuple[str, ...] = ()) -> pd.DataFrame:
    content = (resources.files("slidesparse.report") / "published" / name).read_text(encoding="utf-8")
    frame = pd.read_csv(io.StringIO(content), keep_default_na=False, na_values=[], dtype=dict.fromkeys(text, str))
    return frame.copy()
