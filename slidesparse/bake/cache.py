"""A baked cache on disk: Triton's own layout, and an index that says what was baked by what.

    FOLDER/slidesparse-index.json
    FOLDER/{base32 of a digest}/__grp__{kernel}.json, {kernel}.json, {kernel}.cubin, {kernel}.source (empty)
    FOLDER/{base32 of a digest}/__triton_launcher{suffix of extension modules}

Triton writes absolute paths into the `__grp__` files. Here only their last parts count, so that a folder may be moved.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidesparse import files
from slidesparse.errors import SlideSparseError

VARIABLE = "SLIDESPARSE_TRITON_CACHE"
"""Names the folder of a baked cache: see `overlay`."""
INDEX = "slidesparse-index.json"
FORMAT = 1
GROUP = "__grp__"


def key_of(digest: str) -> str:
    """Name of a cache entry's folder. digest: SHA-256, hexadecimal."""
    return base64.b32encode(bytes.fromhex(digest)).decode().rstrip("=")


def group(folder: Path, key: str, filename: str) -> dict[str, str] | None:
    """Files of the kernel whose metadata is `filename`, name -> path; None unless all of them are there."""
    entry = folder / key
    try:
        listed = json.loads((entry / f"{GROUP}{filename}").read_text(encoding="utf-8"))["child_paths"]
    except (OSError, ValueError, KeyError):
        return None
    found = {name: entry / Path(path).name for name, path in listed.items()}
    return {name: str(path) for name, path in found.items()} if all(p.is_file() for p in found.values()) else None


def holds_kernel(folder: Path, digest: str, name: str) -> bool:
    """Whether Triton finds the kernel of that digest, machine code and all, and compiles nothing."""
    found = group(folder, key_of(digest), f"{name}.json")
    return found is not None and {f"{name}.json", f"{name}.cubin"} <= found.keys()


def holds_file(folder: Path, digest: str, name: str) -> bool:
    """Whether a single file of that digest (a C launcher) is there."""
    return (folder / key_of(digest) / name).is_file()


def size(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


@dataclass(frozen=True)
class Toolchain:
    """What a cache was made by: with another Triton, Python or ptxas there is another key for every kernel."""

    triton: str
    triton_key: str
    """8 hexadecimal digits over Triton's own files, its compiled library included."""
    python: str
    """Ending of extension modules, which holds version and CPU: `.cpython-312-x86_64-linux-gnu.so`."""
    ptxas: dict[str, str] = field(default_factory=dict)
    """Version by architecture (`90`)."""

    def difference(self, other: Toolchain, architecture: int) -> str:
        """What differs for kernels of one architecture, in words; empty if nothing does. `other`: what is here."""
        place = str(architecture)
        pairs = {
            "Triton": (self.triton, other.triton),
            "the build of Triton": (self.triton_key, other.triton_key),
            "Python": (self.python, other.python),
            f"ptxas for sm_{place}": (self.ptxas.get(place, "none"), other.ptxas.get(place, "none")),
        }
        return ", ".join(f"{name} {theirs}, here {ours}" for name, (theirs, ours) in pairs.items() if theirs != ours)


@dataclass(frozen=True)
class Index:
    """What a folder holds."""

    toolchain: Toolchain
    profiles: tuple[str, ...]
    architectures: tuple[int, ...]
    kernels: dict[str, str]
    """Digest -> the specialisation in words."""
    launchers: dict[str, str]
    """Digest -> file name."""

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Raises SlideSparseError when there is no index, or not one of this format."""
        path = folder / INDEX
        value: Any = files.read_json(path)
        try:
            if value["format"] != FORMAT:
                raise SlideSparseError(f"{path}: format {value['format']}, this version reads {FORMAT}; bake again")
            return cls(
                Toolchain(**value["toolchain"]),
                tuple(value["profiles"]),
                tuple(value["architectures"]),
                value["kernels"],
                value["launchers"],
            )
        except (KeyError, TypeError):
            raise SlideSparseError(f"{path}: not the index of a baked cache; bake again") from None

    def write(self, folder: Path) -> None:
        """Nothing in it tells the time, so that two bakes of one commit are alike. Raises DiskError."""
        files.write_json(
            folder / INDEX,
            {
                "format": FORMAT,
                "toolchain": vars(self.toolchain),
                "profiles": self.profiles,
                "architectures": self.architectures,
                "launchers": self.launchers,
                "kernels": self.kernels,
            },
        )

    def and_(self, more: Index) -> Index:
        """Both, where one toolchain made both; else `more` alone, since the rest would never be found again."""
        before, now = self.toolchain, more.toolchain
        if (before.triton, before.triton_key, before.python) != (now.triton, now.triton_key, now.python):
            return more
        return Index(
            Toolchain(now.triton, now.triton_key, now.python, dict(_sorted(before.ptxas | now.ptxas))),
            tuple(sorted({*self.profiles, *more.profiles})),
            tuple(sorted({*self.architectures, *more.architectures})),
            dict(_sorted(self.kernels | more.kernels)),
            dict(_sorted(self.launchers | more.launchers)),
        )


def _sorted(table: dict[str, str]) -> Iterable[tuple[str, str]]:
    return sorted(table.items())


def baked_folder() -> Path | None:
    """The folder that the environment names; None where it names none."""
    named = os.environ.get(VARIABLE)
    return Path(named) if named else None
