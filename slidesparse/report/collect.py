"""Records -> typed frames. The only module of the report that reads the result tree.

Model, type, backend and pattern of a row come from its place in the tree, so that a published file, which
has no such columns, and one of ours are read by one rule. Every cell appears once, with its last row.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from slidesparse import records
from slidesparse.config import Profile
from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError
from slidesparse.files import read_json
from slidesparse.pattern import Sparsity
from slidesparse.plan import SQUARE, Phase
from slidesparse.result_tree import ResultTree
from slidesparse.rows import (
    TEXT_COLUMNS,
    CalibrationRow,
    ConvertLayerRow,
    ConvertRow,
    DecodeRow,
    KernelRow,
    LinearRow,
    PrefillRow,
    PrepareRow,
    Row,
    StepRow,
    TuneRow,
)

PHASES: tuple[Phase, ...] = ("prefill", "decode")
THROUGHPUT_ROWS: dict[Phase, type[Row]] = {"prefill": PrefillRow, "decode": DecodeRow}
EMULATION = "cpu_"
"""Backends of this name compute on the CPU: their times say nothing about sparse tensor cores."""
PUBLISHED_FAILURE = "the published file has -1 here"
_DTYPE_FOLDERS = {name: dtype for dtype in DType for name in (dtype.value, dtype.suffix)}
"""Ours and published ones: FP8 is written both ways."""
_SUFFIX = f"(?:{'|'.join(dtype.suffix for dtype in DType)})"
_THROUGHPUT_NAME = re.compile(r"(?P<model>.+)-(?:INT8|FP8)_(?:prefill|decode)\.csv")
_KERNEL_NAME = re.compile(
    rf"alg_search_(?:(?P<square>{SQUARE})|(?P<model>.+)-{_SUFFIX})(?:_(?P<sparsity>2_(?:\d+|inf)))?\.csv"
)
_TAG_WITH_DTYPE = re.compile(r"_(?:INT8|FP8E4M3)(?=_py)")


@dataclass(frozen=True)
class Records:
    """Everything that the report knows. Frames are empty where no file is; then they have no columns either."""

    tree: ResultTree
    status: dict[str, Any]
    environment: dict[str, Any]
    profile: Profile | None
    prepare: pd.DataFrame
    convert: pd.DataFrame
    layers: pd.DataFrame
    """Layers of all converted models; column `converted` names the model."""
    tune: pd.DataFrame
    """Candidates; columns `model` and `dtype` come from the file name."""
    throughput: dict[Phase, pd.DataFrame]
    """Column `m` is M_prefill or M_decode; `file` is relative to the tree."""
    kernel: pd.DataFrame
    """Columns `model` (SQUARE: M = N = K), `dtype`, `file` come from the place; `K_model` is derived where a file
    lacks it."""
    linear: pd.DataFrame
    """Columns `model`, `dtype`, `file` come from the place."""
    calibration: pd.DataFrame
    steps: pd.DataFrame
    """Categories of profiled engine steps. Columns `model`, `dtype`, `file` come from the place."""
    logs: tuple[str, ...]
    problems: tuple[str, ...]
    """Files that are there and could not be read, one line each."""

    @property
    def emulation(self) -> bool:
        """True where the tree has timed rows and none of them ran on the hardware in question."""
        timed = self._timed()
        if timed:
            return all(bool(frame["emulation"].all()) for frame in timed)
        machine = self.environment.get("machine")
        return isinstance(machine, dict) and "gpu" in machine and machine["gpu"] is None

    @property
    def partly_emulation(self) -> bool:
        """True where a GPU's rows and emulated ones lie in one tree."""
        return not self.emulation and any(bool(frame["emulation"].any()) for frame in self._timed())

    def _timed(self) -> list[pd.DataFrame]:
        return [frame for frame in (*self.throughput.values(), self.kernel, self.linear, self.tune) if not frame.empty]


def trees_in(folder: Path) -> list[ResultTree]:
    """The machines whose results lie in a folder: one for `reports/{tag}`, several for a published tree.

    Raises SlideSparseError when the folder is not there or holds no results.
    """
    if not folder.is_dir():
        raise SlideSparseError(f"{folder}: no such folder; give another machine's reports/TAG")
    tags = {path.name for path in folder.glob("benchmark_kernel/*/alg_search_results/*") if path.is_dir()}
    for path in folder.glob("throughput_benchmark_results/*/*"):
        tags.add(_TAG_WITH_DTYPE.sub("", path.name))
    if not tags and (folder / "benchmark_linear").is_dir():
        tags.add(folder.resolve().name)  # whole layers lie in our own trees alone, whose folder is the tag
    if not tags:
        raise SlideSparseError(f"{folder}: no benchmark results there; give another machine's reports/TAG")
    return [ResultTree(folder, tag) for tag in sorted(tags)]


def collect(tree: ResultTree) -> Records:
    """Read a result tree. A file that cannot be read becomes a line of `problems`; nothing is raised for it."""
    reader = _Reader(tree)
    environment = reader.json(tree.environment)
    return Records(
        tree=tree,
        status=reader.json(tree.status),
        environment=environment,
        profile=reader.profile(environment),
        prepare=reader.table(tree.prepare, PrepareRow),
        convert=reader.table(tree.convert, ConvertRow),
        layers=reader.layers(),
        tune=reader.tune(),
        throughput={phase: reader.throughput(phase) for phase in PHASES},
        kernel=reader.kernel(),
        linear=reader.linear(),
        calibration=reader.table(tree.calibration, CalibrationRow),
        steps=reader.steps(),
        logs=tuple(sorted(path.relative_to(tree.root).as_posix() for path in tree.logs.glob("*.log"))),
        problems=tuple(reader.problems),
    )


class _Reader:
    def __init__(self, tree: ResultTree) -> None:
        self._tree = tree
        self.problems: list[str] = []

    def json(self, path: Path) -> dict[str, Any]:
        if not path.exists():
            return {}
        try:
            value = read_json(path)
        except SlideSparseError as error:
            self._problem(error)
            return {}
        if isinstance(value, dict):
            return value
        self._problem(SlideSparseError(f"{path}: not a JSON object"))
        return {}

    def profile(self, environment: dict[str, Any]) -> Profile | None:
        if "profile_config" not in environment:
            return None
        try:
            return Profile.model_validate(environment["profile_config"])
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(str(part) for part in first["loc"])
            self._problem(SlideSparseError(f"{self._tree.environment}: profile_config.{place}: {first['msg']}"))
            return None

    def table(self, path: Path, row: type[Row], **columns: str) -> pd.DataFrame:
        """The last row of each cell, all columns of `row` present, constant `columns` added."""
        try:
            frame = records.read(path)
        except SlideSparseError as error:
            self._problem(error)
            return pd.DataFrame()
        if frame.empty:
            return pd.DataFrame()
        frame = _complete(frame.assign(**columns), row)
        problem = _bad_key(frame, row)
        if problem:
            self._problem(SlideSparseError(f"{path}: {problem}"))
            return pd.DataFrame()
        return records.latest(frame, row.KEY)

    def layers(self) -> pd.DataFrame:
        paths = sorted(self._tree.convert_layers("x").parent.glob("*.csv"))
        return _join([self.table(path, ConvertLayerRow, converted=path.stem) for path in paths])

    def tune(self) -> pd.DataFrame:
        frames = []
        for path in sorted(self._tree.tuning_store.parent.glob("candidates_*.csv")):
            model, _, suffix = path.stem.removeprefix("candidates_").rpartition("-")
            if suffix in _DTYPE_FOLDERS:
                frames.append(self.table(path, TuneRow, model=model, dtype=_DTYPE_FOLDERS[suffix].value))
        frame = _join(frames)
        if frame.empty:
            return frame
        # A cell that was tuned again under other conditions may have had other candidates: the newest set counts.
        cell = ["model", "dtype", *(name for name in TuneRow.KEY if name != "algorithm")]
        newest = frame.sort_values("time_utc", kind="stable").groupby(cell, sort=False).tail(1)
        newest = newest.assign(whole=newest["algorithm"] == "")[[*cell, "fingerprint", "whole"]]
        both = frame.merge(newest.rename(columns={"fingerprint": "newest"}), on=cell, how="left")
        keep = (both["fingerprint"] == both["newest"]) & ((both["algorithm"] == "") == both["whole"])
        return both[keep].drop(columns=["newest", "whole"]).reset_index(drop=True)

    def throughput(self, phase: Phase) -> pd.DataFrame:
        frames = []
        for dtype in DType:
            root = self._tree.root / "throughput_benchmark_results" / phase / self._tree.tag_with(dtype)
            for path in sorted(root.rglob("*.csv")):
                name = _THROUGHPUT_NAME.fullmatch(path.name)
                folders = path.relative_to(root).parts[:-1]
                if name is None or not 1 <= len(folders) <= 2:
                    continue
                sparsity = str(Sparsity.parse(folders[1])) if len(folders) == 2 else ""
                place = {"model": name["model"], "dtype": dtype.value, "backend": folders[0], "sparsity": sparsity}
                frame = self.table(path, THROUGHPUT_ROWS[phase], **place, file=self._relative(path))
                if not frame.empty:
                    frames.append(_failures(frame.assign(m=frame[f"M_{phase}"]), "tokens_per_s"))
        return _join(frames)

    def kernel(self) -> pd.DataFrame:
        frames = []
        for root in sorted(self._tree.root.glob("benchmark_kernel/*/alg_search_results")):
            for path in sorted((root / self._tree.tag).glob("*/*.csv")):
                name = _KERNEL_NAME.fullmatch(path.name)
                if name is None or path.parent.name not in _DTYPE_FOLDERS:
                    continue
                place = {
                    "model": name["square"] or name["model"],
                    "dtype": _DTYPE_FOLDERS[path.parent.name].value,
                    "backend": root.parent.name.lower(),
                    "sparsity": str(Sparsity.parse(name["sparsity"])) if name["sparsity"] else "",
                }
                frame = self.table(path, KernelRow, **place, file=self._relative(path))
                if not frame.empty:
                    frames.append(_failures(frame, "lat_us_1"))
        return _unlifted(_join(frames))

    def linear(self) -> pd.DataFrame:
        return self._of_models(self._tree.linear("x", DType.INT8).parent, "linear_", LinearRow)

    def steps(self) -> pd.DataFrame:
        return self._of_models(self._tree.step_profile("x", DType.INT8).parent, "steps_", StepRow)

    def _of_models(self, folder: Path, prefix: str, row: type[Row]) -> pd.DataFrame:
        """Tables of a folder whose names are PREFIX, model and type."""
        frames = []
        for path in sorted(folder.glob(f"{prefix}*.csv")):
            model, _, suffix = path.stem.removeprefix(prefix).rpartition("-")
            if suffix in _DTYPE_FOLDERS:
                place = {"model": model, "dtype": _DTYPE_FOLDERS[suffix].value, "file": self._relative(path)}
                frames.append(self.table(path, row, **place))
        return _join(frames)

    def _relative(self, path: Path) -> str:
        return path.relative_to(self._tree.root).as_posix()

    def _problem(self, error: SlideSparseError) -> None:
        self.problems.append(str(error).replace(f"{self._tree.root}/", ""))


def _bad_key(frame: pd.DataFrame, row: type[Row]) -> str:
    """What is wrong with the columns that name a cell; empty if nothing."""
    for name in row.KEY:
        if frame[name].isna().any():
            return f"no number in column {name}"
    types = {*_DTYPE_FOLDERS, *([""] if row is CalibrationRow else [])}
    for name, allowed in (("dtype", types), ("status", {"ok", "failed", "skipped"})):
        unknown = sorted(set(frame[name]) - allowed) if name in frame.columns else []
        if unknown:
            return f"column {name}: {unknown[0]!r} is none of {', '.join(sorted(allowed - {''}))}"
    for sparsity in sorted(set(frame["sparsity"]) - {""}) if "sparsity" in frame.columns else []:
        try:
            Sparsity.parse(sparsity)
        except ValueError as error:
            return str(error)
    return ""


def _complete(frame: pd.DataFrame, row: type[Row]) -> pd.DataFrame:
    """All columns of `row`, filled with their defaults where the file (a published or older one) lacks them."""
    for name, field in row.model_fields.items():
        if name not in frame.columns:
            known = field.default is not PydanticUndefined
            frame[name] = field.default if known else ("" if name in TEXT_COLUMNS else float("nan"))
    if {"emulation", "backend"} <= set(frame.columns):
        # A row that failed before it ran does not say so itself.
        frame["emulation"] = frame["emulation"].astype(bool) | frame["backend"].str.startswith(EMULATION)
    if "status" in frame.columns:
        frame["status"] = frame["status"].replace("", "ok")
    return frame


def _failures(frame: pd.DataFrame, figure: str) -> pd.DataFrame:
    """Published files say only -1 (or nothing) where a cell failed."""
    failed = (frame["status"] == "ok") & ~(frame[figure] > 0)
    frame.loc[failed, "status"] = "failed"
    frame.loc[failed, "reason"] = PUBLISHED_FAILURE
    return frame


def _unlifted(frame: pd.DataFrame) -> pd.DataFrame:
    """Fill `K_model` where the files have none: N of a square shape, else K' is searched among the dense files' K."""
    if frame.empty:
        return frame
    square = frame["model"] == SQUARE
    frame.loc[square & frame["K_model"].isna(), "K_model"] = frame["N"]
    dense = frame["sparsity"] == ""
    frame.loc[dense & frame["K_model"].isna(), "K_model"] = frame["K"]
    for index in frame.index[frame["K_model"].isna()]:
        row = frame.loc[index]
        sizes = sorted(set(frame.loc[dense & (frame["model"] == row["model"]), "K"].astype(int)))
        pattern = Sparsity.parse(str(row["sparsity"]))
        frame.loc[index, "K_model"] = next((k for k in sizes if pattern.lifted_k(k) == row["K"]), float("nan"))
    return frame[frame["K_model"].notna()].astype({"K_model": int}).reset_index(drop=True)


def _join(frames: list[pd.DataFrame]) -> pd.DataFrame:
    frames = [frame for frame in frames if not frame.empty]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()
