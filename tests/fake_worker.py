"""What `child.py` makes in the tests of its protocol: an object that answers, fails, hangs or dies as it is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from typing import Any, NoReturn

import numpy as np
import torch

from slidesparse.errors import CheckpointError, ConfigError, UnsupportedHere, VerificationError

KINDS = {kind.__name__: kind for kind in (CheckpointError, ConfigError, UnsupportedHere, VerificationError)}


class FakeWorker:
    """`start`: what happens when it is made."""

    def __init__(self, start: str = "", value: Any = None) -> None:
        print(f"fake worker {os.getpid()} starts: {start or 'normally'}")
        self.value = value
        if start == "hang":
            time.sleep(60)
        elif start == "die":
            os._exit(3)
        elif start:
            self.fail(start)

    def fail(self, kind: str) -> NoReturn:
        """Raise one of ours, wrapped as frameworks do; or something else."""
        if kind in KINDS:
            try:
                raise KINDS[kind]("q_proj: wrong")
            except KINDS[kind] as error:
                raise RuntimeError("worker failed") from error
        if kind == "gpu memory":
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        raise ValueError("first line\n   second line")

    def double(self, array: np.ndarray) -> np.ndarray:
        return array * 2

    def environment(self, name: str) -> str:
        return os.environ.get(name, "")

    def kept(self) -> Any:
        return self.value

    def hang(self) -> None:
        time.sleep(60)

    def die(self, how: str) -> None:
        """Of a signal, or by itself; a child of its own may stay behind."""
        print("last words")
        if how == "orphan":
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
        os.kill(os.getpid(), signal.SIGKILL)

    def spawn(self) -> int:
        """Start a child of its own, as vLLM does for further ranks."""
        return subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid

    def close(self) -> None:
        print("closed in order")
