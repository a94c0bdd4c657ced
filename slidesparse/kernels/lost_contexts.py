"""Algorithms that crash the GPU's context, remembered, so that a search loses each of them once.

An illegal instruction or address, or a kernel that never ends: nothing more runs in that process. (Seen: cuSPARSELt
0.8.0, FP16, algorithm 36 on sm_90.) The algorithm is written down and the run goes on in a new process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from slidesparse import files
from slidesparse.dtypes import DType
from slidesparse.errors import ContextLost, RecordError, SlideSparseError
from slidesparse.kernels.backend import Backend

HUNG_S = 20.0
"""No GEMM of any plan takes as long."""


class LostContexts:
    """The list of a machine, and the guard that adds to it. Use `open`."""

    def __init__(self, path: Path | None, entries: list[dict[str, Any]], versions: Mapping[str, str]) -> None:
        """`path` None: nothing is remembered."""
        self._path, self._entries, self._versions = path, entries, dict(versions)

    @classmethod
    def open(cls, path: Path, versions: Mapping[str, str]) -> LostContexts:
        """Read the list; empty where there is no file. Entries count under the library versions they were seen with.

        Raises RecordError.
        """
        entries = files.read_json(path) if path.exists() else []
        if not isinstance(entries, list) or not all({"backend", "dtype", "algorithm"} <= set(e) for e in entries):
            raise RecordError(f"{path}: not a list of lost contexts; move it aside")
        return cls(path, entries, versions)

    def take(self, other: LostContexts) -> bool:
        """Add what another list bars and this one does not; `save` writes it. False if there was nothing."""
        known = [_barred(entry) for entry in self._entries]
        added = [entry for entry in other._entries if _barred(entry) not in known]
        self._entries = [*self._entries, *added]
        return bool(added)

    def save(self) -> None:
        """Write the file whole, if there is to be one. Raises DiskError."""
        if self._path is not None:
            files.write_json(self._path, self._entries)

    def barred(self, side: Backend, dtype: DType) -> frozenset[str]:
        """Names of algorithms that must not be run."""
        wanted = {"backend": side.name, "dtype": dtype.value, "versions": self._versions}
        return frozenset(e["algorithm"] for e in self._entries if {name: e.get(name) for name in wanted} == wanted)

    @contextmanager
    def guard(self, side: Backend, dtype: DType, algorithm: str) -> Iterator[None]:
        """Runs of one algorithm. Raises ContextLost, after writing it down, when an error takes the context with it."""
        try:
            yield
        except ContextLost:
            raise
        except Exception as error:
            if side.device != "cuda" or not (isinstance(error, TimeoutError) or _context_is_lost()):
                raise
            text = " ".join(str(error).split())[:200]
            entry = {"backend": side.name, "dtype": dtype.value, "algorithm": algorithm, "versions": self._versions}
            self._entries.append(entry | {"error": text})
            self.save()
            raise ContextLost(
                f"{side.name} {dtype.value} algorithm {algorithm} crashed the GPU context: {text}"
            ) from None

    @contextmanager
    def cell(self, side: Backend, dtype: DType, cell: str) -> Iterator[None]:
        """A whole cell: what crashes outside a check (timing, kernels around the GEMM) bars the cell, no algorithm.

        Raises SlideSparseError when the cell has crashed the context before: running it again would do so again.
        """
        if cell in self.barred(side, dtype):
            raise SlideSparseError("crashed the GPU context in an earlier run with these library versions")
        with self.guard(side, dtype, cell):
            yield


def _barred(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry but for the words of its error."""
    return {name: entry.get(name) for name in ("backend", "dtype", "algorithm", "versions")}


def settle(side: Backend) -> None:
    """Wait, however long, for what was launched: a reference in float64 takes most GPUs longer than `HUNG_S`."""
    if side.device == "cuda":
        import torch

        torch.cuda.synchronize()


def wait(side: Backend, seconds: float = HUNG_S) -> None:
    """Wait for what was launched since `settle`. Raises TimeoutError where it does not end: such a kernel cannot be
    stopped."""
    if side.device != "cuda":
        return
    import torch

    done = torch.cuda.Event()
    done.record()
    limit = time.monotonic() + seconds
    while not done.query():
        if time.monotonic() > limit:
            raise TimeoutError(f"no end after {seconds:.0f} s")


def _context_is_lost() -> bool:
    import torch

    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
