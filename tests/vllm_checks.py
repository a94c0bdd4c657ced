"""What the processes of `test_vllm_package.py` share. Imports nothing of vLLM: its platform may not be settled yet."""

from __future__ import annotations

import traceback
from collections.abc import Callable

import torch

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.errors import SlideSparseError
from slidesparse.measure.engines.model import bias_of

TOKENS = 24
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
"""What vLLM merges."""


def cpu_platform() -> str:
    """Entry point `vllm.platform_plugins`: the class that vLLM takes for this machine."""
    return "vllm.platforms.cpu.CpuPlatform"


def fault(call: Callable[[], object]) -> str:
    """The text of the error of ours that a call must end with, with its type."""
    try:
        call()
    except SlideSparseError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def tokens(vocabulary: int = 128) -> torch.Tensor:
    return torch.randint(0, vocabulary, (TOKENS,), generator=torch.Generator().manual_seed(1))


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest relative L2 difference of a position's logits."""
    return float(((found - expected).norm(dim=-1) / expected.norm(dim=-1)).max())


def outcome(scenario: Callable[[], object]) -> object:
    """Its value, or the traceback of what it raised."""
    try:
        return scenario()
    except Exception:
        return {"error": traceback.format_exc()}


def merged(checkpoint: Checkpoint, layer: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes [N, K], scales [N, 1] and bias [N] of a linear that vLLM merges, from the checkpoint's own layers."""
    parent, _, own = layer.rpartition(".")
    names = [f"{parent}.{part}" for part in PARTS.get(own, (own,))]
    codes = torch.cat([checkpoint.load(f"{name}.weight").view(torch.int8) for name in names])
    assert checkpoint.dtype is not None
    scale = torch.cat([checkpoint.load(f"{name}.weight_scale") for name in names])
    biases = [bias.float() for name in names if (bias := bias_of(checkpoint, name)) is not None]
    return codes.view(checkpoint.dtype.torch), scale, torch.cat(biases) if biases else None
