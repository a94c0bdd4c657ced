"""Triton activation kernels against the plain PyTorch reference: in Triton's interpreter, or on a GPU if there is one.

For FP8 the interpreter differs from the hardware in three ways: its fma rounds twice, so that a quotient next to a tie
may fall on its other side; its float32 to e4m3 rounds ties away from zero; and does not carry a mantissa that rounds up
into the exponent (7.9 gives 4 instead of 8). Those codes, and only those, may differ there; on a GPU none. INT8 codes
are the same everywhere.
"""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
from slidesparse.kernels import triton_activations as activations
from slidesparse.kernels.triton_activations import QUANTISE_LAUNCHES
from slidesparse.kernels.triton_dequantise import DEQUANTISE_LAUNCHES, dequantise_bias
from slidesparse.kernels.triton_launch import Launch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
NEGATIVE_ZERO = 0x80
"""e4m3's -0: the kernel may write either zero."""
E4M3_BINADE = 8
"""Codes from one power of two to the next."""
PATTERNS = [None, *(Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None))]
QUANTISED = (DType.INT8, DType.FP8)
LAUNCHES = QUANTISE_LAUNCHES
POISON = 0x5A


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


def near_ties(x: torch.Tensor, scale: torch.Tensor, sparsity: Sparsity | None) -> torch.Tensor:
    """Where x / scale lies half-way between two e4m3 codes (3 mantissa bits), up to float32 rounding."""
    quotient = (x.double() / scale).nan_to_num(0)
    step = torch.exp2(torch.floor(torch.log2(quotient.abs().clamp(min=2.0**-6))) - 3)
    near = ((quotient / step).remainder(1) - 0.5).abs() < 1e-5
    return near if sparsity is None else reference.lift(near.to(torch.uint8), sparsity).bool()


def check(x: torch.Tensor, dtype: DType, sparsity: Sparsity | None, launch: Launch = QUANTISE_LAUNCHES[0]) -> None:
    m, k = x.shape
    width = k if sparsity is None else sparsity.lifted_k(k)
    codes = torch.full((m, width), POISON, dtype=torch.uint8, device=DEVICE).view(dtype.torch)
    scale = torch.full((m, 1), -1.0, device=DEVICE)
    activations.quantise_lift(x.to(DEVICE), dtype, sparsity, launch, codes, scale)
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
    if not ON_GPU and dtype is DType.FP8:
        wrong &= ~(near_ties(x, expected_scale, sparsity) & ((ours - theirs).abs() == 1))
        wrong &= ~((theirs % E4M3_BINADE == 0) & (ours == theirs - E4M3_BINADE))
    assert not wrong.any()


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("k", [32, 164, 2560])
def test_quantise_and_lift_equal_the_reference(k: int, dtype: DType, sparsity: Sparsity | None) -> None:
    check(hard_rows(k), dtype, sparsity)


@pytest.mark.parametrize("dtype", QUANTISED)
def test_a_row_longer_than_one_step_and_k_not_divisible_by_l(dtype: DType) -> None:
    check(hard_rows(6912)[:3], dtype, Sparsity(10))


def all_mantissas(exponent: int) -> torch.Tensor:
    """Every mantissa as the largest magnitude of a row, against every smaller bfloat16 that has a code: [128, 2560]."""
    below = torch.arange(128, 256).double() * torch.exp2(-torch.arange(0.0, 20.0, dtype=torch.float64))[:, None]
    row = below.reshape(-1) * torch.where(torch.arange(2560) % 3 == 0, -1.0, 1.0)
    largest = torch.arange(128, 256).double()[:, None]
    return (torch.where(row.abs() > largest, largest, row) * 2.0**exponent).bfloat16()


WIDE = Launch(1024, 32)
"""As few steps as possible: the interpreter takes its time by the step."""
EXPONENTS = (120, -100, -122)


@pytest.mark.parametrize("exponent", [0, -127, *(pytest.param(e, marks=pytest.mark.gpu) for e in EXPONENTS)])
def test_every_pair_of_mantissas_int8(exponent: int) -> None:
    """One operation a value is exact whatever the scale, up to the largest and down to the smallest numbers."""
    check(all_mantissas(exponent), DType.INT8, None, WIDE)


@pytest.mark.gpu
@pytest.mark.parametrize("exponent", [0, -127, *EXPONENTS])
def test_every_pair_of_mantissas_fp8(exponent: int) -> None:
    check(all_mantissas(exponent), DType.FP8, None, WIDE)


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("sparsity", [None, Sparsity(8), Sparsity(14)], ids=str)
def test_every_launch_of_quantise(sparsity: Sparsity | None, launch: Launch) -> None:
    """K=1100 is several batches of narrow launches and a part of wide ones."""
    check(hard_rows(1100), DType.INT8, sparsity, launch)


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
def test_long_rows_that_are_looped(sparsity: Sparsity | None) -> None:
    """One warp for 2,560 columns and more: beyond the 64 windows a lane that are unrolled for most patterns."""
    k = 8200
    assert k // 4 > activations.UNROLLED * 32
    for words in (32, 96):
        check(hard_rows(k)[3:4], DType.INT8, sparsity, Launch(words, 1))


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("k", [4, 36, 516])
def test_rows_shorter_than_a_step_and_no_multiple_of_one(k: int, sparsity: Sparsity | None) -> None:
    check(hard_rows(k), DType.INT8, sparsity)


@pytest.mark.parametrize("k", [76_000, 80_000])
def test_rows_around_the_limit_of_the_short_division(k: int) -> None:
    """32,576 and 34,290 windows; up to 32,768 they are divided by a multiplication and a shift."""
    check(hard_rows(k)[:1], DType.INT8, Sparsity(14), WIDE)


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
    x = torch.zeros(2, 32, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="BF16 is not a quantised type"):
        activations.quantise_lift(x, DType.BF16, None)
    with pytest.raises(ValueError, match=r"codes must be contiguous torch.int8 \[2, 32\]"):
        activations.quantise_lift(x, DType.INT8, None, codes=torch.zeros(2, 64, dtype=torch.int8))
    with pytest.raises(ValueError, match="out must be contiguous"):
        dequantise_bias(x.float(), x[:, :1].float(), x.float(), None, out=x.float())


@pytest.mark.parametrize("launch", DEQUANTISE_LAUNCHES, ids=str)
@pytest.mark.parametrize("rows", [5, 1])
def test_every_launch_of_dequantise(rows: int, launch: Launch) -> None:
    """5 rows are no multiple of any launch's rows, 1 row is fewer. The interpreter cuts where bfloat16
    should round: 8-bit numbers times powers of two."""
    acc = torch.arange(rows * 1024, dtype=torch.int32).reshape(rows, 1024) % 509 - 254
    token, channel = 2.0 ** torch.arange(rows).reshape(rows, 1), 2.0 ** (torch.arange(1024) % 5).reshape(1024, 1)
    out = torch.full((rows, 1024), float("nan"), dtype=torch.bfloat16, device=DEVICE)
    dequantise_bias(acc.to(DEVICE), token.to(DEVICE), channel.to(DEVICE), None, launch, out)
    assert torch.equal(out.cpu(), reference.dequantise_bias(acc, token, channel, None))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("accumulator", [torch.int32, torch.float32, torch.bfloat16])
def test_dequantise_bias_equals_the_reference(accumulator: torch.dtype, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    acc = torch.randint(-100_000, 100_000, (5, 1500), generator=generator).to(accumulator)
    token, channel = torch.rand(5, 1, generator=generator), torch.rand(1500, 1, generator=generator)
    offset = torch.randn(1500, generator=generator).bfloat16() if bias else None
    ours = dequantise_bias(
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
    out = dequantise_bias(acc, token, channel, None)
    for row in (0, m // 2, m - 1):
        expected = reference.dequantise_bias(acc[row : row + 1].cpu(), token[row : row + 1].cpu(), channel.cpu(), None)
        assert torch.equal(out[row : row + 1].cpu(), expected)
