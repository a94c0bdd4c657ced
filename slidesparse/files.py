"""Files that are whole or absent: temporary name, fsync, rename."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slidesparse.errors import DiskError, SlideSparseError

PARTIAL = ".partial"
"""Ending of a file that is being written; one left behind by a killed run is overwritten by the next."""


@contextmanager
def atomic_path(target: Path) -> Iterator[Path]:
    """Yield a temporary path beside `target`; on success it is flushed to disk and renamed to `target`.

    On any error the temporary file is removed and `target` is as before.

    Raises:
        DiskError: the disk is full or the folder cannot be written (one line, with the path).
    """
    partial = target.with_name(target.name + PARTIAL)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield partial
        with partial.open("rb") as stream:
            os.fsync(stream.fileno())
        partial.replace(target)
    except BaseException as error:
        partial.unlink(missing_ok=True) if partial.parent.is_dir() else None
        problem = describe_os_error(error, target)
        if problem is None:
            raise
        raise DiskError(problem) from error


def describe_os_error(error: BaseException, target: Path) -> str | None:
    """One line for errors of the disk that a user can act on, else None.

    safetensors wraps I/O errors in its own type, so the text is looked at as well.
    """
    number = error.errno if isinstance(error, OSError) else None
    text = str(error)
    if number in (errno.ENOSPC, errno.EDQUOT) or "No space left" in text:
        free = shutil.disk_usage(existing_parent(target)).free
        return f"{target}: disk full ({free / 2**20:.0f} MiB free); free some space and run the same command again"
    if (
        number in (errno.EROFS, errno.EACCES, errno.EPERM)
        or "Read-only file system" in text
        or "Permission denied" in text
    ):
        return f"{target}: cannot write there (read-only or no permission); choose another folder with --data"
    if number in (errno.ENOTDIR, errno.EEXIST, errno.EISDIR):
        return f"{target}: a file or folder of another kind is in the way; move it aside"
    return None


def existing_parent(path: Path) -> Path:
    """The nearest ancestor of `path` that exists (for disk-space questions about a file not yet there)."""
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_text(target: Path, text: str) -> None:
    """Write a text file whole. Raises DiskError as `atomic_path` does."""
    with atomic_path(target) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(target: Path, value: Any) -> None:
    """Write JSON whole, keys in the order given. Raises DiskError as `atomic_path` does."""
    write_text(target, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Read JSON. Raises SlideSparseError naming the file when it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SlideSparseError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise SlideSparseError(f"{path}: not JSON: {error}") from None


def link_or_copy(source: Path, target: Path) -> bool:
    """Give `target` the content of `source` as a hard link, or as a copy where links are not to be had.

    Safe because no file of ours is ever changed in place. Returns True if it was a link.
    """
    linked = False
    with atomic_path(target) as partial:
        partial.unlink(missing_ok=True)
        try:
            os.link(source, partial)
            linked = True
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EROFS, errno.EACCES):
                raise
            shutil.copyfile(source, partial)
    return linked


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the folder for one run. Raises SlideSparseError when another process holds it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stream = (folder / ".lock").open("w")
    except OSError as error:
        raise DiskError(describe_os_error(error, folder) or f"{folder}: {error.strerror}") from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SlideSparseError(
                f"{folder}: another run is writing there; wait for it or use another --data"
            ) from None
        yield
