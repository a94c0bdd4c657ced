"""A process of its own for an object whose crash must not end the run: its own CUDA context, its own log.

Methods are called over a pipe. Errors arrive as the exception that they are here: one of ours, or MemoryError.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing import Pipe
from pathlib import Path
from typing import Any, TypeVar

import slidesparse
from slidesparse import errors
from slidesparse.errors import SlideSparseError

CHILD = "slidesparse.measure.engines.child"
POLL_S = 0.5
"""How often a waiting parent looks whether the child is still there."""
GRACE_S = 20.0
"""For an orderly end; then the process group is killed."""
EXIT_S = 5.0
"""Between the end of the connection and that of the process."""
Raised = TypeVar("Raised", bound=Exception)
TAIL_LINES = 40
"""Of the child's log, attached to an error."""


class ChildProcess:
    """One object in a child process. Several may be started at once; calls to one come from one thread at a time."""

    def __init__(
        self,
        factory: str,
        keywords: Mapping[str, Any],
        *,
        what: str,
        environment: Mapping[str, str],
        start_s: float,
        call_s: float,
    ) -> None:
        """Start it and wait until the object is made.

        Args:
            factory: `module:name` of what makes the object, in the child.
            keywords: its arguments; they are pickled.
            what: names the process in errors and its log.
            environment: variables, besides those here.
            start_s, call_s: seconds after which a start, or a call, counts as hanging.

        Raises:
            What the factory raises (see `child.classify`); SlideSparseError if it dies or hangs.
        """
        self._what, self._call_s = what, call_s
        self._dead: str | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="slidesparse-engine-"))
        self.log = self._folder / f"{''.join(c if c.isalnum() else '_' for c in what)}.log"
        self._connection, theirs = Pipe()
        their_lifeline, self._lifeline = os.pipe()
        package = str(Path(slidesparse.__file__).parents[1])
        path = os.pathsep.join(part for part in (package, os.environ.get("PYTHONPATH", "")) if part)
        try:
            with self.log.open("wb") as log:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", CHILD, str(theirs.fileno()), str(their_lifeline)],
                    pass_fds=(theirs.fileno(), their_lifeline),
                    env={**os.environ, **environment, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,  # Ctrl-C is the parent's; the group is killed as one
                )
        finally:
            theirs.close()
            os.close(their_lifeline)
        try:
            self._exchange((factory, dict(keywords)), "start", start_s)
        except BaseException:
            self._kill()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def call(self, method: str, *arguments: Any) -> Any:
        """What the method returns there.

        Raises:
            What it raises; SlideSparseError if the process died or hangs, and from then on at every call.
        """
        if self._dead is not None:
            raise SlideSparseError(self._dead)
        return self._exchange((method, arguments), method, self._call_s)

    def close(self) -> None:
        """End it, in order where it still answers. Never raises; the log of a process that died is kept."""
        if self._dead is None:
            with suppress(OSError, ValueError):
                self._connection.send(("close", ()))
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)
        self._kill()

    # -- inside ------------------------------------------------------------------------------------------

    def _exchange(self, message: object, doing: str, limit_s: float) -> Any:
        try:
            self._connection.send(message)
        except OSError:
            raise self._died(doing) from None
        until = time.monotonic() + limit_s
        while not self._answered(doing):
            if time.monotonic() > until:
                self._end(f"gave no answer to {doing} in {limit_s:g} s")
                raise self._noted(SlideSparseError(self._dead))
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._died(doing) from None
        if answer[0] == "ok":
            return answer[1]
        _, kind, line, trace = answer
        raise self._noted(_exception(kind, line), trace)

    def _answered(self, doing: str) -> bool:
        try:
            if self._connection.poll(POLL_S):
                return True
            # A grandchild may hold the connection open, so its end alone says nothing.
            gone = self._process.poll() is not None and not self._connection.poll(0)
        except OSError:
            gone = True
        if gone:
            raise self._died(doing)
        return False

    def _died(self, doing: str) -> SlideSparseError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(EXIT_S)
        code = self._process.poll()
        if code is None:
            how = "connection lost"
        elif code < 0:
            how = f"signal {signal.Signals(-code).name}"
        else:
            how = f"exit code {code}"
        self._end(f"died ({how}) in {doing}")
        return self._noted(SlideSparseError(self._dead))

    def _end(self, how: str) -> None:
        self._dead = f"{self._what}: engine process {how}; see {self.log}"
        self._kill()

    def _noted(self, error: Raised, trace: str = "") -> Raised:
        """With the child's traceback and the end of its log, which a traceback here then shows."""
        with suppress(OSError):
            lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
            error.add_note("\n".join([f"-- end of the log of {self._what} --", *lines]))
        if trace:
            error.add_note(f"-- in the engine process --\n{trace}")
        return error

    def _kill(self) -> None:
        """The process and what it started; once."""
        if self._lifeline < 0:
            return
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._connection.close()
        os.close(self._lifeline)
        self._lifeline = -1
        if self._dead is None:
            self._dead = f"{self._what}: engine process is closed"
            shutil.rmtree(self._folder, ignore_errors=True)


def _exception(kind: str, line: str) -> Exception:
    if kind == "MemoryError":
        return MemoryError(line)
    found = getattr(errors, kind, SlideSparseError)
    return found(line) if issubclass(found, SlideSparseError) else SlideSparseError(line)
