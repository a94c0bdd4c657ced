"""Large files written past the page cache.

A converted model is written once and is larger than most caches. Copying it through the page cache took a
third of the whole stage's CPU time on the machine this was measured on (2 cores: 1.5 s of system time a GB,
870 MB/s; direct: 0.03 s a GB, 1800 MB/s). File systems without direct I/O (some network and memory ones)
get plain writes.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from slidesparse.pattern import align

Bytes = npt.NDArray[np.uint8]
CHUNK = 4 * 2**20
_BLOCK = 4096
"""Direct I/O wants memory, offsets and sizes that are multiples of the disk's block."""
_NO_DIRECT_IO = (errno.EINVAL, errno.EOPNOTSUPP)


def write_file(path: Path, parts: Iterable[Bytes]) -> int:
    """Write 1-D byte arrays one after the other into a new file, and flush it to the disk. Returns its size.

    Raises OSError as the system gives it.
    """
    parts = list(parts)
    try:
        return _write_direct(path, parts)
    except OSError as error:
        if error.errno not in _NO_DIRECT_IO:
            raise
    with path.open("wb", buffering=0) as stream:
        for part in parts:
            _write_all(stream.fileno(), memoryview(part))
        os.fsync(stream.fileno())
    return sum(part.size for part in parts)


def _write_direct(path: Path, parts: list[Bytes]) -> int:
    size = sum(part.size for part in parts)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_DIRECT", 0), 0o666)
    try:
        # Anonymous memory is page-aligned. Its size is limited so that it stays in the core's cache.
        staging = np.frombuffer(mmap.mmap(-1, CHUNK), dtype=np.uint8)
        filled = 0
        for part in parts:
            done = 0
            while done < part.size:
                count = min(CHUNK - filled, part.size - done)
                np.copyto(staging[filled : filled + count], part[done : done + count])
                filled, done = filled + count, done + count
                if filled == CHUNK:
                    _write_all(descriptor, memoryview(staging))
                    filled = 0
        if filled:
            _write_all(descriptor, memoryview(staging[: align(filled, _BLOCK)]))
            os.ftruncate(descriptor, size)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    return size


def _write_all(descriptor: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        done += os.write(descriptor, data[done:])
