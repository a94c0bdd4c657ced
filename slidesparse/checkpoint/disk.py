"""The disk under the checkpoints: measured speed, the floor that it sets, space before starting."""

from __future__ import annotations

import os
import resource
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from slidesparse.checkpoint.direct import write_file
from slidesparse.errors import DiskError
from slidesparse.files import describe_os_error, existing_parent

MIB = 2**20
PROBE_BYTES = 256 * MIB
_SMALLEST_PROBE = 4 * MIB
_PROBE = ".disk-probe"
"""One name, so that a file left behind by a killed run is overwritten by the next."""
_SPARE = 16 * MIB
"""Left free for records and logs."""


@dataclass(frozen=True)
class DiskSpeed:
    """Sequential speed of one folder's disk, MiB/s: written as shards are, flushed; read with a cold page cache."""

    read_mib_s: float
    write_mib_s: float

    def floor_s(self, bytes_read: int, bytes_written: int) -> float:
        """Seconds that the disk alone needs."""
        return bytes_read / MIB / self.read_mib_s + bytes_written / MIB / self.write_mib_s


def measure(folder: Path, work_bytes: int) -> DiskSpeed:
    """Write a file of random bytes as shards are written, drop it from the page cache, read it back, remove it.

    The probe is at most 256 MiB, and a sixteenth of the work that it is for, so that it never costs more
    than it tells.

    Raises:
        DiskError: disk full or read-only.
    """
    size = max(_SMALLEST_PROBE, min(PROBE_BYTES, work_bytes // 16) // MIB * MIB)
    path = folder / _PROBE
    block = np.random.default_rng(0).integers(0, 256, 4 * MIB, dtype=np.uint8)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        write_file(path, [block] * (size // block.size))
        written = time.perf_counter() - started
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        started = time.perf_counter()
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(memoryview(block)):
                pass
        read = time.perf_counter() - started
    except OSError as error:
        raise DiskError(describe_os_error(error, folder) or f"{folder}: {error.strerror}") from None
    finally:
        path.unlink(missing_ok=True)
    return DiskSpeed(read_mib_s=size / MIB / read, write_mib_s=size / MIB / written)


def require(folder: Path, need_bytes: int, what: str) -> None:
    """Make sure before starting that the bytes fit. Raises DiskError with both figures."""
    free = shutil.disk_usage(existing_parent(folder)).free
    need = need_bytes + _SPARE
    if need > free:
        raise DiskError(
            f"{folder}: {what} needs {need / MIB:.0f} MiB, {free / MIB:.0f} MiB are free; "
            "free some space or choose another folder with --data"
        )


def peak_rss_mib() -> float:
    """Largest resident memory of this process so far, file-mapped pages included, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def relative(folder: Path, data: Path) -> str:
    """The folder as records name it: inside the data folder without that, so that records travel."""
    return str(folder.relative_to(data)) if folder.is_relative_to(data) else str(folder)
