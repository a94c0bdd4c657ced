"""Lifting in torch operations, for GPUs and 16-bit types, against the lift of checkpoints."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.checkpoint.lift import lift_weight
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import operands, reference
from slidesparse.kernels.device_lift import lift_on_device
from slidesparse.pattern import Sparsity

LENGTHS = [4, 6, 8, 10, 12, 14, 16, None]


@given(st.sampled_from(LENGTHS), st.sampled_from(QUANTISED), st.integers(1, 70), st.integers(0, 99))
def test_bytes_equal_those_of_a_converted_checkpoint(length: int | None, dtype: DType, k: int, seed: int) -> None:
    sparsity = Sparsity(length)
    codes = operands.random_weight(5, k, dtype, sparsity, seed)
    codes = torch.where(codes.float() == 0, torch.zeros(()), codes.float()).to(dtype.torch)  # no -0
    expected = lift_weight(codes.view(torch.int8).numpy(), sparsity, "layer")
    assert torch.equal(lift_on_device(codes, sparsity, "layer").view(torch.int8), torch.from_numpy(expected))


@pytest.mark.parametrize("dtype", [DType.BF16, DType.FP16])
@pytest.mark.parametrize("length", LENGTHS)
def test_16_bit_products_are_unchanged_and_2_of_4(length: int | None, dtype: DType) -> None:
    sparsity = Sparsity(length)
    weight = operands.random_weight(9, 50, dtype, sparsity, 1)
    x = operands.codes_of(operands.activation(7, 50, 2), dtype)
    lifted = lift_on_device(weight, sparsity, "layer")
    assert int((lifted.unflatten(1, (-1, 4)) != 0).sum(dim=2).max()) <= 2
    product = reference.gemm(reference.lift(x, sparsity), lifted)
    torch.testing.assert_close(product, reference.gemm(x, weight), rtol=1e-12, atol=1e-12)


def test_minus_zero_takes_no_place() -> None:
    codes = torch.tensor([[-0.0, 1, 2, 3, 4, 5, 6, -0.0]]).to(torch.float8_e4m3fn)
    lifted = lift_on_device(codes, Sparsity(8), "layer").float()
    assert sorted(lifted[lifted != 0].tolist()) == [1, 2, 3, 4, 5, 6]


def test_an_overfull_group_is_named() -> None:
    codes = torch.zeros(3, 16, dtype=torch.bfloat16)
    codes[2, 8:15] = 1
    with pytest.raises(CheckpointError, match=r"q_proj: row 2, columns 8 to 15: more than 6 non-zeros"):
        lift_on_device(codes, Sparsity(8), "q_proj")
