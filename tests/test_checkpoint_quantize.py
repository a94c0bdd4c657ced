"""Quantisation against torch and against BitNet's own definition as `transformers` implements it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers.integrations.bitnet import WeightQuant

from slidesparse.checkpoint.quantize import absmax_per_channel, check_finite, ternary, ternary_as_e4m3
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError


def bits(weight: torch.Tensor) -> np.ndarray:
    return weight.view(torch.uint16).numpy()


weights = st.builds(
    lambda seed, n, k, scale: (torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * scale).bfloat16(),
    st.integers(0, 2**31), st.integers(1, 7), st.integers(1, 90), st.sampled_from([1e-30, 1e-6, 0.02, 300.0, 1e30]),
)  # fmt: skip


@given(weights)
@settings(max_examples=100)
def test_ternary_is_bitnets_own_quantisation(weight: torch.Tensor) -> None:
    """`transformers` gives codes * scale; our codes and scale must rebuild it."""
    made = ternary(bits(weight), "layer")
    expected = WeightQuant.apply(weight.float())
    rebuilt = torch.from_numpy(made.codes).float() * torch.from_numpy(made.scale)
    torch.testing.assert_close(rebuilt, expected, rtol=1e-6, atol=0)
    assert torch.equal(torch.sign(expected).to(torch.int8), torch.from_numpy(made.codes))
    assert made.scale.shape == (weight.shape[0], 1)
    assert len(set(made.scale.ravel().tolist())) == 1
    assert made.error == pytest.approx(float((weight.double() - rebuilt.double()).square().sum()), rel=1e-9)


def test_ternary_rounds_half_to_even_and_clamps_the_mean() -> None:
    weight = torch.tensor([[1.0, 1.0, 0.5, -0.5, 2.0, 1.0]], dtype=torch.bfloat16)  # mean 1
    assert ternary(bits(weight), "x").codes.tolist() == [[1, 1, 0, 0, 1, 1]]
    tiny = torch.full((2, 4), 2.0e-6, dtype=torch.bfloat16)
    made = ternary(bits(tiny), "x")
    assert made.scale.tolist() == [[np.float32(1e-5)]] * 2
    assert not made.codes.any()
    assert not ternary(bits(torch.zeros(2, 4, dtype=torch.bfloat16)), "x").codes.any()


def test_ternary_codes_are_the_same_values_in_e4m3() -> None:
    codes = np.array([[-1, 0, 1], [1, 1, -1]], dtype=np.int8)
    fp8 = torch.from_numpy(ternary_as_e4m3(codes)).view(torch.float8_e4m3fn)
    assert fp8.float().tolist() == codes.tolist()


@given(weights)
@settings(max_examples=100)
def test_absmax_int8_is_the_definition(weight: torch.Tensor) -> None:
    made = absmax_per_channel(bits(weight), DType.INT8, "layer")
    scale = torch.from_numpy(made.scale)
    largest = weight.float().abs().amax(dim=1, keepdim=True)
    torch.testing.assert_close(scale[largest > 1e-35], (largest / 127)[largest > 1e-35], rtol=0, atol=0)
    expected = (weight.float() / scale).round().clamp(-127, 127).to(torch.int8)
    assert torch.equal(torch.from_numpy(made.codes), expected)


@given(weights)
@example(torch.tensor([[4.4373e-31, 8.2045e-32, 1.0292e-30]]).bfloat16())  # errors near float32's rounding
@settings(max_examples=100)
def test_absmax_fp8_is_torchs_cast(weight: torch.Tensor) -> None:
    made = absmax_per_channel(bits(weight), DType.FP8, "layer")
    scale = torch.from_numpy(made.scale)
    expected = (weight.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
    got = torch.from_numpy(made.codes).view(torch.float8_e4m3fn)
    assert torch.equal(got.float(), expected.float())
    assert not (made.codes == -128).any(), "-0 must be written as +0"
    rebuilt = got.double() * scale.double()
    energy = float(weight.double().square().sum())
    assert made.energy == pytest.approx(energy, rel=1e-9)
    assert made.error == pytest.approx(float((weight.double() - rebuilt).square().sum()), rel=1e-5, abs=1e-12 * energy)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_rows_of_zeros_and_of_the_smallest_values_have_a_usable_scale(dtype: DType) -> None:
    weight = torch.zeros(3, 8, dtype=torch.bfloat16)
    weight[1, 2] = 9.2e-41  # subnormal: a scale of it / 448 would be zero
    weight[2] = torch.arange(8)
    made = absmax_per_channel(bits(weight), dtype, "layer")
    assert np.isfinite(made.scale).all()
    assert (made.scale > 0).all()
    assert not made.codes[0].any()
    assert made.codes[2].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers_are_named(value: float) -> None:
    weight = torch.randn(5, 40).bfloat16()
    weight[3, 17] = value
    for quantise in (ternary, lambda w, name: absmax_per_channel(w, DType.FP8, name)):
        with pytest.raises(
            CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: row 3, column 17 is NaN or inf"
        ):
            quantise(bits(weight), "model.layers.1.mlp.up_proj.weight")
    check_finite(bits(torch.full((2, 3), 3.3e38).bfloat16()), "largest value")
