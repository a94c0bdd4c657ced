"""An engine in a process of its own: its errors arrive as they were, and its death ends nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from slidesparse import errors
from slidesparse.errors import SlideSparseError
from slidesparse.measure.engines.child import classify, one_line
from slidesparse.measure.engines.process import ChildProcess

Opener = Callable[..., ChildProcess]
TESTS = str(Path(__file__).parent)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Starts fake workers; closes them in the end."""
    monkeypatch.setenv("PYTHONPATH", TESTS)
    processes: list[ChildProcess] = []

    def open_one(start: str = "", start_s: float = 60.0, call_s: float = 60.0, **keywords: Any) -> ChildProcess:
        process = ChildProcess(
            "fake_worker:FakeWorker", {"start": start} | keywords, what="Tiny vllm",
            environment={"FROM_THE_ENGINE": "yes"}, start_s=start_s, call_s=call_s,
        )  # fmt: skip
        processes.append(process)
        return process

    yield open_one
    for process in processes:
        process.close()


def gone(pid: int) -> bool:
    """Within a second or two."""
    for _ in range(40):
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_calls_give_values_and_the_environment_is_set(opened: Opener) -> None:
    process = opened(value={"a": (1, 2)})
    assert process.call("kept") == {"a": (1, 2)}
    assert np.array_equal(process.call("double", np.arange(6).reshape(2, 3)), [[0, 2, 4], [6, 8, 10]])
    assert process.call("environment", "FROM_THE_ENGINE") == "yes"


def test_several_start_at_once_and_are_apart(opened: Opener) -> None:
    """In threads that end: a child belongs to the process, not to the thread that started it."""
    with ThreadPoolExecutor(3) as pool:
        processes = list(pool.map(lambda value: opened(value=value), range(3)))
    time.sleep(0.2)
    assert [process.call("kept") for process in processes] == [0, 1, 2]
    assert len({process.pid for process in processes}) == 3


@pytest.mark.parametrize("kind", ["CheckpointError", "ConfigError", "UnsupportedHere", "VerificationError"])
def test_errors_of_ours_arrive_as_they_were_raised(opened: Opener, kind: str) -> None:
    process = opened()
    with pytest.raises(getattr(errors, kind)) as caught:
        process.call("fail", kind)
    assert str(caught.value) == "q_proj: wrong"
    assert "RuntimeError: worker failed" in "\n".join(caught.value.__notes__), "the child's traceback is attached"
    assert process.call("kept") is None, "the session lives on"


def test_other_errors_are_one_line_and_memory_is_memory(opened: Opener) -> None:
    process = opened()
    with pytest.raises(MemoryError) as memory:
        process.call("fail", "gpu memory")
    assert str(memory.value) == "CUDA out of memory. Tried to allocate 2 GiB"
    with pytest.raises(SlideSparseError) as other:
        process.call("fail", "other")
    assert str(other.value) == "ValueError: first line second line"


def test_what_fails_at_the_start_is_raised_there_with_the_log(opened: Opener) -> None:
    with pytest.raises(errors.CheckpointError, match="q_proj: wrong") as caught:
        opened("CheckpointError")
    assert "starts: CheckpointError" in "\n".join(caught.value.__notes__)


def test_a_start_that_hangs_is_ended(opened: Opener) -> None:
    with pytest.raises(SlideSparseError, match=r"Tiny vllm: engine process gave no answer to start in 3 s; see"):
        opened("hang", start_s=3.0)


def test_a_child_that_dies_at_the_start(opened: Opener) -> None:
    with pytest.raises(SlideSparseError, match=r"Tiny vllm: engine process died \(exit code 3\) in start; see "):
        opened("die")


@pytest.mark.parametrize("how", ["alone", "orphan"])
def test_a_killed_child_is_noticed_and_stays_dead(opened: Opener, how: str) -> None:
    """Also if a child of its own still holds the connection."""
    process = opened()
    with pytest.raises(SlideSparseError, match=r"died \(signal SIGKILL\) in die; see ") as caught:
        process.call("die", how)
    assert "last words" in process.log.read_text()
    assert "last words" in "\n".join(caught.value.__notes__)
    with pytest.raises(SlideSparseError, match=r"died \(signal SIGKILL\) in die; see "):
        process.call("kept")
    process.close()
    assert process.log.is_file(), "its log is what remains"


def test_a_call_that_hangs_is_ended(opened: Opener) -> None:
    process = opened(call_s=1.5)
    with pytest.raises(SlideSparseError, match=r"gave no answer to hang in 1.5 s"):
        process.call("hang")
    assert gone(process.pid)


def test_close_ends_it_with_its_children_and_removes_the_log(opened: Opener) -> None:
    process = opened()
    grandchild = process.call("spawn")
    log = process.log
    process.close()
    process.close()
    assert gone(process.pid)
    assert gone(grandchild)
    assert not log.exists()
    with pytest.raises(SlideSparseError, match="is closed"):
        process.call("kept")


def test_the_child_dies_with_its_parent() -> None:
    """However the parent ends; also while the child is busy."""
    program = (
        "import threading, time\n"
        "from slidesparse.measure.engines.process import ChildProcess\n"
        "p = ChildProcess('fake_worker:FakeWorker', {}, what='x', environment={}, start_s=60, call_s=60)\n"
        "print(p.pid, p.call('spawn'), flush=True)\n"
        "threading.Thread(target=p.call, args=('hang',)).start()\n"
        "time.sleep(60)\n"
    )
    path = os.pathsep.join([TESTS, str(Path(TESTS).parent)])
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert parent.stdout is not None
    child, grandchild = (int(pid) for pid in parent.stdout.readline().split())
    parent.kill()
    parent.wait()
    assert gone(child)
    assert gone(grandchild)


def test_the_cause_that_says_most_is_named() -> None:
    error = ValueError("engine core failed")
    error.__cause__ = RuntimeError("CUDA error: out of memory")
    assert classify(error) == ("MemoryError", "CUDA error: out of memory")
    assert classify(KeyError("x")) == ("SlideSparseError", "KeyError: 'x'")
    assert len(one_line("word " * 1000)) < 500
