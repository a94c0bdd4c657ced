"""Result folders of one machine put together: what ran apart, a type on each GPU, becomes one tree and one report."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path, PurePath
from typing import Any

from slidesparse import files, records, status
from slidesparse.errors import RecordError, SlideSparseError
from slidesparse.kernels.lost_contexts import LostContexts
from slidesparse.plan import Plan
from slidesparse.result_tree import ResultTree
from slidesparse.rows import (
    CalibrationRow,
    ConvertLayerRow,
    ConvertRow,
    DecodeRow,
    KernelDenseRow,
    KernelRow,
    LinearRow,
    PrefillRow,
    PrepareRow,
    Row,
    StepRow,
    TuneRow,
)
from slidesparse.runner import result_tree
from slidesparse.tuning.store import TuningStore

_ROWS: dict[str, type[Row]] = {
    "preparation": PrepareRow,
    "conversion": ConvertRow,
    "conversion/layers": ConvertLayerRow,
    "tuning": TuneRow,
    "throughput_benchmark_results/prefill": PrefillRow,
    "throughput_benchmark_results/decode": DecodeRow,
    "benchmark_kernel": KernelRow,
    "benchmark_linear": LinearRow,
    "step_profile": StepRow,
    "calibration": CalibrationRow,
}
"""What the tables of a folder, and of those in it, hold."""
_SPARSE_NAME = re.compile(r".+_2_(?:\d+|inf)\.csv")


def merge(plan: Plan, folders: Sequence[Path]) -> ResultTree:
    """Take the records of other result folders (`reports/TAG`) into this machine's own, which is returned.

    Tables are extended by the rows that they lack; where both have a cell, the later row counts (`records.merged`), and
    of two winners of tuning the later one. A changed winner makes cells that were measured with the older one due
    again, as when it is tuned again. Models, figures and the report are not taken over. A folder is read whole before
    anything is written, so one that cannot be read changes nothing. Each file is replaced whole and nothing is
    added twice, so a merge that was interrupted is run again, and a second one changes nothing.

    Raises:
        SlideSparseError: no result folder, or of another machine; a run is writing to one of them.
        RecordError: a file of theirs or ours that cannot be read, named.
        DiskError: disk full, or a folder cannot be written (theirs is locked while it is read).
    """
    tree = result_tree(plan)
    others = [_other(tree, folder) for folder in folders]
    with files.exclusive(tree.root):
        for other in others:
            with files.exclusive(other.root):
                _take(plan, tree, other)
    return tree


def _other(tree: ResultTree, folder: Path) -> ResultTree:
    """The result tree of a folder, which must be of this machine, but not the one that is merged into."""
    other = ResultTree(folder, tree.tag)
    if not other.status.is_file():
        raise SlideSparseError(f"{folder}: no results there (status.json); give reports/TAG of another data folder")
    tag = status.load(other.status)["tag"]
    if tag != tree.tag:
        raise SlideSparseError(
            f"{folder}: results of {tag}, and this is {tree.tag}; other machines are compared in a report "
            f"(`report --other {folder}`), not merged"
        )
    if folder.resolve() == tree.root.resolve():
        raise SlideSparseError(f"{folder}: is the folder to merge into; give reports/TAG of another data folder")
    return other


def _take(plan: Plan, tree: ResultTree, other: ResultTree) -> None:
    """One folder. What is there says that work is done, so it is written in the order in which a run does it."""
    tables: dict[Path, str] = {}
    for path in sorted(other.root.rglob("*.csv")):
        own = tree.root / path.relative_to(other.root)
        text = records.merged(own, path, _row_type(path, path.relative_to(other.root)))
        if text is not None:
            tables[own] = text
    store, losses = TuningStore.open(tree.tuning_store, {}), LostContexts.open(tree.lost_contexts, {})
    better, lost = TuningStore.open(other.tuning_store, {}), LostContexts.open(other.lost_contexts, {})
    tasks, (before, environment) = status.load(other.status), _environments(plan, tree, other)
    if losses.take(lost):
        losses.save()
    if store.take(better):
        store.save()
    for path, text in tables.items():
        files.write_text(path, text)
    for path in sorted(other.logs.glob("*.log")):
        if not (tree.logs / path.name).exists():
            with files.atomic_path(tree.logs / path.name) as partial:
                shutil.copyfile(path, partial)
    if environment != before:
        files.write_json(tree.environment, environment)
    status.merge(plan, tree, tasks)


def _environments(plan: Plan, tree: ResultTree, other: ResultTree) -> tuple[dict[str, Any], dict[str, Any]]:
    """`environment.json` as it is here and as it is to be: the plan's profile, and the runs of both, oldest first."""
    ours, theirs = ({}, {})
    if tree.environment.exists():
        ours = files.read_json(tree.environment)
    if other.environment.exists():
        theirs = files.read_json(other.environment)
    for path, found in ((tree.environment, ours), (other.environment, theirs)):
        if not isinstance(found, dict):
            raise RecordError(f"{path}: not a description of an environment; move it aside")
    runs = {run["run_id"]: run for side in (theirs, ours) for run in side.get("runs", [])}
    profile = {"profile": plan.profile_name, "profile_config": plan.profile.model_dump(mode="json")}
    return ours, theirs | ours | profile | {"runs": [runs[run_id] for run_id in sorted(runs)]}


def _row_type(path: Path, place: PurePath) -> type[Row]:
    """What a table holds, by its place in the tree. Raises RecordError for one that this version does not write."""
    for folder in place.parents:
        if folder.as_posix() in _ROWS:
            row = _ROWS[folder.as_posix()]
            return KernelDenseRow if row is KernelRow and not _SPARSE_NAME.fullmatch(place.name) else row
    raise RecordError(f"{path}: no table of this version; move it aside")
