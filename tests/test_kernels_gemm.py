"""Every algorithm of both CPU backends against the exact product; and the checks that would catch a wrong one."""

from __future__ import annotations

import pytest
import torch
from small_runs import MACHINE

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError, UnsupportedHere
from slidesparse.kernels import operands, reference, verify
from slidesparse.kernels.backend import Backend, backend
from slidesparse.kernels.verify import Expected
from slidesparse.pattern import Sparsity

# (M, N, K): one token, one channel, K that no L divides, K below a group, tile edges, several blocks
SHAPES = [(1, 5, 34), (3, 1, 7), (16, 9, 40), (17, 33, 66), (64, 8, 32), (65, 24, 100), (2, 3, 2100)]


def expect(a: torch.Tensor, plain: torch.Tensor, dtype: DType, terms: int) -> Expected:
    return Expected(a, plain, dtype, (verify.gamma(terms), "gamma"), reference.accumulator(dtype))


def compare(
    side: Backend, x: torch.Tensor, codes: torch.Tensor, plain: torch.Tensor, a: torch.Tensor, dtype: DType
) -> None:
    """All algorithms on one size; `a`, `plain`: the unlifted operands, `x`, `codes`: those that the backend takes."""
    packed = side.pack(codes, dtype, "layer")
    terms = packed.k // 2 if side.sparse else packed.k
    assert side.accumulation_error(dtype, packed.k) == (verify.gamma(terms), f"gamma({terms})")
    expected = expect(a, plain, dtype, terms)
    algorithms = side.algorithms(dtype, x.shape[0], packed.n, packed.k)
    assert len(algorithms) >= 2
    assert len({algorithm.name for algorithm in algorithms}) == len(algorithms)
    for algorithm in algorithms:
        out = verify.poison(torch.empty(x.shape[0], packed.n, dtype=reference.accumulator(dtype)))
        side.gemm(x, packed, algorithm, out)
        check = expected.check(out)
        assert expected.holds(out)
        assert check.verified == ("exact" if dtype is DType.INT8 else "within_bound"), (algorithm.name, check.text)
        assert algorithm.name in side.path(dtype, algorithm)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_dense(shape: tuple[int, int, int], dtype: DType) -> None:
    m, n, k = shape
    plain = operands.random_weight(n, k, dtype, None, 1)
    a, _ = reference.quantise(operands.activation(m, k, 2), dtype)
    compare(backend("cpu_dense"), a, plain, plain, a, dtype)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("length", [4, 6, 8, 10, 16, None])
def test_sparse_equals_the_unlifted_product(shape: tuple[int, int, int], length: int | None, dtype: DType) -> None:
    """The reference never sees the lifted operands, so lift, compression and kernel are checked together."""
    m, n, k = shape
    sparsity = Sparsity(length)
    plain = operands.random_weight(n, k, dtype, sparsity, 1)
    a, _ = reference.quantise(operands.activation(m, k, 2), dtype)
    a[0] = 0
    lifted = operands.lift(plain, sparsity, "layer")
    compare(backend("cpu_sparse"), reference.lift(a, sparsity), lifted, plain, a, dtype)


@pytest.mark.parametrize("name", ["cpu_dense", "cpu_sparse"])
def test_int8_extremes_do_not_saturate(name: str) -> None:
    """+-127 everywhere: 16-bit intermediate sums, as in some vector units, would overflow."""
    side, k = backend(name), 4096
    x = torch.full((3, k), 127, dtype=torch.int8)
    codes = torch.full((4, k), -127, dtype=torch.int8)
    if side.sparse:
        codes.view(4, -1, 4)[:, :, 2:] = 0
    packed = side.pack(codes, DType.INT8, "layer")
    expected = -127 * 127 * (k // 2 if side.sparse else k)
    for algorithm in side.algorithms(DType.INT8, 3, 4, k):
        out = verify.poison(torch.empty(3, 4, dtype=torch.int32))
        assert (side.gemm(x, packed, algorithm, out) == expected).all(), algorithm.name


def test_sparse_weight_is_kept_compressed() -> None:
    sparsity = Sparsity(8)
    plain = operands.random_weight(16, 64, DType.INT8, sparsity, 0)
    packed = backend("cpu_sparse").pack(operands.lift(plain, sparsity, "l"), DType.INT8, "l")
    assert packed.nbytes == sparsity.weight_bytes(16, 64)


def test_a_dense_weight_is_refused_by_the_sparse_backend() -> None:
    with pytest.raises(CheckpointError, match="q_proj: row 0"):
        backend("cpu_sparse").pack(torch.ones(2, 32, dtype=torch.int8), DType.INT8, "q_proj")


@pytest.mark.parametrize("name", ["vllm", "marlin"])
def test_a_backend_that_is_none_says_which_there_are(name: str) -> None:
    with pytest.raises(UnsupportedHere, match=f"{name} is not in this version"):
        backend(name)


def test_16_bit_types_are_not_for_the_cpu() -> None:
    with pytest.raises(UnsupportedHere, match="cpu_sparse has no BF16"):
        backend("cpu_sparse").require(MACHINE, DType.BF16)


# -- random weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [4, 6, 8, 16])
@pytest.mark.parametrize("k", [5, 16, 50])
def test_random_weights_keep_to_their_pattern_and_no_more(length: int, k: int) -> None:
    codes = operands.random_weight(40, k, DType.INT8, Sparsity(length), 3)
    for first in range(0, k, length):
        group = codes[:, first : first + length]
        allowed = min(group.shape[1], length - 2)
        most = int((group != 0).sum(dim=1).max())
        assert most == allowed, "as many non-zeros as the pattern allows"


# -- checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", QUANTISED)
def test_checks_catch_one_wrong_and_one_unwritten_element(dtype: DType) -> None:
    plain = operands.random_weight(6, 64, dtype, None, 0)
    a, _ = reference.quantise(operands.activation(4, 64, 0), dtype)
    magnitude = reference.magnitude(a, plain)
    out = reference.gemm(a, plain).to(reference.accumulator(dtype))
    expected = expect(a, plain, dtype, 64)
    assert expected.check(out).ok
    wrong = out.clone()
    wrong[2, 3] += 1 if dtype is DType.INT8 else float(magnitude[2, 3]) * 1e-4
    check = expected.check(wrong)
    assert check.verified == "failed"
    assert "2, 3" in check.text
    assert not expected.holds(wrong)
    unwritten = out.clone()
    unwritten[0, 0] = verify.poison(torch.empty(1, dtype=out.dtype)).item()
    assert expected.check(unwritten).verified == "failed"
    assert not expected.holds(unwritten)


def test_a_16_bit_output_is_allowed_one_rounding_and_no_more() -> None:
    plain = operands.random_weight(40, 64, DType.FP8, None, 0)
    a, _ = reference.quantise(operands.activation(30, 64, 0), DType.FP8)
    exact = reference.gemm(a, plain)
    expected = Expected(a, plain, DType.FP8, (verify.gamma(64), "gamma"), torch.bfloat16)
    assert expected.check(exact.to(torch.bfloat16)).ok
    assert expected.holds(exact.to(torch.bfloat16))
    twice = (exact * (1 + 2.0**-7)).to(torch.bfloat16)
    assert not expected.check(twice).ok
    assert not expected.holds(twice)


def test_a_small_error_everywhere_is_caught_by_the_norm() -> None:
    """A bound for the worst case lets 1 % pass in each element; the norm of the whole output does not."""
    plain = operands.random_weight(40, 64, DType.FP8, None, 0)
    a, _ = reference.quantise(operands.activation(30, 64, 0), DType.FP8)
    off = (reference.gemm(a, plain) * 1.01).float()
    loose = Expected(a, plain, DType.FP8, (0.05, "5 %"), torch.float32)
    sharp = Expected(a, plain, DType.FP8, (0.05, "5 %"), torch.float32, norm=2.0**-7)
    assert loose.check(off).ok
    assert "L2 error 0.01" in sharp.check(off).text
    assert not sharp.check(off).ok


def test_large_outputs_are_compared_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 100)
    plain = operands.random_weight(40, 64, DType.FP8, None, 0)
    a, _ = reference.quantise(operands.activation(7, 64, 0), DType.FP8)
    out = reference.gemm(a, plain).float()
    expected = expect(a, plain, DType.FP8, 64)
    assert expected.check(out).ok
    out[5, 1] += 1e6
    assert "[5, 1]" in expected.check(out).text


def test_fp8_bound_holds_for_the_worst_order_and_is_not_loose() -> None:
    """Sequential float32 sums stay within gamma(n) * sum|a||w|; bfloat16 sums do not."""
    plain = operands.random_weight(8, 512, DType.FP8, None, 0)
    a, _ = reference.quantise(operands.activation(8, 512, 0), DType.FP8)
    expected = expect(a, plain, DType.FP8, 512)
    products = a.float().unsqueeze(1) * plain.float().unsqueeze(0)
    sequential, half = torch.zeros(8, 8), torch.zeros(8, 8)
    for k in range(512):
        sequential = sequential + products[:, :, k]
        half = (half + products[:, :, k]).bfloat16().float()
    assert expected.check(sequential).verified == "within_bound"
    assert expected.check(half).verified == "failed"


def test_a_check_fails_on_nan_and_on_shape() -> None:
    good = torch.zeros(2, 2)
    assert verify.check_same(torch.full((2, 2), float("nan")), good, "x").verified == "failed"
    assert verify.check_same(torch.zeros(2, 3), good, "x").verified == "failed"
    checks = [verify.Check("exact", "a"), verify.Check("failed", "b"), verify.Check("within_bound", "c")]
    assert verify.worst(checks).text == "b"
