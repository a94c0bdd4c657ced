"""Reading a checkpoint: a folder with config.json and safetensors shards, checked before any work."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from slidesparse.checkpoint import families, metadata
from slidesparse.checkpoint.section import SECTION, Section, parse_section
from slidesparse.checkpoint.shard import INDEX, SINGLE, TYPE_NAMES, Shard
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, SlideSparseError
from slidesparse.files import read_json, write_json

CONFIG = "config.json"


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint: every tensor that its family needs is there, with the right type and shape."""

    folder: Path
    config: Mapping[str, Any]
    shards: Mapping[str, Shard]
    """By file name."""
    dtype: DType | None
    """8-bit type of the linear weights; None for a BF16 model."""
    section: Section | None
    """How it was pruned; None for a dense model."""

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json and all shard headers, and check them against each other. Reads no tensor.

        Raises:
            CheckpointError: one line: config.json missing, unknown model type or quantisation, missing or
                truncated shard, missing tensor, wrong type or shape.
        """
        path = folder / CONFIG
        config = _read_config(path)
        families.family(config, str(path))
        shards = _open_shards(folder)
        section = parse_section(config[SECTION], str(path)) if SECTION in config else None
        checkpoint = cls(folder, config, shards, metadata.read_dtype(config, str(path)), section)
        checkpoint._check()
        return checkpoint

    # -- tensors -------------------------------------------------------------------------------------

    @cached_property
    def _place(self) -> dict[str, Shard]:
        return {name: shard for shard in self.shards.values() for name in shard.tensors}

    def names(self) -> list[str]:
        """All tensors, in the order of the shards."""
        return list(self._place)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._find(name).tensors[name].shape

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory. Raises CheckpointError when there is none of that name."""
        return self._find(name).load(name)

    def _find(self, name: str) -> Shard:
        if name not in self._place:
            raise CheckpointError(f"{self.folder}: no tensor {name}")
        return self._place[name]

    # -- structure -----------------------------------------------------------------------------------

    @property
    def layer_count(self) -> int:
        return int(self.config["num_hidden_layers"])

    def linears(self) -> list[str]:
        """Module names of the quantised linear layers: `model.layers.0.self_attn.q_proj`, ..."""
        return families.linear_names(self.config)

    def layers(self) -> list[list[str]]:
        """Tensor names of each decoder layer."""
        out: list[list[str]] = [[] for _ in range(self.layer_count)]
        for name in self.names():
            layer = families.layer_of(name)
            if layer is not None and layer < len(out):
                out[layer].append(name)
        return out

    def rest(self) -> list[str]:
        """Tensors outside the decoder layers: embeddings, final norm, lm_head."""
        return [name for name in self.names() if families.layer_of(name) is None]

    def fingerprint(self) -> str:
        """12 hex digits of the content: the same for a copy, another one after any change of ours.

        Shards that we wrote carry a hash of their data; of others, header and samples are hashed.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        total = hashlib.sha256(json.dumps(dict(self.config), sort_keys=True).encode())
        for name in sorted(self.shards):
            total.update(f"{name} {self.shards[name].digest()}\n".encode())
        return total.hexdigest()[:12]

    # -- checks --------------------------------------------------------------------------------------

    def _check(self) -> None:
        where = str(self.folder / CONFIG)
        try:
            expected = families.rest_tensors(self.config)
            layers = self.layer_count
        except KeyError as error:
            raise CheckpointError(f"{where}: key {error} is missing") from None
        for name, shape in expected.items():
            self._check_tensor(name, shape, torch.bfloat16)
        for layer in range(layers):
            for name, shape in families.layer_tensors(self.config, layer, where).items():
                module, _, parameter = name.rpartition(".")
                if parameter == "weight" and len(shape) == 2 and self.dtype is not None:
                    n, k = shape
                    lifted = self.section is not None and self.section.layout == "lifted"
                    columns = self.section.pattern.lifted_k(k) if self.section is not None and lifted else k
                    self._check_tensor(name, (n, columns), self.dtype.torch)
                    self._check_tensor(f"{module}.weight_scale", (n, 1), torch.float32)
                else:
                    self._check_tensor(name, shape, torch.bfloat16)

    def _check_tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        if name not in self._place:
            raise CheckpointError(f"{self.folder}: tensor {name} is missing; fetch or make the checkpoint again")
        shard = self._place[name]
        info = shard.tensors[name]
        if info.dtype != TYPE_NAMES[dtype]:
            raise CheckpointError(
                f"{shard.path}: {name} is {info.dtype}, expected {TYPE_NAMES[dtype]}; give the checkpoint in that type"
            )
        if info.shape != shape:
            raise CheckpointError(
                f"{shard.path}: {name} has shape {list(info.shape)}, config.json says {list(shape)}; "
                "they do not belong together: fetch both again"
            )


def write_config(folder: Path, config: Mapping[str, Any], shards: Mapping[str, Shard]) -> None:
    """Write index and config.json, in this order: with the second the folder becomes a checkpoint.

    Raises:
        DiskError: disk full or read-only.
    """
    places = {name: file for file, shard in shards.items() for name in shard.tensors}
    size = sum(info.nbytes for shard in shards.values() for info in shard.tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    write_json(folder / INDEX, index)
    write_json(folder / CONFIG, dict(config))


def shard_name(layer: int | None, layers: int) -> str:
    """File of a decoder layer, or (None) of everything else, which comes last."""
    number = layers + 1 if layer is None else layer + 1
    return f"model-{number:05d}-of-{layers + 1:05d}.safetensors"


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: not there, so the folder is no (finished) checkpoint; make or fetch it again")
    try:
        config = read_json(path)
    except SlideSparseError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: expected a JSON object; fetch it again")
    return config


def _open_shards(folder: Path) -> dict[str, Shard]:
    index = folder / INDEX
    if not index.is_file():
        if not (folder / SINGLE).is_file():
            raise CheckpointError(f"{folder}: neither {INDEX} nor {SINGLE}; only safetensors checkpoints can be read")
        return {SINGLE: Shard.open(folder / SINGLE)}
    try:
        places = dict(read_json(index)["weight_map"])
    except (SlideSparseError, KeyError, TypeError, ValueError):
        raise CheckpointError(f"{index}: damaged, no weight_map in it; fetch it again") from None
    shards = {file: Shard.open(folder / file) for file in sorted(set(places.values()))}
    for name, file in places.items():
        if name not in shards[file].tensors:
            raise CheckpointError(
                f"{folder / file}: tensor {name} is missing, though {INDEX} places it there; fetch it again"
            )
    return shards
