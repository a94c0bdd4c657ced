"""A copy of memory, in Triton: the yardstick of every kernel that memory binds.

target[i] = source[i]; each byte is read once and written once, in accesses of 16 bytes a thread. Not `Tensor.copy_`:
as a node of a CUDA graph that moves 2.7 TB/s on an H200, where such a kernel moves 4.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Launch:
    """Parameters of one launch: `words` is 32-bit words a program."""

    words: int
    warps: int

    def __str__(self) -> str:
        return f"words={self.words} warps={self.warps}"


LAUNCHES = tuple(Launch(words, warps) for words, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 8), (8192, 8)))
"""Candidates: 2 to 8 accesses of 16 bytes a thread."""
GRAIN = 4 * max(launch.words for launch in LAUNCHES)
"""Buffers hold a multiple of this many bytes."""


def copy(source: torch.Tensor, target: torch.Tensor, launch: Launch) -> None:
    """uint8 [bytes] -> uint8 [bytes], both contiguous. Raises ValueError when they do not fit."""
    if source.shape != target.shape or source.numel() % GRAIN:
        raise ValueError(f"copy: {source.numel()} and {target.numel()} bytes; give the same multiple of {GRAIN} twice")
    words = source.numel() // 4
    _copy[(words // launch.words,)](
        source.view(torch.int32), target.view(torch.int32), WORDS=launch.words, num_warps=launch.warps
    )


@triton.jit
def _copy(source_ptr, target_ptr, WORDS: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    tl.store(target_ptr + index, tl.load(source_ptr + index))
