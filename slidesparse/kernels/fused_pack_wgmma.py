"""Weights as the Hopper kernel (csrc/fused/wgmma_gemm.cuh) copies them into shared memory.

A block of 64 channels and 128 of the lifted K is 5120 bytes; blocks lie [ceil(K' / 128)][ceil(N / 256) * 4], zeros in
the padding. In a block:

    4096  kept values [64][64], a row's 16-byte chunk c at chunk c ^ (row / 2) % 4: the 64-byte swizzle that wgmma reads
    1024  metadata uint32 [128 threads][2 steps of 64 along K], in the order of wgmma's registers (PTX ISA, "Sparse
          matrix storage" for 8-bit types): thread t of the warpgroup holds 8 windows of row t / 32 * 16 + t % 32 / 4 +
          t % 2 * 8, the first or last 8 of a step's 16 as t / 2 % 2 says; window w in bits 4 w to 4 w + 3
"""

from __future__ import annotations

import torch
from torch.nn.functional import pad

from slidesparse.kernels.two_of_four import keep_two
from slidesparse.pattern import align

ROWS, STAGE_K, TILE_ROWS = 64, 128, 256
VALUE_BYTES = ROWS * STAGE_K // 2
BLOCK_BYTES = VALUE_BYTES + ROWS * STAGE_K // 8


def packed_bytes(n: int, k: int) -> int:
    """Of a weight [N, K']."""
    return align(k, STAGE_K) // STAGE_K * align(n, TILE_ROWS) // ROWS * BLOCK_BYTES


def pack(codes: torch.Tensor, layer: str) -> torch.Tensor:
    """8-bit codes [N, K'], K' a multiple of 4 -> uint8 [packed_bytes(N, K')], on their device.

    Raises CheckpointError where they are not 2:4.
    """
    n, k = codes.shape
    padded = pad(codes.view(torch.uint8), (0, align(k, STAGE_K) - k, 0, align(n, TILE_ROWS) - n)).view(codes.dtype)
    values, places = keep_two(padded, layer)
    return torch.cat([_values(values), _metadata(places)], dim=2).flatten()


def _values(values: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K' / 2] -> [steps, blocks, 4096]."""
    chunks = values.unflatten(0, (-1, ROWS)).unflatten(2, (-1, 4, 16))  # [blocks, rows, steps, chunks, 16]
    row = torch.arange(ROWS, device=values.device)
    source = torch.arange(4, device=values.device)[None] ^ (row // 2 % 4)[:, None]  # what lies at each chunk's place
    swizzled = chunks.gather(3, source[None, :, None, :, None].expand_as(chunks))
    laid: torch.Tensor = swizzled.permute(2, 0, 1, 3, 4).flatten(2)
    return laid


def _metadata(places: torch.Tensor) -> torch.Tensor:
    """uint8 [N, K' / 4] -> [steps, blocks, 1024]."""
    nibbles = places.unflatten(1, (-1, 2)).to(torch.int32)
    pairs = (nibbles[..., 0] | nibbles[..., 1] << 4).to(torch.uint8)  # two windows a byte, little end first
    # [blocks, row of 64 as (warp, high, low 3 bits), steps, step of 64, half, 4 bytes]
    split = pairs.unflatten(0, (-1, 4, 2, 8)).unflatten(4, (-1, 2, 2, 4))
    # thread: warp, low 3 bits of the row, half, high; then the two steps
    laid: torch.Tensor = split.permute(4, 0, 1, 3, 6, 2, 5, 7).flatten(2)
    return laid
