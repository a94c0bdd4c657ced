"""Triton activation kernels against the plain PyTorch reference: in Triton's interpreter, or on a GPU if there is one.

The interpreter differs from the hardware in three ways: its fma rounds twice, so that a quotient next to a tie may fall
on its other side; its float32 to e4m3 rounds ties away from zero; and does not carry a mantissa that rounds up into the
exponent (7.9 gives 4 instead of 8). Those codes, and only those, may differ there; on a GPU none.
"""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
activations = pytest.importorskip("slidesparse.kernels.triton_activations")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NEGATIVE_ZERO = 0x80
"""e4m3's -0: the kernel may write either zero."""
E4M3_BINADE = 8
"""Codes from one power of two to the next."""
PATTERNS = [None, *(Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None))]


def hard_rows(k: int) -> torch.Tensor:
    """Random rows, and those that break quantisers: zeros, tiny, huge, NaN, infinity, negative zero, a tie."""
    x = torch.randn(9, k, generator=torch.Generator().manual_seed(k)).bfloat16()
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4, k // 2] = float("nan")
    x[5, 1] = float("-inf")
    x[6] = -0.0
    x[7] = torch.arange(k) % 255 - 127 + 0.5
    return x


def near_ties(x: torch.Tensor, scale: torch.Tensor, dtype: DType, sparsity: Sparsity | None) -> torch.Tensor:
    """Where x / scale lies half-way between two codes, up to float32 rounding (e4m3: 3 mantissa bits)."""
    quotient = (x.double() / scale).nan_to_num(0)
    step = torch.exp2(torch.floor(torch.log2(quotient.abs().clamp(min=2.0**-6))) - 3) if dtype is DType.FP8 else 1
    near = ((quotient / step).remainder(1) - 0.5).abs() < 1e-5
    return near if sparsity is None else reference.lift(near.to(torch.uint8), sparsity).bool()


def check(x: torch.Tensor, dtype: DType, sparsity: Sparsity | None) -> None:
    codes, scale = activations.quantise_lift(x.to(DEVICE), dtype, sparsity)
    expected, expected_scale = reference.quantise(x, dtype)
    if sparsity is not None:
        expected = reference.lift(expected, sparsity)
    assert torch.equal(scale.cpu().nan_to_num(-1), expected_scale.nan_to_num(-1))
    ours, theirs = codes.cpu().view(torch.uint8).int(), expected.view(torch.uint8).int()
    if dtype is DType.FP8:
        for codes_of in (ours, theirs):
            codes_of[codes_of == NEGATIVE_ZERO] = 0
    assert ours.shape == theirs.shape
    wrong = ours != theirs
    if not ON_GPU:
        wrong &= ~(near_ties(x, expected_scale, dtype, sparsity) & ((ours - theirs).abs() == 1))
    if not ON_GPU and dtype is DType.FP8:
        wrong &= ~((theirs % E4M3_BINADE == 0) & (ours == theirs - E4M3_BINADE))
    assert not wrong.any()


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", list(DType))
@pytest.mark.parametrize("k", [32, 164, 2560])
def test_quantise_and_lift_equal_the_reference(k: int, dtype: DType, sparsity: Sparsity | None) -> None:
    check(hard_rows(k), dtype, sparsity)


@pytest.mark.parametrize("dtype", list(DType))
def test_a_row_longer_than_one_step_and_k_not_divisible_by_l(dtype: DType) -> None:
    check(hard_rows(6912)[:3], dtype, Sparsity(10))


def test_no_rows() -> None:
    codes, scale = activations.quantise_lift(
        torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE), DType.INT8, Sparsity(8)
    )
    assert codes.shape == (0, Sparsity(8).lifted_k(64))
    assert scale.shape == (0, 1)


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(ValueError, match="K=33"):
        activations.quantise_lift(torch.zeros(1, 33, dtype=torch.bfloat16), DType.INT8, Sparsity(8))
    with pytest.raises(ValueError, match="contiguous bfloat16"):
        activations.quantise_lift(torch.zeros(1, 32), DType.INT8, None)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulator", [torch.int32, torch.float32, torch.bfloat16])
def test_dequantise_bias_equals_the_reference(accumulator: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-100_000, 100_000, (5, 1500), generator=generator).to(accumulator)
    token, channel = torch.rand(5, 1, generator=generator), torch.rand(1500, 1, generator=generator)
    offset = torch.randn(1500, generator=generator).bfloat16() if bias else None
    ours = activations.dequantise_bias(
        acc.to(DEVICE), token.to(DEVICE), channel.to(DEVICE), None if offset is None else offset.to(DEVICE)
    ).cpu()
    expected = reference.dequantise_bias(acc, token, channel, offset)
    if ON_GPU:
        assert torch.equal(ours, expected)
    else:
        assert (ours.view(torch.int16).int() - expected.view(torch.int16).int()).abs().max() <= 1


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """M * N of 65536 * 37888, the size that crashed published runs with 32-bit offsets."""
    m, n = 65536, 37888
    acc = torch.randint(-1000, 1000, (m, n), dtype=torch.int32, device=DEVICE)
    token, channel = torch.rand(m, 1, device=DEVICE), torch.rand(n, 1, device=DEVICE)
    out = activations.dequantise_bias(acc, token, channel, None)
    for row in (0, m // 2, m - 1):
        expected = reference.dequantise_bias(acc[row : row + 1].cpu(), token[row : row + 1].cpu(), channel.cpu(), None)
        assert torch.equal(out[row : row + 1].cpu(), expected)
