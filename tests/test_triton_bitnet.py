"""Fused BitNet kernels against the PyTorch reference, and that against transformers' own modules: in Triton's
interpreter, or on a GPU if there is one.

A kernel sums a row's squares in another order than torch, so that its r = 1 / rms may differ in the last bits. Every
row must be exactly what the reference gives for some r within 8 units of float32 of torch's: codes, scale and all.

FP8 codes in the interpreter are held against the quantise kernel instead, because float32 to e4m3 is off there (see
test_triton_activations); on a GPU, and for INT8 everywhere, against plain torch.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import slidesparse
from slidesparse.dtypes import DType
from slidesparse.kernels import bitnet_reference, reference
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
import triton
import triton.language as tl

from slidesparse.kernels import triton_activations as activations
from slidesparse.kernels import triton_bf16, triton_bitnet
from slidesparse.kernels.triton_launch import Launch

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
EPS = 1e-5
PATTERNS = [None, *(Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None))]
QUANTISED = (DType.INT8, DType.FP8)
OPERATIONS: tuple[BitNetOperation, ...] = ("norm", "add", "gate")
NEGATIVE_ZERO = 0x80
"""e4m3's -0: a kernel may write either zero."""
POISON = 0x5A
UNIT = 2.0**-24
UNITS = 8
KERNELS = {
    "norm": triton_bitnet.norm_quantise_lift,
    "add": triton_bitnet.add_norm_quantise_lift,
    "gate": triton_bitnet.gate_norm_quantise_lift,
}
pytestmark = [
    # The interpreter is numpy, which says so when a float32 overflows.
    pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + shape[-1]))


def hard_rows(columns: int, seed: int = 0) -> torch.Tensor:
    """Random rows, and those that break norms and quantisers. The squares of row 3 overflow: r is 0."""
    x = random(9, columns, seed=seed).bfloat16()
    x[1] = 0
    x[2] *= 1e-30
    x[3] *= 1e30
    x[4, columns // 2] = float("nan")
    x[5, 1] = float("inf")
    x[6] = -0.0
    x[7] *= 1e-3
    x[7, 2] = 30.0
    return x


def weights(k: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    weight = 1 + 0.3 * random(k, seed=5)
    weight[0] = 0
    return weight.to(dtype)


def inputs(operation: BitNetOperation, k: int) -> list[torch.Tensor]:
    if operation == "gate":
        return [hard_rows(2 * k)]
    x = hard_rows(k)
    return [x] if operation == "norm" else [x, (3 * random(9, k, seed=7)).bfloat16()]


def before_norm(operation: BitNetOperation, operands: list[torch.Tensor]) -> torch.Tensor:
    if operation == "gate":
        return bitnet_reference.squared_relu_gate(operands[0])
    return operands[0] if operation == "norm" else bitnet_reference.add(operands[0], operands[1])


def quantised(y: torch.Tensor, dtype: DType, sparsity: Sparsity | None) -> tuple[torch.Tensor, torch.Tensor]:
    if dtype is DType.FP8 and not ON_GPU:
        return activations.quantise_lift(y, dtype, sparsity)
    return bitnet_reference.quantise_lift(y, dtype, sparsity)


def comparable(codes: torch.Tensor) -> torch.Tensor:
    """Codes as bytes on the CPU, without e4m3's -0."""
    plain = codes.cpu().view(torch.uint8)
    return torch.where(plain == NEGATIVE_ZERO, 0, plain) if codes.dtype == torch.float8_e4m3fn else plain


def same_rows(
    codes: torch.Tensor, scale: torch.Tensor, y: torch.Tensor, dtype: DType, sparsity: Sparsity | None
) -> torch.Tensor:
    """Which rows are the quantised y, bool [M]."""
    expected, expected_scale = quantised(y, dtype, sparsity)
    assert codes.shape == expected.shape
    same = (comparable(codes) == comparable(expected)).all(dim=1)
    return same & (scale.cpu().nan_to_num(-1) == expected_scale.nan_to_num(-1)).squeeze(1)


def run(
    operation: BitNetOperation,
    operands: list[torch.Tensor],
    weight: torch.Tensor,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None = None,
) -> tuple[torch.Tensor, ...]:
    """The kernel, writing into poisoned outputs."""
    m, k = operands[0].shape[0], weight.numel()
    width = k if sparsity is None else sparsity.lifted_k(k)
    codes = torch.full((m, width), POISON, dtype=torch.uint8, device=DEVICE).view(dtype.torch)
    scale = torch.full((m, 1), -1.0, device=DEVICE)
    on_device = [operand.to(DEVICE) for operand in operands]
    return KERNELS[operation](*on_device, weight.to(DEVICE), EPS, dtype, sparsity, launch, codes, scale)


def check(
    operation: BitNetOperation,
    operands: list[torch.Tensor],
    weight: torch.Tensor,
    dtype: DType,
    sparsity: Sparsity | None,
    launch: Launch | None = None,
) -> None:
    codes, scale, *rest = run(operation, operands, weight, dtype, sparsity, launch)
    t = before_norm(operation, operands)
    for total in rest:
        assert torch.equal(total.cpu().nan_to_num(-1), t.nan_to_num(-1))
    inverse = bitnet_reference.inverse_rms(t, EPS)
    wrong = torch.arange(len(t))
    for units in sorted(range(-UNITS, UNITS + 1), key=abs):
        y = bitnet_reference.normalise(t[wrong], inverse[wrong] * (1 + units * UNIT), weight)
        wrong = wrong[~same_rows(codes.cpu()[wrong], scale.cpu()[wrong], y, dtype, sparsity)]
        if not len(wrong):
            return
    raise AssertionError(f"rows {wrong.tolist()} are those of no r near the reference's")


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_pattern(operation: BitNetOperation, dtype: DType, sparsity: Sparsity | None) -> None:
    check(operation, inputs(operation, 164), weights(164), dtype, sparsity)


@pytest.mark.parametrize("sparsity", [None, Sparsity(8)], ids=str)
@pytest.mark.parametrize(("operation", "k"), [("norm", 2560), ("add", 2560), ("gate", 6912)])
def test_rows_of_the_model(operation: BitNetOperation, k: int, sparsity: Sparsity | None) -> None:
    operands = [operand[:3] for operand in inputs(operation, k)]
    check(operation, operands, weights(k), DType.INT8, sparsity)


@pytest.mark.parametrize("sparsity", PATTERNS, ids=str)
@pytest.mark.parametrize("k", [4, 36, 516])
def test_rows_shorter_than_a_tile_and_no_multiple_of_one(k: int, sparsity: Sparsity | None) -> None:
    check("add", [hard_rows(k)[6:], hard_rows(k, seed=1)[6:]], weights(k), DType.INT8, sparsity)


@pytest.mark.parametrize("sparsity", PATTERNS[1:], ids=str)
@pytest.mark.parametrize("k", [166, 1022, 1024])
def test_an_odd_number_of_pairs_and_blocks_that_are_full(k: int, sparsity: Sparsity | None) -> None:
    """K=166 ends half-way in a word of codes; K=1024 fills a power of two of words, with nothing behind the row."""
    check("norm", [hard_rows(k)[6:]], weights(k), DType.INT8, sparsity, Launch(128, 4))


@pytest.mark.parametrize("dtype", QUANTISED)
def test_float32_weights_are_rounded_with_the_product_only(dtype: DType) -> None:
    weight = weights(164, torch.float32)
    assert not torch.equal(weight, weight.bfloat16().float())
    for operation in OPERATIONS:
        check(operation, inputs(operation, 164), weight, dtype, Sparsity(8))


@pytest.mark.parametrize("launch", triton_bitnet.NORM_LAUNCHES, ids=str)
@pytest.mark.parametrize("sparsity", [None, Sparsity(8), Sparsity(14)], ids=str)
def test_every_launch(sparsity: Sparsity | None, launch: Launch) -> None:
    """K=1100 is several tiles of narrow launches and a part of wide ones."""
    check("add", [hard_rows(1100)[6:], hard_rows(1100, seed=1)[6:]], weights(1100), DType.INT8, sparsity, launch)


def test_the_longest_row() -> None:
    k = 65536
    assert triton_bitnet.launches(k) == (Launch(2048, 32),)
    check("norm", [hard_rows(k)[:1]], weights(k), DType.INT8, Sparsity(10))


def test_the_default_launch_holds_the_row_at_ease() -> None:
    for k in (4, 2560, 6912, 28672, 32768):
        for launch in triton_bitnet.launches(k):
            assert k <= 2 * triton_bitnet.HELD * 32 * launch.warps
        assert k <= 2 * triton_bitnet.AT_EASE * 32 * triton_bitnet.launches(k)[0].warps
    with pytest.raises(ValueError, match="K=65540 is more than the 65536"):
        triton_bitnet.launches(65540)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_codes_and_scales_keep_the_stated_bound(operation: BitNetOperation, dtype: DType) -> None:
    """Against torch's own r: a code by one step at most, few of them; a scale hardly ever."""
    m, k = 12, 1280
    operands = [random(m, 2 * k if operation == "gate" else k, seed=3).bfloat16()]
    operands += [random(m, k, seed=4).bfloat16()] if operation == "add" else []
    weight = weights(k)
    codes, scale, *_ = run(operation, operands, weight, dtype, None)
    t = before_norm(operation, operands)
    y = bitnet_reference.normalise(t, bitnet_reference.inverse_rms(t, EPS), weight)
    expected, expected_scale = quantised(y, dtype, None)
    steps = (comparable(codes).view(torch.int8).int() - comparable(expected).view(torch.int8).int()).abs()
    assert steps.max() <= 1
    assert (steps > 0).float().mean() < 1e-3
    assert ((scale.cpu() / expected_scale - 1).abs() <= bitnet_reference.SCALE_ERROR).all()


def test_the_sum_may_replace_the_residual() -> None:
    x, residual, weight = hard_rows(164).to(DEVICE), hard_rows(164, seed=1).to(DEVICE), weights(164).to(DEVICE)
    codes, scale, total = triton_bitnet.add_norm_quantise_lift(x, residual, weight, EPS, DType.INT8, Sparsity(8))
    again = residual.clone()
    in_place = triton_bitnet.add_norm_quantise_lift(x, again, weight, EPS, DType.INT8, Sparsity(8), total=again)
    assert in_place[2] is again
    for ours, theirs in zip(in_place, (codes, scale, total), strict=True):
        assert torch.equal(ours.float().nan_to_num(-1), theirs.float().nan_to_num(-1))


def test_no_rows() -> None:
    x, weight = torch.empty(0, 64, dtype=torch.bfloat16, device=DEVICE), weights(64).to(DEVICE)
    codes, scale, total = triton_bitnet.add_norm_quantise_lift(x, x, weight, EPS, DType.INT8, Sparsity(8))
    assert codes.shape == (0, Sparsity(8).lifted_k(64))
    assert (scale.shape, total.shape) == ((0, 1), (0, 64))


def test_what_it_cannot_take_is_refused() -> None:
    x, weight = torch.zeros(2, 64, dtype=torch.bfloat16), weights(64)
    norm, add, gate = KERNELS.values()
    with pytest.raises(ValueError, match=r"x must be contiguous bfloat16 \[2, 64\], not torch.float32"):
        norm(x.float(), weight, EPS, DType.INT8, None)
    with pytest.raises(ValueError, match=r"residual must be contiguous bfloat16 \[2, 64\]"):
        add(x, x[:1], weight, EPS, DType.INT8, None)
    with pytest.raises(ValueError, match=r"gate_up must be contiguous bfloat16 \[2, 128\]"):
        gate(x, weight, EPS, DType.INT8, None)
    with pytest.raises(ValueError, match="weight must be contiguous bfloat16 or float32"):
        norm(x, weight.half(), EPS, DType.INT8, None)
    with pytest.raises(ValueError, match="K=33"):
        norm(x[:, :33].contiguous(), weight[:33].clone(), EPS, DType.INT8, Sparsity(8))
    with pytest.raises(ValueError, match="BF16 is not a quantised type"):
        norm(x, weight, EPS, DType.BF16, None)
    with pytest.raises(ValueError, match="total must be contiguous"):
        add(x, x, weight, EPS, DType.INT8, None, total=x.float())
    long = torch.zeros(1, 8192, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"K=8192 is too long for words=64 warps=2 rows=1: take one of launches"):
        norm(long, long[0], EPS, DType.INT8, None, Launch(64, 2))


# -- arithmetic on pairs -------------------------------------------------------------------------


@triton.jit
def pair_kernel(a_ptr, b_ptr, out_ptr, OPERATION: tl.constexpr, PTX: tl.constexpr, COUNT: tl.constexpr):
    index = tl.program_id(0) * COUNT + tl.arange(0, COUNT)
    a, b = tl.load(a_ptr + index), tl.load(b_ptr + index)
    if OPERATION == "product":
        pair = triton_bf16.product(a, b, PTX)
    elif OPERATION == "total":
        pair = triton_bf16.total(a, b, PTX)
    elif OPERATION == "positive":
        pair = triton_bf16.positive(a, PTX)
    else:
        low, high = triton_bf16.floats(a)
        # Odd multiples of 2**-12 of a value: never a bfloat16, and ties among them.
        pair = triton_bf16.rounded(low * 1.001953125, high * 1.001953125, PTX)
    tl.store(out_ptr + index, pair)


@pytest.mark.parametrize("operation", ["product", "total", "positive", "rounded"])
def test_pairs_are_rounded_as_torch_rounds_them(operation: str) -> None:
    """Every bfloat16, NaN, infinities and subnormal numbers included, with one of its size and one of any size."""
    every = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    close = (every.float() * torch.randn(1 << 16, generator=generator)).bfloat16()
    any_size = every[torch.randperm(1 << 16, generator=generator)]
    a, b = every.repeat(2), torch.cat((close, any_size))
    out = torch.empty_like(a, device=DEVICE)
    words = [tensor.to(DEVICE).view(torch.int32) for tensor in (a, b)]
    pair_kernel[(8,)](*words, out.view(torch.int32), OPERATION=operation, PTX=ON_GPU, COUNT=1 << 13)
    expected = {
        "product": a * b,
        "total": a + b,
        "positive": torch.relu(a),
        "rounded": (a.float() * 1.001953125).bfloat16(),
    }[operation]
    wrong = out.cpu() != expected
    wrong &= ~(out.cpu().isnan() & expected.isnan())
    if operation == "product":
        wrong &= expected.abs() > 2.0**-126  # torch may round such products twice
    assert not wrong.any()


# -- the reference ------------------------------------------------------------------------------------


def transformers_model(hidden: int, intermediate: int):
    from transformers import BitNetConfig
    from transformers.models.bitnet.modeling_bitnet import BitNetMLP, BitNetRMSNorm

    config = BitNetConfig(hidden_size=hidden, intermediate_size=intermediate, hidden_act="relu2", rms_norm_eps=EPS)
    norm, mlp = BitNetRMSNorm(hidden, eps=EPS).bfloat16(), BitNetMLP(config).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(weights(hidden))
        mlp.ffn_sub_norm.weight.copy_(weights(intermediate))
    return norm, mlp


def test_the_reference_is_what_transformers_computes() -> None:
    """Their modules up to the input of the linear, then quantised: bit for bit, and our kernels on the same numbers."""
    hidden, intermediate = 96, 160
    norm, mlp = transformers_model(hidden, intermediate)
    x, residual = hard_rows(hidden), (3 * random(9, hidden, seed=7)).bfloat16()
    seen: list[torch.Tensor] = []
    mlp.down_proj.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    with torch.no_grad():
        normed = norm(x)
        total = residual + x
        mlp_input = norm(total)
        mlp(mlp_input)
        gate_up = torch.cat((mlp.gate_proj(mlp_input), mlp.up_proj(mlp_input)), dim=1)
    ours = {
        "norm": bitnet_reference.norm_quantise_lift(x, norm.weight.detach(), EPS, DType.INT8, None),
        "add": bitnet_reference.add_norm_quantise_lift(x, residual, norm.weight.detach(), EPS, DType.INT8, None)[:2],
        "gate": bitnet_reference.gate_norm_quantise_lift(
            gate_up, mlp.ffn_sub_norm.weight.detach(), EPS, DType.INT8, None
        ),
    }
    theirs = {"norm": normed, "add": mlp_input, "gate": seen[0]}
    for operation, (codes, scale) in ours.items():
        expected, expected_scale = reference.quantise(theirs[operation], DType.INT8)
        assert torch.equal(codes, expected), operation
        assert torch.equal(scale.nan_to_num(-1), expected_scale.nan_to_num(-1)), operation
    assert torch.equal(bitnet_reference.add(x, residual).nan_to_num(-1), total.nan_to_num(-1))
    check("norm", [x], norm.weight.detach(), DType.INT8, Sparsity(8))
    check("gate", [gate_up], mlp.ffn_sub_norm.weight.detach(), DType.INT8, Sparsity(8))


@pytest.mark.parametrize("sparsity", [None, Sparsity(8), Sparsity(10)], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_floor_counts_each_operand_once(operation: BitNetOperation, sparsity: Sparsity | None) -> None:
    operands, weight = inputs(operation, 164), weights(164)
    tensors = (*operands, weight, *run(operation, operands, weight, DType.INT8, sparsity))
    assert bitnet_reference.floor_bytes(operation, 9, 164, sparsity) == sum(tensor.nbytes for tensor in tensors)
    saved = {"norm": 4, "add": 4, "gate": 8}[operation] * 9 * 164
    floor = bitnet_reference.floor_bytes(operation, 9, 164, sparsity)
    assert bitnet_reference.unfused_bytes(operation, 9, 164, sparsity) == floor + saved


# -- for a GPU, and on one -------------------------------------------------------------------------


def test_machine_code() -> None:
    """The interpreter runs no PTX and allows what Triton does not: here its compiler and ptxas take the kernels, INT8
    for A100, FP8 for H100 and RTX 5090. A row stays in registers, and lifting takes no more shared memory than its
    codes do, up to the next power of two, with room for padding behind a row that fills it."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": str(Path(slidesparse.__file__).parents[1])}
    program = Path(__file__).parent / "compile_bitnet.py"
    done = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 19
    for _, _, k, sparsity, _, shared, spilt in lines:
        codes = int(k) + (4 if sparsity == "2:inf" else 0)
        lifted = sparsity not in ("None", "2:4")
        assert (int(shared) == triton.next_power_of_2(codes)) if lifted else (int(shared) < 64)
        assert spilt == "0"


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31() -> None:
    """320,000 rows of 6,912 pairs of gate and up."""
    m, k = 320_000, 6912
    gate_up = torch.empty(m, 2 * k, dtype=torch.bfloat16, device=DEVICE).normal_()
    weight = weights(k)
    codes, scale = triton_bitnet.gate_norm_quantise_lift(gate_up, weight.to(DEVICE), EPS, DType.INT8, Sparsity(8))
    for row in (0, m // 2, m - 1):
        rows = slice(row, row + 1)
        t = bitnet_reference.squared_relu_gate(gate_up[rows].cpu())
        y = bitnet_reference.normalise(t, bitnet_reference.inverse_rms(t, EPS), weight)
        expected, expected_scale = bitnet_reference.quantise_lift(y, DType.INT8, Sparsity(8))
        assert (codes[rows].cpu().int() - expected.int()).abs().max() <= 1
        assert (scale[rows].cpu() / expected_scale - 1).abs().max() <= bitnet_reference.SCALE_ERROR
