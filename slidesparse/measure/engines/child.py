"""The other end of `process.ChildProcess`: makes an object and calls its methods as the parent asks.

    python -m slidesparse.measure.engines.child CONNECTION LIFELINE

Both are inherited file descriptors. The first message names what makes the object (`module:name`) and its keywords;
every later one is a method and its arguments. Answers are `("ok", value)` or `("error", type, line, traceback)`.
"""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from slidesparse.errors import SlideSparseError

LONGEST_LINE = 400
"""Characters of the one line that stands for an error of others."""


def main() -> None:
    """Serve until the parent says `close` or is gone."""
    connection, lifeline = Connection(int(sys.argv[1])), int(sys.argv[2])
    threading.Thread(target=_die_with_parent, args=(lifeline,), daemon=True).start()
    served = _serve(connection)
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: destructors of a large process take seconds, and the driver frees a GPU's memory anyway.
    os._exit(0 if served else 1)


def _serve(connection: Connection) -> bool:
    """False where the object could not be made."""
    try:
        factory, keywords = connection.recv()
        module, _, name = factory.partition(":")
        target = getattr(importlib.import_module(module), name)(**keywords)
    except Exception as error:
        connection.send(_failure(error))
        return False
    connection.send(("ok", None))
    while True:
        try:
            method, arguments = connection.recv()
        except EOFError:  # the parent is gone; leaving by ourselves would race with `_die_with_parent`
            _end_group()
        answer: tuple[Any, ...]
        try:
            answer = ("ok", getattr(target, method)(*arguments))
        except Exception as error:
            answer = _failure(error)
        connection.send(answer)
        if method == "close":
            return True


def _die_with_parent(lifeline: int) -> None:
    """The parent holds the only other end: end of file means that it is gone. Takes own children along.

    NOTE: PR_SET_PDEATHSIG would fire when the *thread* ends that started this process, which pools do all the time.
    """
    os.read(lifeline, 1)
    _end_group()


def _end_group() -> NoReturn:
    """This process and its own children, which ranks of an engine are."""
    os.killpg(os.getpgrp(), signal.SIGKILL)
    raise AssertionError("unreachable")


def _failure(error: BaseException) -> tuple[str, str, str, str]:
    """Type (of ours, or MemoryError), one line, and the traceback."""
    kind, line = classify(error)
    return "error", kind, line, "".join(traceback.format_exception(error))


def classify(error: BaseException) -> tuple[str, str]:
    """Name of the exception that the parent raises, and its text in one line.

    An error of ours counts wherever it is in the chain: frameworks wrap what a plugin raises.
    """
    for cause in _chain(error):
        if isinstance(cause, SlideSparseError):
            return type(cause).__name__, str(cause)
    for cause in _chain(error):
        text = one_line(str(cause))
        if isinstance(cause, MemoryError) or type(cause).__name__ == "OutOfMemoryError" or "out of memory" in text:
            return "MemoryError", text or "out of memory"
    return "SlideSparseError", f"{type(error).__name__}: {one_line(str(error))}"


def one_line(text: str) -> str:
    """All white space made single blanks, and the end cut off."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..."


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


if __name__ == "__main__":
    main()
