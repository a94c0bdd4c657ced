"""One safetensors file: its header checked before any work, tensors read into memory, written whole.

Format: 8 bytes little-endian header length, JSON header (name -> dtype, shape, byte range; `__metadata__`
text to text), data. We read and write it ourselves because tensors are then read without mapping the file
(mapped pages count as memory) and written without a second copy of the shard. The writer records a SHA-256
of the data in the header, so that a header identifies the content.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidesparse.checkpoint.direct import write_file
from slidesparse.errors import CheckpointError
from slidesparse.files import atomic_path

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
OWN_METADATA = "slidesparse"
"""Key of our entry in `__metadata__`: JSON with `sha256` and what the writer of the shard had to say."""
TYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I8": torch.int8,
    "U8": torch.uint8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
TYPE_NAMES = {value: key for key, value in TYPES.items()}
_MAX_HEADER = 100_000_000
_SAMPLES, _SAMPLE_BYTES = 16, 65536


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    """Bytes from the start of the file."""
    nbytes: int


@dataclass(frozen=True)
class Shard:
    """An opened safetensors file whose header has been checked against the file's length."""

    path: Path
    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    header: bytes

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Read and check the header.

        Raises:
            CheckpointError: missing, truncated, not safetensors, or an unknown type (names the file).
        """
        try:
            size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if size < 8 or length > min(size - 8, _MAX_HEADER):
                    raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes); fetch it again")
                header = stream.read(length)
        except FileNotFoundError:
            raise CheckpointError(f"{path}: this shard is missing; fetch or make the checkpoint again") from None
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}") from None
        try:
            entries = json.loads(header)
            metadata = entries.pop("__metadata__", {})
            tensors = {name: _tensor_info(entry, 8 + length) for name, entry in entries.items()}
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(f"{path}: damaged safetensors header; fetch it again") from None
        for name, info in tensors.items():
            if info.dtype not in TYPES:
                raise CheckpointError(f"{path}: {name}: unknown tensor type {info.dtype}; known: {', '.join(TYPES)}")
            if math.prod(info.shape) * TYPES[info.dtype].itemsize != info.nbytes:
                raise CheckpointError(f"{path}: {name}: damaged safetensors header (shape and bytes differ)")
        end = max((info.offset + info.nbytes for info in tensors.values()), default=8 + length)
        if end != size:
            raise CheckpointError(f"{path}: {size} bytes, its header says {end}: truncated or damaged; fetch it again")
        return cls(path, tensors, metadata, header)

    def load(self, name: str) -> torch.Tensor:
        """Read one tensor into memory. Raises CheckpointError when the file cannot be read."""
        info = self.tensors[name]
        tensor = torch.empty(info.shape, dtype=TYPES[info.dtype])
        data = tensor.view(-1).view(torch.uint8).numpy()
        try:
            with self.path.open("rb", buffering=0) as stream:
                stream.seek(info.offset)
                view, done = memoryview(data), 0
                while done < info.nbytes:
                    count = stream.readinto(view[done:])
                    if not count:
                        raise CheckpointError(f"{self.path}: {name}: the file ended early; fetch it again")
                    done += count
        except OSError as error:
            raise CheckpointError(f"{self.path}: {name}: {error.strerror}") from None
        return tensor

    @property
    def own(self) -> dict[str, Any] | None:
        """What our writer recorded (`sha256`, and the entries given to `write_shard`); None for other files."""
        text = self.metadata.get(OWN_METADATA)
        own: dict[str, Any] | None = None if text is None else json.loads(text)
        return own

    def digest(self) -> str:
        """SHA-256 that names the content: of the header where that holds a hash of the data, else of header
        and samples spread over the data."""
        total = hashlib.sha256(self.header)
        if self.own is None:
            size = self.path.stat().st_size
            with self.path.open("rb") as stream:
                for index in range(_SAMPLES):
                    stream.seek(max(0, size - _SAMPLE_BYTES) * index // (_SAMPLES - 1))
                    total.update(stream.read(_SAMPLE_BYTES))
        return total.hexdigest()


def write_shard(target: Path, tensors: Mapping[str, torch.Tensor], own: Mapping[str, Any]) -> int:
    """Write tensors to a file that is whole or absent; returns its size in bytes.

    The same tensors and `own` entries give the same bytes. `own` must hold JSON values.

    Raises:
        DiskError: disk full or read-only.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))  # keeps every tensor aligned
    entries: dict[str, Any] = {}
    buffers, offset, total = [], 0, hashlib.sha256()
    for name in names:
        tensor = tensors[name].detach().contiguous()
        buffer = tensor.view(-1).view(torch.uint8).numpy()
        end = offset + buffer.size
        entries[name] = {"dtype": TYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        total.update(buffer)
        buffers.append(buffer)
        offset = end
    text = json.dumps({"sha256": total.hexdigest(), **own}, separators=(",", ":"))
    metadata = {"__metadata__": {"format": "pt", OWN_METADATA: text}}
    header = json.dumps(metadata | entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    first = np.frombuffer(len(header).to_bytes(8, "little") + header, dtype=np.uint8)
    with atomic_path(target) as partial:
        return write_file(partial, [first, *buffers])


def _tensor_info(entry: dict[str, Any], start: int) -> TensorInfo:
    first, end = entry["data_offsets"]
    return TensorInfo(str(entry["dtype"]), tuple(int(size) for size in entry["shape"]), start + first, end - first)


def finished(path: Path, recipe: str) -> dict[str, Any] | None:
    """What our writer recorded in a shard made under `recipe` (an entry of that name); None if there is none."""
    if not path.is_file():
        return None
    try:
        own = Shard.open(path).own
    except CheckpointError:
        return None
    return own if own is not None and own.get("recipe") == recipe else None
