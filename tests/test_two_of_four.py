"""The kept values of a 2:4 weight and their places: against the compiled compression, and refused when not 2:4."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels.compress import compress
from slidesparse.kernels.two_of_four import EMPTY, keep_two

EIGHT_BIT = [DType.INT8, DType.FP8]


def random_2_4(n: int, k: int, dtype: DType, seed: int) -> torch.Tensor:
    """Any byte but NaN and, of INT8, -128, with 2 to 4 zeros (FP8: of either sign) in each window."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 256, (n, k // 4, 4)).astype(np.uint8)
    codes[(codes == 0x80) | (codes & 0x7F == 0x7F)] = 0x81
    order = rng.permuted(np.broadcast_to(np.arange(4), codes.shape), axis=2)
    zeros = order < rng.integers(2, 5, (n, k // 4, 1))
    minus = 0x80 if dtype is DType.FP8 else 0
    codes[zeros] = rng.choice(np.array([0, minus], dtype=np.uint8), int(zeros.sum()))
    return torch.from_numpy(codes.reshape(n, k)).view(dtype.torch)


@given(st.integers(1, 5), st.integers(1, 3), st.sampled_from(EIGHT_BIT), st.integers(0, 2**31))
def test_equal_to_the_compiled_compression(n: int, blocks: int, dtype: DType, seed: int) -> None:
    codes = random_2_4(n, 32 * blocks, dtype, seed)
    values, places = keep_two(codes)
    expected = compress(codes, "layer")
    assert torch.equal(values, expected.values.view(torch.uint8))
    assert torch.equal(places[:, ::2] | places[:, 1::2] << 4, expected.indices)


@given(st.sampled_from(EIGHT_BIT), st.integers(0, 2**31))
def test_values_at_their_places_are_the_weight(dtype: DType, seed: int) -> None:
    codes = random_2_4(3, 36, dtype, seed)
    values, places = keep_two(codes)
    full = torch.zeros(3, 9, 4, dtype=torch.uint8)
    for j in range(2):
        full.scatter_(2, (places.long() >> 2 * j & 3)[..., None], values[:, j::2, None])
    assert torch.equal(full.view(3, 36).view(dtype.torch).float(), codes.float())


def test_every_set_of_lanes_by_hand() -> None:
    codes = torch.tensor([[0, 0, 0, 0, 0, 0, 7, 0, 0, 5, 0, 6, 8, 0, 0, 0, 0, 0, 0, 9]], dtype=torch.int8)
    values, places = keep_two(codes)
    assert values.tolist() == [[0, 0, 0, 7, 5, 6, 8, 0, 0, 9]]
    assert places.tolist() == [[EMPTY, 0 | 2 << 2, 1 | 3 << 2, 0 | 1 << 2, 0 | 3 << 2]]


@pytest.mark.parametrize("dtype", EIGHT_BIT)
@pytest.mark.parametrize("lanes", [(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)])
def test_more_than_two_are_refused_with_their_place(dtype: DType, lanes: tuple[int, ...]) -> None:
    codes = random_2_4(4, 64, dtype, 0).view(torch.uint8)
    for lane in lanes:
        codes[2, 8 + lane] = 1
    with pytest.raises(CheckpointError, match=r"^qkv: row 2, columns 8 to 11 .* more than 2 non-zeros") as caught:
        keep_two(codes.view(dtype.torch), "qkv")
    assert "\n" not in str(caught.value)
