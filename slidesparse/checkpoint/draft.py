"""A checkpoint folder being filled: one shard a decoder layer, one for the rest, config.json last.

Every finished shard carries the recipe that it was made by, so a killed run resumes at the first missing
shard, and shards of another recipe are made again. Until `finish` the folder does not open as a checkpoint.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slidesparse.checkpoint.checkpoint import CONFIG, Checkpoint, shard_name, write_config
from slidesparse.checkpoint.pipeline import Background
from slidesparse.checkpoint.shard import INDEX, Shard, finished, write_shard
from slidesparse.errors import CheckpointError, DiskError
from slidesparse.files import describe_os_error, link_or_copy


@dataclass
class Draft:
    """The folder, what goes into it, and how much has been written by this run."""

    folder: Path
    layer_count: int
    recipe: str
    bytes_written: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def begin(self) -> None:
        """Make the folder; it stops being a checkpoint. Raises DiskError where it cannot be written."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in (CONFIG, INDEX):
                (self.folder / name).unlink(missing_ok=True)
        except OSError as error:
            raise DiskError(describe_os_error(error, self.folder) or f"{self.folder}: {error.strerror}") from None

    def path(self, layer: int | None) -> Path:
        """Shard of a decoder layer, or (None) of everything else."""
        return self.folder / shard_name(layer, self.layer_count)

    def facts(self, layer: int | None) -> dict[str, Any] | None:
        """What was recorded with the layer's shard; None if the shard is still to be made."""
        return finished(self.path(layer), self.recipe)

    def missing(self) -> list[int]:
        """Decoder layers whose shard is still to be made."""
        return [layer for layer in range(self.layer_count) if self.facts(layer) is None]

    def is_complete(self) -> bool:
        """Is the folder a whole checkpoint of this recipe?"""
        if self.missing():
            return False
        try:
            Checkpoint.open(self.folder)
        except CheckpointError:
            return False
        return True

    def write(
        self, writer: Background, layer: int | None, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]
    ) -> None:
        """Queue a shard. `facts` must hold JSON values."""
        size = sum(tensor.nbytes for tensor in tensors.values())
        with self._lock:
            self.bytes_written += size
        writer.put(size, partial(write_shard, self.path(layer), tensors, {"recipe": self.recipe, **facts}))

    def link_rest(self, source: Path) -> None:
        """Take the shard outside the decoder layers from another checkpoint of ours (a hard link if possible)."""
        target = self.path(None)
        try:
            if Shard.open(target).header == Shard.open(source).header:
                return
        except CheckpointError:
            pass
        if not link_or_copy(source, target):
            self.bytes_written += source.stat().st_size

    def finish(self, config: Mapping[str, Any]) -> None:
        """All shards are there: write index and config.json.

        Raises:
            CheckpointError: a shard is not there.
            DiskError: disk full or read-only.
        """
        paths = [self.path(layer) for layer in (*range(self.layer_count), None)]
        write_config(self.folder, config, {path.name: Shard.open(path) for path in paths})
