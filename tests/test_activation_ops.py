"""The activation kernels as torch operators: schema, fake tensors, torch.compile with any M, CUDA graphs."""

from __future__ import annotations

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.kernels import reference
from slidesparse.pattern import Sparsity

pytest.importorskip("triton")
from slidesparse.kernels import activation_ops
from slidesparse.kernels.triton_activations import QUANTISE_LAUNCHES
from slidesparse.kernels.triton_dequantise import DEQUANTISE_LAUNCHES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
K, N = 96, 64
LAUNCH = QUANTISE_LAUNCHES[0]


def rows(m: int) -> torch.Tensor:
    return torch.randn(m, K, generator=torch.Generator().manual_seed(m)).bfloat16().to(DEVICE)


def around_a_gemm(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A layer without lifting, of plain torch but for its ends."""
    codes, token = activation_ops.quantise_lift(x, DType.INT8, None, LAUNCH)
    acc = (codes.float() @ weight.float().T).to(torch.int32)
    return activation_ops.dequantise_bias(acc, token, scale, None, DEQUANTISE_LAUNCHES[0])


def layer() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randint(-1, 2, (N, K), generator=generator, dtype=torch.int8)
    return weight.to(DEVICE), torch.full((N, 1), 0.5, device=DEVICE)


def same_but_for_the_last_bit(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """The interpreter cuts where bfloat16 should round."""
    difference = ours.cpu().view(torch.int16).int() - theirs.cpu().view(torch.int16).int()
    return bool(difference.abs().max() <= (0 if DEVICE == "cuda" else 1))


@pytest.mark.parametrize("sparsity", [None, Sparsity(8), Sparsity(None)], ids=str)
@pytest.mark.parametrize("dtype", [DType.INT8, DType.FP8])
def test_quantise_lift_keeps_the_rules_of_an_operator(dtype: DType, sparsity: Sparsity | None) -> None:
    length = activation_ops.DENSE if sparsity is None else sparsity.l or activation_ops.INFINITE
    arguments = (rows(3), length, dtype is DType.FP8, LAUNCH.words, LAUNCH.warps)
    torch.library.opcheck(torch.ops.slidesparse.quantise_lift.default, arguments)


@pytest.mark.parametrize("bias", [False, True])
def test_dequantise_bias_keeps_the_rules_of_an_operator(bias: bool) -> None:
    acc = torch.arange(3 * N, dtype=torch.int32, device=DEVICE).reshape(3, N)
    offset = torch.ones(N, device=DEVICE) if bias else None
    launch = DEQUANTISE_LAUNCHES[0]
    arguments = (acc, torch.ones(3, 1, device=DEVICE), torch.ones(N, 1, device=DEVICE), offset)
    torch.library.opcheck(
        torch.ops.slidesparse.dequantise_bias.default, (*arguments, launch.words, launch.warps, launch.rows)
    )


def test_one_compiled_graph_serves_every_m() -> None:
    weight, scale = layer()
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(around_a_gemm, fullgraph=True, dynamic=True, backend=count)
    for m in (5, 2, 33):
        x = rows(m)
        expected = reference.linear(x.cpu(), weight.cpu(), scale.cpu(), None, DType.INT8)
        assert same_but_for_the_last_bit(compiled(x, weight, scale), expected)
    assert len(graphs) == 1


def test_traced_ahead_of_time_it_gives_the_same_bits() -> None:
    weight, scale = layer()
    compiled = torch.compile(around_a_gemm, fullgraph=True, dynamic=True, backend="aot_eager")
    for m in (4, 7):
        x = rows(m)
        assert torch.equal(compiled(x, weight, scale), around_a_gemm(x, weight, scale))


@pytest.mark.parametrize("sparsity", [None, Sparsity(6), Sparsity(14), Sparsity(None)], ids=str)
def test_what_tracing_sees_is_what_the_kernel_gives(sparsity: Sparsity | None) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    real = activation_ops.quantise_lift(rows(3), DType.FP8, sparsity, LAUNCH)
    with FakeTensorMode():
        fake = activation_ops.quantise_lift(torch.empty(3, K, dtype=torch.bfloat16), DType.FP8, sparsity, LAUNCH)
    for traced, made in zip(fake, real, strict=True):
        assert (traced.shape, traced.dtype) == (made.shape, made.dtype)


def test_a_row_that_does_not_fit_is_refused_while_tracing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(), pytest.raises(ValueError, match="K=33 must be a multiple of 2"):
        activation_ops.quantise_lift(torch.empty(3, 33, dtype=torch.bfloat16), DType.INT8, Sparsity(8), LAUNCH)


@pytest.mark.gpu
def test_captured_in_a_cuda_graph() -> None:
    weight, scale = layer()
    x = rows(48)
    around_a_gemm(x, weight, scale)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = around_a_gemm(x, weight, scale)
    x.copy_(rows(48).flip(0))
    graph.replay()
    assert torch.equal(y, around_a_gemm(x, weight, scale))
