"""The layer: dense and sparse give the reference's bits, bias and shapes, look-ups, and refusals."""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError
from slidesparse.kernels import operands, reference, verify
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant

N, K = 24, 50
VARIANTS = [Variant("cpu_dense"), *(Variant("cpu_sparse", Sparsity(length)) for length in (4, 6, 10, None))]


def parts(dtype: DType, sparsity: Sparsity | None) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    codes = operands.random_weight(N, K, dtype, sparsity, 5)
    return codes, torch.rand(N, 1, generator=generator) / 50, torch.randn(N, generator=generator)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize(
    ("variant", "lifted"),
    [(variant, lifted) for variant in VARIANTS for lifted in (False, True) if variant.sparsity or not lifted],
    ids=str,
)
def test_layer_equals_the_reference(variant: Variant, dtype: DType, lifted: bool) -> None:
    codes, scale, bias = parts(dtype, variant.sparsity)
    given = operands.lift(codes, variant.sparsity, "l") if lifted and variant.sparsity else codes
    layer = W8A8Linear("l", given, scale, bias, k=K, variant=variant, dtype=dtype, lifted=lifted)
    x = operands.activation(6, K, 1)
    x[3] = 0
    y = layer(x.reshape(2, 3, K))
    assert y.shape == (2, 3, N)
    assert y.dtype is torch.bfloat16
    error, _ = layer.backend.accumulation_error(dtype, layer.weight.k)
    check = verify.check_linear(x, y.reshape(6, N), codes, scale, bias, dtype, error)
    assert check.verified == ("exact" if dtype is DType.INT8 else "within_bound"), check.text
    assert torch.equal(y[1, 0], bias.to(torch.bfloat16)), "a row of zeros gives the bias"


def test_a_layer_check_catches_a_wrong_channel_scale() -> None:
    for dtype in QUANTISED:
        codes, scale, bias = parts(dtype, None)
        layer = W8A8Linear("l", codes, scale * 1.02, bias, k=K, variant=VARIANTS[0], dtype=dtype)
        x = operands.activation(6, K, 1)
        assert verify.check_linear(x, layer(x), codes, scale, bias, dtype, verify.gamma(K)).verified == "failed"


def test_2_inf_changes_nothing() -> None:
    """Dense weights through the sparse path: the same bits as the dense path (INT8)."""
    codes, scale, bias = parts(DType.INT8, None)
    x = operands.activation(5, K, 1)
    dense, sparse = (
        W8A8Linear("l", codes, scale, bias, k=K, variant=variant, dtype=DType.INT8)
        for variant in (Variant("cpu_dense"), Variant("cpu_sparse", Sparsity(None)))
    )
    assert torch.equal(dense(x), sparse(x))


class Chooser:
    """A store that knows one answer."""

    def __init__(self, answer: str) -> None:
        self.answer, self.asked = answer, []  # type: ignore[var-annotated]

    def find(self, operation, family, dtype, sparsity, size, candidates):  # type: ignore[no-untyped-def]
        self.asked.append((operation, family, str(sparsity), size))
        return self.answer if self.answer in candidates else None


def test_the_tuned_algorithm_runs_and_is_asked_for_once_an_m() -> None:
    sparsity = Sparsity(8)
    codes, scale, _ = parts(DType.INT8, sparsity)
    store = Chooser("dot")
    layer = W8A8Linear(
        "l", codes, scale, None, k=K, variant=Variant("cpu_sparse", sparsity), dtype=DType.INT8, store=store
    )
    layer(operands.activation(3, K, 0))
    layer(operands.activation(3, K, 1))
    assert layer.paths == {"fused > dot > fused": 2}
    assert store.asked == [
        ("quantise_lift", "cpu", "2:8", (3, 0, K)),
        ("sparse_gemm", "cpu_sparse", "2:8", (3, N, K)),
        ("dequantise_bias", "cpu", "None", (3, N, 0)),
    ]
    layer.forget()
    layer(operands.activation(3, K, 1))
    assert len(store.asked) == 6
    assert reference.accumulator(DType.INT8) is torch.int32


def test_refusals_name_the_layer() -> None:
    codes, scale, _ = parts(DType.INT8, None)
    sparse = Variant("cpu_sparse", Sparsity(8))
    with pytest.raises(CheckpointError, match=r"q_proj: row 0, columns 0 to 7: .* non-zeros"):
        W8A8Linear("q_proj", codes.fill_(1), scale, None, k=K, variant=sparse, dtype=DType.INT8)
    with pytest.raises(CheckpointError, match=r"q_proj: weight is torch.int8, expected torch.float8_e4m3fn"):
        W8A8Linear("q_proj", codes, scale, None, k=K, variant=VARIANTS[0], dtype=DType.FP8)
    with pytest.raises(CheckpointError, match=r"q_proj: weight \(24, 50\).*expected \(24, 48\)"):
        W8A8Linear("q_proj", codes, scale, None, k=48, variant=VARIANTS[0], dtype=DType.INT8)
    with pytest.raises(CheckpointError, match="cannot run pattern dense"):
        W8A8Linear("q_proj", codes, scale, None, k=K, variant=Variant("cpu_sparse"), dtype=DType.INT8)
