"""What the Triton activation kernels share: tuned launch parameters, outputs, programmatic dependent launch.

From Hopper on a kernel is set up while the one before it ends, and waits for all of its writes before it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
import triton.language as tl

EARLY_CAPABILITY = (9, 0)
"""Programmatic dependent launch came with Hopper."""


@dataclass(frozen=True)
class Launch:
    """Tuned parameters of one launch.

    words: windows (quantise) or outputs (dequantise) of a row whose loads are under way together; a multiple of
        32 * warps.
    rows: rows of one program (dequantise).
    """

    words: int
    warps: int
    rows: int = 1

    def __str__(self) -> str:
        return f"words={self.words} warps={self.warps} rows={self.rows}"


def output(
    given: torch.Tensor | None, shape: tuple[int, int], dtype: torch.dtype, device: torch.device, name: str
) -> torch.Tensor:
    """The tensor to write to: the one given, or a new one. Raises ValueError when the one given does not fit."""
    if given is None:
        return torch.empty(shape, dtype=dtype, device=device)
    if given.shape != shape or given.dtype != dtype or not given.is_contiguous():
        raise ValueError(
            f"{name} must be contiguous {dtype} {list(shape)}, not {given.dtype} {list(given.shape)} with strides "
            f"{given.stride()}"
        )
    return given


def early_launch(device: torch.device) -> dict[str, bool]:
    """Launch arguments by which a kernel is set up while the one before it still runs."""
    return {"EARLY": True, "launch_pdl": True} if _has_early_launch(device) else {"EARLY": False}


@lru_cache(maxsize=64)
def _gpu_launches_early(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= EARLY_CAPABILITY


def _has_early_launch(device: torch.device) -> bool:
    if device.type == "meta":  # no GPU to ask: a kernel is compiled for what the driver stands for
        return divmod(int(triton.runtime.driver.active.get_current_target().arch), 10) >= EARLY_CAPABILITY
    return _gpu_launches_early(device)


@triton.jit
def turn(EARLY: tl.constexpr):
    """Wait until the kernel before has finished, all its writes included; then let the one after be set up."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
