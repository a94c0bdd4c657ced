"""Triton's cache in two layers: a baked one that is only read, and Triton's own for all that is not in it.

    SLIDESPARSE_TRITON_CACHE=FOLDER TRITON_CACHE_MANAGER=slidesparse.bake.overlay:BakedCache

Triton looks for its cache in one folder, and engines move that folder for processes of theirs (vLLM into its own cache,
torch.compile into a temporary one): with the environment above they all find what was baked. The baked folder may be
read-only and may lie elsewhere than where it was made.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from triton.runtime.cache import CacheManager, FileCacheManager

from slidesparse.bake.cache import baked_folder, group

BAKING = f"{__name__}:Baking"
"""For TRITON_CACHE_MANAGER while baking."""


class BakedCache(CacheManager):  # type: ignore[misc]
    """One entry of the cache, as Triton asks for it."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        self._arguments = (key, override, dump)
        folder = None if override or dump else baked_folder()
        self._folder = folder if folder is not None and (folder / key).is_dir() else None

    @cached_property
    def _own(self) -> Any:
        """Triton's own layer, which makes a folder as soon as it is asked."""
        return FileCacheManager(*self._arguments)

    def get_file(self, filename: str) -> str | None:
        if self._folder is not None and (path := self._folder / self._arguments[0] / filename).is_file():
            return str(path)
        found: str | None = self._own.get_file(filename)
        return found

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        path: str = self._own.put(data, filename, binary)
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self._folder is not None and (files := group(self._folder, self._arguments[0], filename)) is not None:
            return files
        found: dict[str, str] | None = self._own.get_group(filename)
        return found

    def put_group(self, filename: str, group: dict[str, str]) -> Any:
        return self._own.put_group(filename, group)


class Baking(FileCacheManager):  # type: ignore[misc]
    """Triton's own layout, as it is written while baking."""

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        """A kernel's intermediate code stays empty: it is two thirds of all bytes and of no use later."""
        path: str = super().put("" if filename.endswith(".source") else data, filename, binary)
        return path

    def get_group(self, filename: str) -> dict[str, str] | None:
        """Only what is whole in this very folder, wherever it was made, counts as there."""
        return group(Path(self.cache_dir).parent, self.key, filename)
