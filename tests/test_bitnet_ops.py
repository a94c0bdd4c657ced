"""The fused BitNet kernels as torch operators: schema, fake tensors, torch.compile with any M."""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import bitnet_reference
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
from slidesparse.kernels import bitnet_ops
from slidesparse.kernels.activation_ops import numbers
from slidesparse.kernels.triton_bitnet import launches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, EPS = 96, 1e-5
LAUNCH = launches(K)[0]
OPERATORS = {
    "norm": torch.ops.slidesparse.norm_quantise_lift.default,
    "add": torch.ops.slidesparse.add_norm_quantise_lift.default,
    "gate": torch.ops.slidesparse.gate_norm_quantise_lift.default,
}


def rows(m: int, columns: int = K) -> torch.Tensor:
    return torch.randn(m, columns, generator=torch.Generator().manual_seed(m)).bfloat16().to(DEVICE)


def operands(operation: str, m: int) -> list[torch.Tensor]:
    weight = (1 + 0.1 * torch.arange(K) / K).bfloat16().to(DEVICE)
    first = [rows(m, 2 * K)] if operation == "gate" else [rows(m)]
    return [*first, *([rows(m).flip(1).contiguous()] if operation == "add" else []), weight]


def between_linears(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All three operators in one graph; x + residual comes last."""
    codes, scale, total = bitnet_ops.add_norm_quantise_lift(x, residual, weight, EPS, DType.INT8, Sparsity(8), LAUNCH)
    plain = bitnet_ops.norm_quantise_lift(total, weight, EPS, DType.INT8, None, LAUNCH)
    gate_up = torch.cat((total, x), dim=1)
    gated = bitnet_ops.gate_norm_quantise_lift(gate_up, weight, EPS, DType.INT8, Sparsity(6), LAUNCH)
    return codes, scale, *plain, *gated, total


def expected(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    codes, scale, total = bitnet_reference.add_norm_quantise_lift(x, residual, weight, EPS, DType.INT8, Sparsity(8))
    plain = bitnet_reference.norm_quantise_lift(total, weight, EPS, DType.INT8, None)
    gate_up = torch.cat((total, x), dim=1)
    return (
        codes, scale, *plain, *bitnet_reference.gate_norm_quantise_lift(gate_up, weight, EPS, DType.INT8, Sparsity(6)),
        total,
    )  # fmt: skip


@pytest.mark.parametrize("sparsity", [None, Sparsity(8), Sparsity(None)], ids=str)
@pytest.mark.parametrize("dtype", [DType.INT8, DType.FP8])
@pytest.mark.parametrize("operation", OPERATORS)
def test_they_keep_the_rules_of_an_operator(operation: str, dtype: DType, sparsity: Sparsity | None) -> None:
    arguments = (*operands(operation, 3), EPS, *numbers(dtype, sparsity), LAUNCH.words, LAUNCH.warps)
    torch.library.opcheck(OPERATORS[operation], arguments)


def test_one_compiled_graph_serves_every_m() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(between_linears, fullgraph=True, dynamic=True, backend=count)
    for m in (5, 2, 33):
        arguments = operands("add", m)
        ours, theirs = compiled(*arguments), expected(*(argument.cpu() for argument in arguments))
        assert torch.equal(ours[-1].cpu(), theirs[-1])
        for place in (0, 2, 4):
            assert (ours[place].cpu().int() - theirs[place].int()).abs().max() <= 1
            assert (ours[place + 1].cpu() / theirs[place + 1] - 1).abs().max() <= bitnet_reference.SCALE_ERROR
    assert len(graphs) == 1


def test_traced_ahead_of_time_it_gives_the_same_bits() -> None:
    compiled = torch.compile(between_linears, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (4, 7):
        arguments = operands("add", m)
        for ours, theirs in zip(compiled(*arguments), between_linears(*arguments), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("sparsity", [None, Sparsity(6), Sparsity(14), Sparsity(None)], ids=str)
@pytest.mark.parametrize("operation", OPERATORS)
def test_what_tracing_sees_is_what_the_kernel_gives(operation: str, sparsity: Sparsity | None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    call = {
        "norm": bitnet_ops.norm_quantise_lift,
        "add": bitnet_ops.add_norm_quantise_lift,
        "gate": bitnet_ops.gate_norm_quantise_lift,
    }[operation]
    real = call(*operands(operation, 3), EPS, DType.FP8, sparsity, LAUNCH)
    with FakeTensorMode():
        shapes = [torch.empty(tensor.shape, dtype=tensor.dtype) for tensor in operands(operation, 3)]
        fake = call(*shapes, EPS, DType.FP8, sparsity, LAUNCH)
    for traced, made in zip(fake, real, strict=True):
        assert (traced.shape, traced.dtype) == (made.shape, made.dtype)
