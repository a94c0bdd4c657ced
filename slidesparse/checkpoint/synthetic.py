"""Synthetic base models: seeded random BF16 weights in the real architecture, a checkpoint like any other.

The bytes depend on seed, tensor name and config alone, never on order, threads or machine: values come from
integer hashes, so that a rerun resumes and two machines measure the same model.

Scales keep activations near 1, as in a trained model: weights [N, K] have standard deviation 1/sqrt(K) (o_proj
and down_proj, which add to the residual stream, 1/sqrt(2 * layers) of it), embeddings 2/sqrt(hidden), biases 0.1, norms
1 +- 0.1.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numba
import numpy as np
import torch

from slidesparse.checkpoint import families
from slidesparse.checkpoint.draft import Draft
from slidesparse.checkpoint.families import Shape
from slidesparse.checkpoint.pipeline import side_by_side, write_behind
from slidesparse.files import write_json
from slidesparse.progress import track

GENERATOR = 1
"""Version of the values: part of a model's identity."""
_GENERATION_CONFIG = "generation_config.json"
_UNIT = math.sqrt(4 * (2**32 - 1) / 12)
"""Standard deviation of a sum of four uniform 16-bit integers."""


def model_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.json` of a synthetic model. Raises CheckpointError for an unknown model_type."""
    architecture = families.family(config, "bench.yaml").architecture
    return {"architectures": [architecture], **config, "dtype": "bfloat16", "use_cache": True}


def write_model(draft: Draft, config: Mapping[str, Any], seed: int, title: str, quiet: bool) -> None:
    """Write the model shard by shard, leaving out shards that an interrupted run has finished.

    Raises:
        DiskError: disk full or read-only.
    """
    layers = draft.layer_count
    groups: list[tuple[int | None, dict[str, Shape]]] = [(None, families.rest_tensors(config))]
    groups += [(layer, families.layer_tensors(config, layer)) for layer in range(layers)]
    todo = {layer: shapes for layer, shapes in groups if draft.facts(layer) is None}
    draft.begin()

    def make(layer: int | None, shapes: dict[str, Shape]) -> None:
        draft.write(writer, layer, {name: random_tensor(name, shapes[name], layers, seed) for name in shapes}, {})
        bar.advance(1)

    title = f"{title}: synthetic weights"
    with track(title, len(todo), quiet) as bar, write_behind() as writer, side_by_side() as workers:
        for layer, shapes in todo.items():
            size = sum(2 * math.prod(shape) for shape in shapes.values())
            workers.put(size, partial(make, layer, shapes))
    tokens = {key: config[key] for key in ("bos_token_id", "eos_token_id") if key in config}
    write_json(draft.folder / _GENERATION_CONFIG, {"_from_model_config": True, **tokens})
    draft.finish(model_config(config))


def random_tensor(name: str, shape: Shape, layers: int, seed: int) -> torch.Tensor:
    """One BF16 tensor, bell-shaped (sum of four uniform values) with the scale that its name calls for."""
    centre, spread = _distribution(name, shape, layers)
    start = np.uint64(int.from_bytes(hashlib.sha256(f"{GENERATOR} {seed} {name}".encode()).digest()[:8], "little"))
    out = np.empty(math.prod(shape), dtype=np.uint16)
    _fill(out, start, np.float32(centre), np.float32(spread / _UNIT))
    return torch.from_numpy(out).view(torch.bfloat16).view(shape)


def _distribution(name: str, shape: Shape, layers: int) -> tuple[float, float]:
    if name.endswith("norm.weight"):
        return 1.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if "embed_tokens" in name:
        return 0.0, 2 / math.sqrt(shape[1])
    spread = 1 / math.sqrt(shape[1])
    return 0.0, spread / math.sqrt(2 * layers) if "o_proj" in name or "down_proj" in name else spread


@numba.njit(cache=True, nogil=True)
def _fill(out, start, centre, scale):  # type: ignore[no-untyped-def] # pragma: no cover
    """Value i: splitmix64 of start + i as four 16-bit integers, summed, centred, scaled, rounded to BF16."""
    block = 4096
    for b in range((out.size + block - 1) // block):
        first = b * block
        size = min(block, out.size - first)
        values = np.empty(size, dtype=np.float32)
        for i in range(size):
            z = start + np.uint64(first + i) * np.uint64(0x9E3779B97F4A7C15)
            z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            z = z ^ (z >> np.uint64(31))
            low = np.uint64(0xFFFF)
            total = (z & low) + ((z >> np.uint64(16)) & low) + ((z >> np.uint64(32)) & low) + (z >> np.uint64(48))
            values[i] = centre + np.float32(np.int32(total) - np.int32(131070)) * scale
        bits = values.view(np.uint32)
        for i in range(size):
            odd = (bits[i] >> np.uint32(16)) & np.uint32(1)
            out[first + i] = np.uint16((bits[i] + np.uint32(0x7FFF) + odd) >> np.uint32(16))
