"""Weights as the mma.sp kernel (csrc/fused/mma_sp.cuh) reads them: each thread's registers lie together.

A block of 16 channels and 64 of the lifted K is 640 bytes, operand a of one instruction; blocks lie
[ceil(K' / 128) * 2][ceil(N / 256) * 16], zeros in the padding. In a block:

    512  kept values [32 threads][4 registers][4 bytes]: thread t's register r has bytes t % 4 * 4 to + 3, in half r / 2
         of the 32 bytes of row t / 4 + r % 2 * 8
    128  metadata uint32 [32 threads]: thread t holds 8 windows of row t / 4 + t % 2 * 8, the first or last 8 of the
         step's 16 as t / 2 % 2 says; window w of them in bits 4 w to 4 w + 3, the first place in the lower two

Both as PTX ISA lays down for mma.sp.m16n8k64 of 8-bit types ("Matrix fragments for sparse mma.m16n8k64", "Sparse
matrix storage").
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from slidesparse.kernels.two_of_four import keep_two
from slidesparse.pattern import align

ROWS, STEP_K = 16, 64
"""Of a block."""
STAGE_K, TILE_ROWS = 128, 256
"""Multiples that K' and N are padded to: of the kernel's stages, and its largest tile."""
VALUE_BYTES = ROWS * STEP_K // 2
BLOCK_BYTES = VALUE_BYTES + ROWS * STEP_K // 8


def packed_bytes(n: int, k: int) -> int:
    """Of a weight [N, K']."""
    return align(k, STAGE_K) // STEP_K * align(n, TILE_ROWS) // ROWS * BLOCK_BYTES


def pack(codes: torch.Tensor, layer: str = "weight") -> torch.Tensor:
    """8-bit codes [N, K'] (int8 or float8_e4m3fn), K' a multiple of 4 -> uint8 [packed_bytes(N, K')], on their device.

    Raises CheckpointError where they are not 2:4 (names the layer, row and columns).
    """
    n, k = codes.shape
    padded = pad(codes.view(torch.uint8), (0, align(k, STAGE_K) - k, 0, align(n, TILE_ROWS) - n)).view(codes.dtype)
    values, places = keep_two(padded, layer)
    return torch.cat([_values(values), _metadata(places)], dim=2).flatten()


def _values(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K' / 2] -> [steps, blocks, 512]."""
    # [blocks, high row, row of 8, steps, half, thread of a quad, byte]
    split: torch.Tensor = values.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4, 4))
    return split.permute(3, 0, 2, 5, 4, 1, 6).flatten(2)


def _metadata(places: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K' / 4] -> [steps, blocks, 128]."""
    pairs = places[:, ::2] | places[:, 1::2] << 4  # two windows a byte
    # [blocks, high row, row of 8, steps, half, byte]
    split: torch.Tensor = pairs.unflatten(0, (-1, 2, 8)).unflatten(3, (-1, 2, 4))
    return split.permute(3, 0, 2, 4, 1, 5).flatten(2)
