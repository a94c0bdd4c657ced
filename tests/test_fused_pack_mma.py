"""Weights packed for mma.sp: every thread's registers, read as the kernel reads them, multiplied as PTX ISA says."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_two_of_four import EIGHT_BIT, random_2_4

from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import fused_pack_mma, peak_operands
from slidesparse.kernels.fused_pack_mma import BLOCK_BYTES, pack, packed_bytes
from slidesparse.kernels.peak_library import Form
from slidesparse.kernels.two_of_four import keep_two
from slidesparse.pattern import align

Bytes = npt.NDArray[np.uint8]
LANES = range(32)


def blocks_of(packed: torch.Tensor, n: int, k: int) -> Bytes:
    """[steps, blocks, 640], as the kernel finds them: block (step * row_blocks + block) * 640 bytes from the start."""
    steps, row_blocks = align(k, 128) // 64, align(n, 256) // 16
    assert packed.dtype is torch.uint8
    assert packed.shape == (steps * row_blocks * BLOCK_BYTES,)
    return packed.numpy().reshape(steps, row_blocks, BLOCK_BYTES)


def operand_a(blocks: Bytes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Kept bytes [steps, blocks, 16, 32] and their columns of 64, from the registers of all threads.

    PTX ISA, "Matrix fragments for sparse mma.m16n8k64", .u8 / .s8 and .e4m3, with thread g = t / 4, h = t % 4:
        A     element i of 16: row g for i < 4 and 8 <= i < 12, else g + 8; of the 64 columns those from 8 h on (i < 8)
              or 8 h + 32, 8 columns for 4 kept elements
        metadata, sparsity selector 0: thread h of a quad; 4 bits a group of 4 columns, two indices, lower bits first
    """
    kept = np.zeros((*blocks.shape[:2], 16, 32), dtype=np.int64)
    columns = np.full_like(kept, -1)
    for t in LANES:
        g, h = t // 4, t % 4
        registers = blocks[..., t * 16 : t * 16 + 16]  # one load of 16 bytes: a0 to a3
        for i in range(16):
            row = g if i < 4 or 8 <= i < 12 else g + 8
            first_column = 8 * h + (32 if i >= 8 else 0)
            kept[:, :, row, first_column // 2 + i % 4] = registers[..., i]
        word = blocks[..., 512 + t * 4 : 512 + t * 4 + 4].copy().view("<u4")[..., 0].astype(np.int64)
        for group in range(8):
            row, window = g + 8 * (h % 2), 8 * (h // 2) + group
            for j in range(2):
                columns[:, :, row, 2 * window + j] = 4 * window + (word >> (4 * group + 2 * j) & 3)
    assert (columns >= 0).all(), "every kept element has a place"
    assert (columns[..., ::2] < columns[..., 1::2]).all(), "places ascend, in the padding too"
    return kept, columns


def multiplied(packed: torch.Tensor, x: torch.Tensor, n: int, k: int) -> npt.NDArray[np.float64]:
    """x [M, K'] by the packed weight -> [M, N], instruction by instruction, accumulators as threads hold them."""
    blocks = blocks_of(packed, n, k)
    steps, row_blocks = blocks.shape[:2]
    kept, columns = operand_a(blocks)
    values = torch.from_numpy(kept.astype(np.uint8)).view(x.dtype).double().numpy()
    m = align(x.shape[0], 8)
    rows = np.zeros((m, steps * 64))
    rows[: x.shape[0], :k] = x.double().numpy()
    out = np.zeros((m, row_blocks * 16))
    for group in range(m // 8):
        sums = np.zeros((row_blocks, 32, 4))  # of each thread
        for step in range(steps):
            tokens = rows[8 * group : 8 * group + 8, 64 * step : 64 * step + 64]
            b = np.zeros((64, 8))
            for t in LANES:  # b register r, byte i: k = 4 (t % 4) + i + 16 r, column t / 4
                for r in range(4):
                    at = slice(16 * r + t % 4 * 4, 16 * r + t % 4 * 4 + 4)
                    b[at, t // 4] = tokens[t // 4, at]
            product = np.einsum("brk,brkc->brc", values[step], b[columns[step]])
            for t in LANES:  # c element i: row t / 4 (+ 8), column 2 (t % 4) + i % 2
                for i in range(4):
                    sums[:, t, i] += product[:, t // 4 + i // 2 * 8, t % 4 * 2 + i % 2]
        for t in LANES:
            for i in range(4):
                out[8 * group + t % 4 * 2 + i % 2, t // 4 + i // 2 * 8 :: 16] = sums[:, t, i]
    assert not out[:, n:].any(), "channels of the padding are zeros"
    return out[: x.shape[0], :n]


@given(
    st.integers(1, 12),
    st.integers(1, 40),
    st.integers(1, 9),
    st.sampled_from(EIGHT_BIT),
    st.integers(0, 2**31),
)
@settings(max_examples=25)
def test_the_product_of_the_registers_is_that_of_the_weight(m: int, n8: int, k32: int, dtype: DType, seed: int) -> None:
    n, k = 8 * n8, 32 * k32
    codes = random_2_4(n, k, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(-8, 9, (m, k), generator=generator).float().to(dtype.torch)
    seen = multiplied(pack(codes), x, n, k)
    assert np.array_equal(seen, (x.double() @ codes.double().T).numpy())
    assert seen.any()


@pytest.mark.parametrize("dtype", EIGHT_BIT)
def test_metadata_is_that_of_the_microbenchmark(dtype: DType) -> None:
    """Whose registers gave the right product on a GPU."""
    n, k = 256, 384
    codes = random_2_4(n, k, dtype, 5)
    _, places = keep_two(codes)
    form = Form("", 1, dtype.torch, True, 1, n, 8, k, k // 64, 1)
    pairs = torch.stack([places & 3, places >> 2], dim=2)[None]
    expected = peak_operands.metadata_words(pairs, form)[:, 0]
    seen = blocks_of(pack(codes), n, k)[..., 512:].copy().view("<i4")
    assert np.array_equal(seen, expected.numpy())


def test_size_and_padding() -> None:
    for n, k in ((8, 32), (256, 128), (264, 160), (2560, 6912)):
        assert packed_bytes(n, k) == align(n, 256) * align(k, 128) * 5 // 8
    codes = random_2_4(40, 96, DType.INT8, 1)
    assert pack(codes).numel() == packed_bytes(40, 96)
    assert fused_pack_mma.BLOCK_BYTES == 640


def test_a_layout_by_hand() -> None:
    """One value: channel 13, column 38 of the second step. Row 13 is g = 5 of the high rows; window 9 is the second of
    the second half, so thread 0 of the quad has the value as the last byte of register a3, thread 3 its place."""
    codes = torch.zeros(16, 128, dtype=torch.int8)
    codes[13, 64 + 38] = 77
    block = blocks_of(pack(codes), 16, 128)[1, 0]
    place = 5 * 4 * 16 + 3 * 4 + 3  # filled up with lane 0 before it: the second value kept
    assert np.flatnonzero(block[:512]).tolist() == [place]
    assert block[place] == 77
    words = block[512:].copy().view("<u4")
    empty = 0x44444444
    assert words[5 * 4 + 3] == empty - (4 << 4) + ((0 | 2 << 2) << 4)
    assert (np.delete(words, 5 * 4 + 3) == empty).all()


def test_what_is_not_2_4_is_refused() -> None:
    codes = random_2_4(40, 96, DType.INT8, 1)
    codes[7, 40:44] = 1
    with pytest.raises(CheckpointError, match=r"^down: row 7, columns 40 to 43 .*not 2:4"):
        pack(codes, "down")
