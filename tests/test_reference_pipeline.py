"""The yardstick kernels compute what the reference does, to one step of a code and one bit of a bfloat16."""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
from slidesparse.kernels import reference_pipeline as baseline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PATTERNS = [None, *(Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None))]


def tokens(m: int, k: int) -> torch.Tensor:
    return torch.randn(m, k, generator=torch.Generator().manual_seed(k)).bfloat16()


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", [DType.INT8, DType.FP8])
def test_codes_are_the_references_to_one_step(dtype: DType, sparsity: Sparsity | None) -> None:
    x = tokens(5, 164)
    codes, scale = baseline.quantise_slide(x.to(DEVICE), dtype, sparsity)
    expected, expected_scale = reference.quantise(x, dtype)
    if sparsity is not None:
        expected = reference.lift(expected, sparsity)
    assert codes.shape == expected.shape
    torch.testing.assert_close(scale.cpu(), expected_scale, rtol=1e-6, atol=0)
    ours, theirs = codes.cpu().float(), expected.float()
    wrong = (ours - theirs).abs() > (1 if dtype is DType.INT8 else (theirs.abs() / 8).clamp(min=2.0**-9))
    if dtype is DType.FP8 and DEVICE == "cpu":
        # Triton's interpreter does not carry a mantissa that rounds up into the exponent: half of a power of two.
        wrong &= ~((theirs.abs().frexp().mantissa == 0.5) & (ours * 2 == theirs))
    assert not wrong.any()
    assert float((ours != theirs).float().mean()) < 0.1


@pytest.mark.parametrize("launch", baseline.QUANTISE_LAUNCHES, ids=str)
def test_every_launch_gives_the_same_codes(launch: baseline.QuantiseLaunch) -> None:
    """K=8400: several steps of either pass, the last of them partial."""
    x = tokens(2, 8400).to(DEVICE)
    codes, scale = baseline.quantise_slide(x, DType.INT8, Sparsity(8), launch)
    expected, expected_scale = baseline.quantise_slide(x, DType.INT8, Sparsity(8))
    assert torch.equal(codes, expected)
    assert torch.equal(scale, expected_scale)


@pytest.mark.parametrize("launch", baseline.DEQUANTISE_LAUNCHES, ids=str)
@pytest.mark.parametrize("accumulator", [torch.int32, torch.bfloat16])
def test_dequantise_bias(accumulator: torch.dtype, launch: baseline.DequantiseLaunch) -> None:
    """To one bit: the compiler may fuse its last multiplication and addition; the interpreter cuts to bfloat16."""
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-100_000, 100_000, (133, 200), generator=generator).to(accumulator)
    token, channel = torch.rand(133, 1, generator=generator), torch.rand(200, 1, generator=generator)
    bias = torch.randn(200, generator=generator).bfloat16()
    ours = baseline.dequantise_bias(acc.to(DEVICE), token.to(DEVICE), channel.to(DEVICE), bias.to(DEVICE), launch).cpu()
    expected = reference.dequantise_bias(acc, token, channel, bias)
    assert (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1


def test_a_row_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="K=33"):
        baseline.quantise_slide(torch.zeros(1, 33, dtype=torch.bfloat16), DType.INT8, Sparsity(8))
