"""The compressed 2:4 form: lossless, laid out as documented, and refused when the weight is not 2:4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.errors import CheckpointError
from slidesparse.kernels.compress import compress, decompress


def random_2_4(n: int, k: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    codes = rng.integers(-127, 128, (n, k)).astype(np.int8)
    for row in codes:
        for window in row.reshape(-1, 4):
            window[rng.permutation(4)[: rng.integers(2, 5)]] = 0
    return torch.from_numpy(codes)


@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 2**31))
def test_round_trip(n: int, blocks: int, seed: int) -> None:
    codes = random_2_4(n, 32 * blocks, seed)
    packed = compress(codes, "layer")
    assert packed.shape == tuple(codes.shape)
    assert packed.nbytes == n * 32 * blocks * 5 // 8, "K'/2 values and K'/8 index bytes a row"
    assert torch.equal(decompress(packed), codes)


@given(st.integers(0, 2**31))
def test_lanes_ascend_and_never_repeat(seed: int) -> None:
    """As sparse tensor cores require; also in windows with one value or none."""
    packed = compress(random_2_4(3, 64, seed), "layer")
    for byte in packed.indices.flatten().tolist():
        for window in (byte & 15, byte >> 4):
            assert (window & 3) < (window >> 2)


def test_layout_by_hand() -> None:
    codes = torch.zeros(1, 32, dtype=torch.int8)
    codes[0, 1], codes[0, 3] = 5, -7  # window 0: lanes 1 and 3
    codes[0, 6] = 9  # window 1: lane 2, filled up with lane 0
    packed = compress(codes, "layer")
    assert packed.values[0, :4].tolist() == [5, -7, 0, 9]
    assert packed.indices[0, 0].item() == (1 | 3 << 2) | (0 | 2 << 2) << 4
    assert packed.indices[0, 1].item() == (0 | 1 << 2) * 17  # empty windows: lanes 0 and 1


def test_fp8_negative_zero_is_a_zero() -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    codes[0, :4] = torch.tensor([0x80, 0x38, 0x80, 0xB8])  # -0, 1, -0, -1
    packed = compress(codes.view(torch.float8_e4m3fn), "layer")
    assert decompress(packed).float()[0, :4].tolist() == [0, 1, 0, -1]


def test_three_in_a_window_are_refused_with_their_place() -> None:
    codes = random_2_4(4, 64, 0)
    codes[2, 8:12] = torch.tensor([1, 0, 2, 3])
    with pytest.raises(CheckpointError, match=r"down_proj: row 2, columns 8 to 11.*not 2:4"):
        compress(codes, "down_proj")


def test_columns_must_be_lifted() -> None:
    with pytest.raises(CheckpointError, match=r"down_proj: 40 columns.*multiple of 32"):
        compress(torch.zeros(1, 40, dtype=torch.int8), "down_proj")
