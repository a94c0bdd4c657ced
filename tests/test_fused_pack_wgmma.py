"""The packed form is read back as the tensor cores read it: each thread's registers, each row's swizzled chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import fused_pack_wgmma as packed_form
from slidesparse.kernels.operands import random_weight
from slidesparse.pattern import Sparsity


def two_of_four(n: int, k: int, dtype: DType, seed: int) -> torch.Tensor:
    return random_weight(n, k, dtype, Sparsity(4), seed)


def read_back(packed: torch.Tensor, n: int, k: int) -> torch.Tensor:
    """Dense bytes [N, K'], one element after the other, with the addresses that the instruction uses.

    PTX ISA, `wgmma.mma_async.sp` with 8-bit types: a thread of the warpgroup holds 32 bits of metadata a step of 64
    along K. Rows go by warps of 16; in a quad of lanes the even ones hold rows 0 to 7, the odd ones 8 to 15, the first
    pair columns 0 to 31, the second 32 to 63. 4 bits describe 4 columns: two places. Descriptors with 64-byte swizzle
    find byte b of row r at 64 r + (b ^ 16 * (r / 2 % 4)).
    """
    stages, blocks = -(-k // 128), -(-n // 256) * 4
    memory = packed.reshape(stages, blocks, 5120).tolist()
    dense = torch.zeros(blocks * 64, stages * 128, dtype=torch.uint8)
    for stage in range(stages):
        for block in range(blocks):
            bytes_of = memory[stage][block]
            for step in range(2):
                for thread in range(128):
                    warp, lane = divmod(thread, 32)
                    row = warp * 16 + lane // 4 + (lane % 2) * 8
                    first = 4096 + thread * 8 + step * 4
                    word = int.from_bytes(bytes(bytes_of[first : first + 4]), "little")
                    for window in range(8):
                        within = (lane % 4 // 2) * 32 + window * 4  # column of the step
                        places = word >> 4 * window & 15
                        low, high = places & 3, places >> 2
                        assert low < high
                        for kept, place in enumerate((low, high)):
                            offset = step * 32 + within // 2 + kept  # of the row's 64 kept values
                            value = bytes_of[64 * row + (offset ^ 16 * (row // 2 % 4))]
                            dense[block * 64 + row, stage * 128 + step * 64 + within + place] = value
    return dense


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(("n", "k"), [(256, 128), (72, 160), (264, 96)])
def test_the_instruction_reads_the_weight_back(dtype: DType, n: int, k: int) -> None:
    codes = two_of_four(n, k, dtype, seed=n + k)
    packed = packed_form.pack(codes, "w")
    assert packed.numel() == packed_form.packed_bytes(n, k)
    dense = read_back(packed, n, k)
    values = dense.view(dtype.torch).float()
    assert torch.equal(values[:n, :k], codes.float())
    assert not dense[n:].any()
    assert not dense[:, k:].any(), "padding is zero"


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**31))
def test_any_size_and_number_of_nonzeros(rows: int, windows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-127, 128, (rows * 8, windows * 32), generator=generator, dtype=torch.int8)
    order = torch.rand(rows * 8, windows * 8, 4, generator=generator).argsort(2)
    most = torch.randint(0, 3, (rows * 8, windows * 8, 1), generator=generator)
    codes = (codes.unflatten(1, (-1, 4)) * (order < most)).flatten(1)
    one = packed_form.pack(codes, "w")
    assert torch.equal(read_back(one, *codes.shape).view(torch.int8)[: rows * 8, : windows * 32], codes)


def test_minus_zero_is_a_zero() -> None:
    codes = two_of_four(64, 128, DType.FP8, seed=1)
    negative = torch.where(codes.float() == 0, torch.tensor(-0.0), codes.float()).to(DType.FP8.torch)
    assert torch.equal(
        read_back(packed_form.pack(negative, "w"), 64, 128)[:64].view(DType.FP8.torch).float(), codes.float()
    )


def test_three_of_four_is_refused_by_name() -> None:
    codes = torch.zeros(64, 128, dtype=torch.int8)
    codes[5, 8:11] = 1
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.mlp: row 5, columns 8 to 11 of the lifted weight"):
        packed_form.pack(codes, "model.layers.0.mlp")
