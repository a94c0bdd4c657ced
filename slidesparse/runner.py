"""Runs tasks in order and tells the truth about them: `status.json`, one log a run, the exit code."""

from __future__ import annotations

import hashlib
import importlib
import logging
import secrets
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from slidesparse import files, machine
from slidesparse.bake.counts import Counts, counting
from slidesparse.errors import ContextLost, DiskError, SlideSparseError
from slidesparse.kernels.gemm_library import loaded_versions
from slidesparse.plan import Plan, Stage, Task
from slidesparse.result_tree import ResultTree
from slidesparse.run import Outcome, Run
from slidesparse.status import Status

STAGE_MODULES: dict[Stage, str] = {
    "prepare": "slidesparse.checkpoint.prepare",
    "convert": "slidesparse.checkpoint.convert",
    "tune": "slidesparse.tuning.search",
    "prefill": "slidesparse.measure.throughput",
    "decode": "slidesparse.measure.throughput",
    "kernel": "slidesparse.measure.kernel_bench",
    "linear": "slidesparse.measure.linear_bench",
    "calibrate": "slidesparse.measure.calibrate",
}
EXIT_INTERRUPTED = 130
JOINT: frozenset[Stage] = frozenset({"prefill", "decode"})
"""Stages whose module runs several tasks together: `run_tasks(run, tasks)` instead of `run_task(run, task)`."""
RunTasks = Callable[[Run, Sequence[Task]], list[Outcome]]


def result_tree(plan: Plan) -> ResultTree:
    """`reports/{tag}` of this machine."""
    tag = machine.detect().tag_of(plan.profile.vllm.tensor_parallel_size)
    return ResultTree(plan.reports_folder / tag, tag)


@contextmanager
def open_run(plan: Plan, quiet: bool = False) -> Iterator[Run]:
    """A run that owns its result folder: lock, log file, `environment.json`.

    Raises:
        DiskError: the folder cannot be written.
        SlideSparseError: another run holds it.
    """
    tree = result_tree(plan)
    run_id = f"{datetime.now(UTC):%Y%m%dT%H%M%S%f}-{secrets.token_hex(2)}"  # in the order in which runs began
    with files.exclusive(tree.root), _logger(tree.logs / f"{run_id}.log", run_id) as log:
        run = Run(plan, tree, machine.detect(), run_id, log, quiet)
        _write_environment(run)
        with counting(tree.logs / f"{run_id}.triton", here=run.machine.gpu is not None) as counts:
            try:
                yield run
            finally:
                _note_triton_cache(run, counts())


def run_tasks(run: Run, tasks: Iterable[Task]) -> int:
    """Run tasks in order; one that fails does not stop the next. Returns the exit code: 0 if nothing failed.

    Tasks that follow each other and share their engine's start (`JOINT`) are run together. A full or read-only disk
    and Ctrl-C end the run: what had been recorded stays, and the same command resumes.
    """
    status = Status(run)
    failed = False
    for _, group in groupby(list(tasks), key=lambda task: "joint" if task.stage in JOINT else task.number):
        failed = _run_group(run, list(group), status) or failed
    return 1 if failed else 0


def _run_group(run: Run, tasks: list[Task], status: Status) -> bool:
    """Run one task, or several together. True if anything failed."""
    started = time.monotonic()

    def ended(word: str, note: str) -> None:
        for task in tasks:
            run.log.error("task %d %s: %s: %s", task.number, task.name, word, note)
            status.try_update(task, word, time.monotonic() - started, note)

    try:
        for task in tasks:
            run.log.info("task %d %s: %d cells", task.number, task.name, len(task.cells))
            status.update(task, "running")
        outcomes = _stage(tasks[0].stage)(run, tasks)
    except KeyboardInterrupt:
        ended("interrupted", "interrupted; run again to resume")
        raise
    except DiskError as error:
        ended("failed", str(error))
        raise
    except ContextLost as error:
        ended("interrupted", f"{error}; going on in a new process")
        raise
    except SlideSparseError as error:
        ended("failed", str(error))
        return True
    except Exception as error:
        run.log.exception("unexpected error")
        ended("failed", f"{type(error).__name__}: {error} (see log)")
        return True
    for task, outcome in zip(tasks, outcomes, strict=True):
        seconds = time.monotonic() - started if outcome.seconds is None else outcome.seconds
        status.update(task, outcome.status, seconds, outcome)
        run.log.info(
            "task %d %s: %s in %.1f s: %d ok (%d done before), %d failed, %d skipped",
            task.number, task.name, outcome.status, seconds,
            outcome.ok, outcome.done_before, outcome.failed, outcome.skipped,
        )  # fmt: skip
    return any(outcome.failed for outcome in outcomes)


def _stage(stage: Stage) -> RunTasks:
    """Imported when needed: a `plan` or `report` should not wait for the measuring stack."""
    module = importlib.import_module(STAGE_MODULES[stage])
    if stage in JOINT:
        together: RunTasks = module.run_tasks
        return together
    return lambda run, tasks: [module.run_task(run, task) for task in tasks]


@contextmanager
def _logger(path: Path, run_id: str) -> Iterator[logging.Logger]:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = logging.getLogger(f"slidesparse.run.{run_id}")
    log.setLevel(logging.INFO)
    log.propagate = False
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield log
    finally:
        log.removeHandler(handler)
        handler.close()


def _write_environment(run: Run) -> None:
    path = run.tree.environment
    before = files.read_json(path) if path.exists() else {}
    commit = source_commit()
    this = {"run_id": run.run_id, "profile": run.plan.profile_name, "commit": commit}
    files.write_json(
        path,
        {
            "machine": run.machine.describe(),
            "packages": machine.package_versions() | loaded_versions(),
            "commit": commit,
            "lock_sha256": lock_hash(),
            "profile": run.plan.profile_name,
            "profile_config": run.plan.profile.model_dump(mode="json"),
            "runs": [*before.get("runs", []), this],
        },
    )


def _note_triton_cache(run: Run, counts: Counts) -> None:
    """Into the log and the run's entry of `environment.json`; nothing where no kernel was launched."""
    if counts.empty:
        return
    run.log.info("%s", counts)
    try:
        environment = files.read_json(run.tree.environment)
        environment["runs"][-1]["triton_cache"] = vars(counts)
        files.write_json(run.tree.environment, environment)
    except DiskError as error:  # what ended the run says more
        run.log.error("%s", error)


def source_commit() -> str:
    """Commit of the checkout that this package runs from, `+changes` if files differ; empty outside a checkout."""
    folder = Path(__file__).parent
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        dirty = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", str(folder))
    except (OSError, subprocess.CalledProcessError):
        return ""
    return commit + ("+changes" if dirty else "")


def lock_hash() -> str:
    """SHA-256 of the base lock file beside the package; empty where it is not shipped."""
    path = Path(__file__).parent.parent / "requirements" / "base.lock"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else ""


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()
