"""The operators of vLLM's linears on a GPU: values, rows past M, graphs; every backend that the machine has."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import bitnet_reference, operands, verify
from slidesparse.kernels.backend import backend
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.machine import detect
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.vllm_plugin import linear_op
from slidesparse.vllm_plugin.linear_op import Prepared

pytestmark = pytest.mark.gpu
EPS = 1e-5
OPERATIONS: tuple[BitNetOperation, ...] = ("norm", "add", "gate")
VARIANTS = [
    Variant("cublaslt"), Variant("cutlass"), Variant("cusparselt", Sparsity(4)), Variant("cusparselt", Sparsity(8)),
    Variant("cusparselt", Sparsity(None)),
]  # fmt: skip
SHAPES = [(64, 256), (3840, 2560), (2560, 6912)]
"""(N, K): a small one, qkv and down of BitNet-2B."""


class Layer:
    """One linear of a backend, with what a model would give it."""

    def __init__(self, variant: Variant, dtype: DType, n: int, k: int, bias: bool = False) -> None:
        try:
            backend(variant.backend).require(detect(), dtype)
        except UnsupportedHere as error:
            pytest.skip(str(error))
        self.variant, self.dtype, self.n, self.k = variant, dtype, n, k
        self.codes = operands.random_weight(n, k, dtype, variant.sparsity, 1, "cuda")
        generator = torch.Generator("cuda").manual_seed(2)
        scale = torch.rand(n, 1, generator=generator, device="cuda") / 50 + 1e-3
        self.norm = (1 + 0.3 * torch.randn(k, generator=generator, device="cuda")).bfloat16()
        self.bias = torch.randn(n, generator=generator, device="cuda").bfloat16() if bias else None
        self.operand_k = k if variant.sparsity is None else variant.sparsity.lifted_k(k)
        self.ready: Prepared = linear_op.prepare("layer", self.codes, scale, variant, dtype, None)

    def inputs(self, operation: BitNetOperation, m: int, seed: int = 3) -> list[torch.Tensor]:
        if operation == "gate":
            return [operands.activation(m, 2 * self.k, seed, "cuda")]
        count = 2 if operation == "add" else 1
        return [operands.activation(m, self.k, seed + place, "cuda") for place in range(count)]

    def run(self, operation: BitNetOperation, given: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor | None]:
        name = {"norm": "norm_linear", "add": "add_norm_linear", "gate": "gate_norm_linear"}[operation]
        ready = self.ready
        out = getattr(torch.ops.slidesparse, name).default(
            *given, self.norm, EPS, ready.weight, ready.scale, self.bias, ready.kind
        )
        return out if operation == "add" else (out, None)

    def check(self, operation: BitNetOperation, given: list[torch.Tensor], y: torch.Tensor) -> verify.Check:
        """The GEMM and what follows, from the codes that the fused kernel really gave."""
        side = backend(self.variant.backend)
        kernel = side.activations.encoder(
            operation, self.dtype, None, self.k, side.activations.norm_algorithms(self.k)[0]
        )
        m = y.shape[0]
        codes = torch.empty(m, self.k, dtype=self.dtype.torch, device="cuda")
        token = torch.empty(m, 1, device="cuda")
        kernel(given[0], given[1] if operation == "add" else None, self.norm, EPS, codes, token)
        error, _ = side.accumulation_error(self.dtype, self.operand_k)
        between = verify.OUTPUT_UNIT.get(side.output(self.dtype), 0.0)
        return verify.check_product(
            (codes, token), y, self.codes, self.ready.scale, self.bias, self.dtype, error, between, side.exact_epilogue
        )


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_fused_operators_are_norm_then_linear(variant: Variant, dtype: DType, shape: tuple[int, int]) -> None:
    layer = Layer(variant, dtype, *shape)
    for operation in OPERATIONS:
        for m in (1, 16, 37, 256):
            given = layer.inputs(operation, m)
            with verify.poisoned_memory():  # rows past M are NaN, or the largest integers
                y, total = layer.run(operation, given)
            assert y.shape == (m, shape[0])
            assert y.is_contiguous()
            check = layer.check(operation, given, y)
            assert check.ok, (operation, m, check.text)
            if operation == "add":
                assert torch.equal(total, given[0] + given[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_biases_are_added(variant: Variant, dtype: DType) -> None:
    layer = Layer(variant, dtype, 128, 256, bias=True)
    given = layer.inputs("norm", 33)
    check = layer.check("norm", given, layer.run("norm", given)[0])
    assert check.ok, check.text


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_captured_operators_replay_on_new_values(variant: Variant) -> None:
    layer = Layer(variant, DType.INT8, 128, 256)
    given = {operation: layer.inputs(operation, 24) for operation in OPERATIONS}
    run: Any = lambda: [layer.run(operation, given[operation])[0] for operation in OPERATIONS]  # noqa: E731
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for tensors in given.values():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for found, expected in zip(captured, run(), strict=True):
        assert torch.equal(found, expected)


def test_a_size_first_seen_in_a_graph_capture_is_refused() -> None:
    layer = Layer(Variant("cublaslt"), DType.INT8, 128, 256)
    given = layer.inputs("norm", 4096)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(SlideSparseError, match=r"layer: 4096 tokens .* captured"), torch.cuda.graph(graph):
        layer.run("norm", given)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_compiled_with_m_a_symbol(variant: Variant) -> None:
    layer = Layer(variant, DType.INT8, 128, 256)
    compiled = torch.compile(lambda x: layer.run("norm", [x])[0] * 2, fullgraph=True, dynamic=True)
    for m in (24, 7, 300):
        (x,) = layer.inputs("norm", m)
        assert torch.equal(compiled(x), layer.run("norm", [x])[0] * 2)


def test_the_reference_of_the_fused_kernels_is_near_their_codes() -> None:
    """So that `check` above rests on codes that are right: at most one step from plain PyTorch's."""
    k = 2560
    layer = Layer(Variant("cublaslt"), DType.INT8, 64, k)
    (x,) = layer.inputs("norm", 64)
    kernels = backend("cublaslt").activations
    codes = torch.empty(64, k, dtype=torch.int8, device="cuda")
    scale = torch.empty(64, 1, device="cuda")
    kernels.encoder("norm", DType.INT8, None, k, kernels.norm_algorithms(k)[0])(x, None, layer.norm, EPS, codes, scale)
    wanted, token = bitnet_reference.norm_quantise_lift(x, layer.norm, EPS, DType.INT8, None)
    assert (codes.int() - wanted.int()).abs().max() <= 1
    assert (scale / token - 1).abs().max() <= bitnet_reference.SCALE_ERROR


@pytest.mark.parametrize("sparsity", [None, Sparsity(4)], ids=str)
@pytest.mark.parametrize("dtype", QUANTISED)
def test_auto_chooses_among_candidates_that_are_all_right(dtype: DType, sparsity: Sparsity | None) -> None:
    """On the shape of o; every candidate counts, the fastest runs, and little memory stays taken."""
    from slidesparse.measure.cuda_clock import CudaClock
    from slidesparse.vllm_plugin.auto import Auto, at_hand

    n, k, sizes = 2560, 2560, (16, 512, 4096)
    try:
        variants, _ = at_hand(sparsity, True, dtype, detect())
    except UnsupportedHere as error:
        pytest.skip(str(error))
    codes = operands.random_weight(n, k, dtype, sparsity, 1, "cuda")
    scale = torch.rand(n, 1, device="cuda") / 50 + 1e-3
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    ready = linear_op.prepare(
        "layer", codes, scale, Variant("auto", sparsity), dtype, None, Auto(tuple(variants), sizes, CudaClock()), "norm"
    )
    assert torch.cuda.memory_reserved() - before < 1 << 28
    measured = linear_op.measured()[ready.kind]
    assert list(measured) == [f"M={size}" for size in sizes]
    for size, of in zip(sizes, measured.values(), strict=True):
        assert all(isinstance(us, float) and us > 0 for us in of.values()), of
        assert {name.split(",")[0] for name in of} == {str(variant) for variant in variants}
        x = operands.activation(size, k, 7, "cuda")
        y = torch.ops.slidesparse.linear.default(x, ready.weight, ready.scale, None, ready.kind)
        recipe = linear_op.recipe_at(ready.kind, size)
        assert str(recipe.variant) == next(iter(of)).split(",")[0]
        error, _ = recipe.backend.accumulation_error(dtype, recipe.operand_k)
        between = verify.OUTPUT_UNIT.get(recipe.backend.output(dtype), 0.0)
        rows = slice(0, 16)
        check = verify.check_linear(
            x[rows], y[rows], codes, ready.scale, None, dtype, error, between, recipe.backend.exact_epilogue
        )
        assert check.ok, check.text
