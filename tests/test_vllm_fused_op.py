"""Norm and linear as one operator: exact values, rows past M, one graph for all M and layers, paths, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemm_doubles import Double

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import SlideSparseError
from slidesparse.kernels import bitnet_reference, operands, verify
from slidesparse.kernels.backend import own_revision
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.kernels.gpu_activations import TritonActivations
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.vllm_plugin import linear_op
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.linear_op import Prepared

N, K, EPS = 24, 64, 1e-5
DENSE, SPARSE = Variant("cublaslt"), Variant("cusparselt", Sparsity(8))
OPERATIONS: tuple[BitNetOperation, ...] = ("norm", "add", "gate")
NAMES = {"norm": "norm_quantise", "add": "add_norm_quantise", "gate": "gate_norm_quantise"}


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Double]:
    found = {"cublaslt": Double("cublaslt", False), "cusparselt": Double("cusparselt", True)}
    monkeypatch.setattr("slidesparse.kernels.linear.backend", found.__getitem__)
    monkeypatch.setattr(linear_op, "_KINDS", {})
    return found


def prepared(variant: Variant, dtype: DType, layer: str = "layer", seed: int = 5, store: Any = None) -> Prepared:
    codes = operands.random_weight(N, K, dtype, variant.sparsity, seed)
    scale = torch.rand(N, 1, generator=torch.Generator().manual_seed(seed)) / 50 + 0.01
    return linear_op.prepare(layer, codes, scale, variant, dtype, store)


NORM = (1 + 0.3 * torch.randn(K, generator=torch.Generator().manual_seed(8))).bfloat16()


def inputs(operation: BitNetOperation, m: int, seed: int = 1) -> list[torch.Tensor]:
    if operation == "gate":
        return [operands.activation(m, 2 * K, seed)]
    return [operands.activation(m, K, seed + place) for place in range(2 if operation == "add" else 1)]


def operator(operation: BitNetOperation) -> Any:
    name = {"norm": "norm_linear", "add": "add_norm_linear", "gate": "gate_norm_linear"}[operation]
    return getattr(torch.ops.slidesparse, name).default


def run(
    operation: BitNetOperation, given: list[torch.Tensor], ready: Prepared, bias: torch.Tensor | None = None
) -> Any:
    return operator(operation)(*given, NORM, EPS, ready.weight, ready.scale, bias, ready.kind)


def normed(operation: BitNetOperation, given: list[torch.Tensor]) -> torch.Tensor:
    """What the linear multiplies, before it is quantised."""
    t = given[0]
    if operation != "norm":
        t = given[0] + given[1] if operation == "add" else bitnet_reference.squared_relu_gate(given[0])
    return bitnet_reference.normalise(t, bitnet_reference.inverse_rms(t, EPS), NORM)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", [DENSE, SPARSE, Variant("cusparselt", Sparsity(None))], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_values_are_those_of_norm_then_linear(
    operation: BitNetOperation, variant: Variant, dtype: DType, doubles: dict[str, Double]
) -> None:
    codes = operands.random_weight(N, K, dtype, variant.sparsity, 5)
    ready = prepared(variant, dtype)
    bias = torch.randn(N, generator=torch.Generator().manual_seed(3)).bfloat16()
    side = doubles[variant.backend]
    error, _ = side.accumulation_error(dtype, ready.weight.shape[1])
    for m in (1, 16, 37):
        given = inputs(operation, m)
        for added in (None, bias):
            side.rows.clear()
            with verify.poisoned_memory():  # the rows past M hold NaN, or the largest integers
                out = run(operation, given, ready, added)
            y, total = out if operation == "add" else (out, None)
            assert y.shape == (m, N)
            assert y.is_contiguous()
            wanted = None if added is None else added.float()
            check = verify.check_linear(normed(operation, given), y, codes, ready.scale, wanted, dtype, error)
            assert check.verified == ("exact" if dtype is DType.INT8 else "within_bound"), check.text
            assert total is None or torch.equal(total, given[0] + given[1])
            assert side.rows == [bucket(m)], "kernels see sizes of buckets only"


def test_the_residual_stays_as_it_is() -> None:
    given = inputs("add", 5)
    before = [tensor.clone() for tensor in given]
    run("add", given, prepared(SPARSE, DType.INT8))
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


def test_operands_need_not_be_contiguous() -> None:
    ready = prepared(SPARSE, DType.INT8)
    for operation in OPERATIONS:
        given = inputs(operation, 9)
        strided = [torch.cat((tensor, tensor), dim=1)[:, : tensor.shape[1]] for tensor in given]
        assert not strided[0].is_contiguous()
        for one, two in zip(run(operation, given, ready), run(operation, strided, ready), strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_tokens(operation: BitNetOperation) -> None:
    out = run(operation, inputs(operation, 0), prepared(SPARSE, DType.INT8))
    y, total = out if operation == "add" else (out, None)
    assert y.shape == (0, N)
    assert total is None or total.shape == (0, K)


@pytest.mark.parametrize("variant", [DENSE, SPARSE], ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_operators_keep_to_torchs_rules(operation: BitNetOperation, variant: Variant) -> None:
    ready = prepared(variant, DType.INT8)
    for bias in (None, torch.ones(N, dtype=torch.bfloat16)):
        arguments = (*inputs(operation, 9), NORM, EPS, ready.weight, ready.scale, bias, ready.kind)
        torch.library.opcheck(operator(operation), arguments)


def block(x: torch.Tensor, residual: torch.Tensor, gate_up: torch.Tensor, ready: Prepared) -> tuple[torch.Tensor, ...]:
    y, total = run("add", [x, residual], ready)
    return y, run("norm", [total], ready), run("gate", [gate_up], ready)


def test_one_compiled_graph_serves_every_m() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    ready = prepared(SPARSE, DType.INT8)
    compiled = torch.compile(lambda *given: block(*given, ready), backend=count, fullgraph=True)
    for m in (24, 7, 300):
        given = [*inputs("add", m), *inputs("gate", m)]
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)  # as vLLM does
        for found, expected in zip(compiled(*given), block(*given, ready), strict=True):
            assert torch.equal(found, expected)
    assert len(graphs) == 1
    calls = [
        graphs[0].count(f"slidesparse.{name}.default]")
        for name in ("add_norm_linear", "norm_linear", "gate_norm_linear")
    ]
    assert calls == [1, 1, 1], "nothing of what is inside is in the graph"


def test_graphs_of_equal_layers_are_equal() -> None:
    """So vLLM compiles one decoder layer, not one for each: nothing in a graph names a layer."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    for layer, seed in (("model.layers.0.x", 5), ("model.layers.1.x", 6)):
        torch._dynamo.reset()
        ready = prepared(SPARSE, DType.INT8, layer, seed)
        torch.compile(
            lambda x, residual, norm, w, s, kind=ready.kind: operator("add")(x, residual, norm, EPS, w, s, None, kind),
            backend=keep, fullgraph=True,
        )(*inputs("add", 16), NORM, ready.weight, ready.scale)  # fmt: skip
    assert graphs[0] == graphs[1]


def test_paths_name_the_operation_and_are_counted_by_it() -> None:
    ready = prepared(DENSE, DType.INT8)
    for operation in OPERATIONS:
        run(operation, inputs(operation, 3), ready)
    run("add", inputs("add", 5), ready)
    torch.ops.slidesparse.linear(operands.activation(3, K, 1), ready.weight, ready.scale, None, ready.kind)
    rest = "torch > int_mm > fused"
    assert linear_op.paths()[ready.kind] == {
        f"M=16: add_norm_quantise {rest}": 2,
        f"M=16: gate_norm_quantise {rest}": 1,
        f"M=16: norm_quantise {rest}": 1,
        "M=16: quantise fused > int_mm > fused": 1,
    }


@pytest.mark.parametrize(("variant", "lift"), [(DENSE, ""), (SPARSE, "_lift")], ids=str)
def test_the_store_is_asked_by_the_name_of_the_operation(variant: Variant, lift: str) -> None:
    asked = []

    class Store:
        def find(self, operation: str, family: str, dtype: DType, sparsity: Any, size: Any, candidates: Any) -> None:
            asked.append((operation, family, sparsity, size))

    ready = prepared(variant, DType.INT8, store=Store())
    for operation in OPERATIONS:
        for m in (3, 5, 3):
            run(operation, inputs(operation, m), ready)
    first = [entry for entry in asked if "quantise" in entry[0] and entry[0] != "dequantise_bias"]
    assert first == [(NAMES[operation] + lift, "cpu_bitnet", variant.sparsity, (16, 0, K)) for operation in OPERATIONS]
    assert own_revision("cpu_bitnet"), "what was tuned with another source does not count"


def test_the_launch_that_the_store_names_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's launches are its algorithms, the default first; the GEMM is a double's."""
    import slidesparse.kernels.triton_bitnet as kernels

    launched = []
    monkeypatch.setattr(kernels, "gate_norm_quantise_lift", lambda *given: launched.append(given[5]))
    family = TritonActivations()
    known = family.norm_algorithms(6912)
    assert [f"{launch.words}x{launch.warps}" for launch in kernels.launches(6912)] == [one.name for one in known]
    for algorithm in (known[0], known[-1]):
        run_it = family.encoder("gate", DType.INT8, Sparsity(8), 6912, algorithm)
        run_it(torch.empty(0), None, torch.empty(0), EPS, torch.empty(0), torch.empty(0))
    assert launched == [kernels.launches(6912)[0], kernels.launches(6912)[-1]]
    assert own_revision(family.norm_family)


def test_triton_kernels_write_the_first_rows_of_what_they_are_given() -> None:
    """In the interpreter, or on a GPU: codes and scales that `Kind` allocated for a whole bucket."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    family, m, size = TritonActivations(), 5, 16
    for operation in OPERATIONS:
        given = [tensor.to(device) for tensor in inputs(operation, m)]
        codes = torch.full((size, Sparsity(8).lifted_k(K)), 99, dtype=torch.int8, device=device)
        scale = torch.full((size, 1), 7.0, device=device)
        kernel = family.encoder(operation, DType.INT8, Sparsity(8), K, family.norm_algorithms(K)[0])
        residual = given[1] if operation == "add" else None
        total = kernel(given[0], residual, NORM.to(device), EPS, codes[:m], scale[:m])
        wanted, token_scale = bitnet_reference.quantise_lift(
            normed(operation, [tensor.cpu() for tensor in given]), DType.INT8, Sparsity(8)
        )
        assert (codes[:m].cpu().int() - wanted.int()).abs().max() <= 1
        assert (scale[:m].cpu() / token_scale - 1).abs().max() <= bitnet_reference.SCALE_ERROR
        assert bool((codes[m:] == 99).all())
        assert bool((scale[m:] == 7).all())
        assert (total is None) == (operation != "add")


def test_a_row_that_no_kernel_can_take_is_an_error_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(DENSE, DType.INT8, "model.layers.0.mlp.down_proj")
    double = linear_op._KINDS[ready.kind].recipe.backend
    monkeypatch.setattr(type(double), "activations", TritonActivations())
    monkeypatch.setattr(linear_op._KINDS[ready.kind].recipe, "k", 1 << 20)
    with pytest.raises(SlideSparseError, match=r"^model\.layers\.0\.mlp\.down_proj: norm and quantise: K=1048576"):
        run("gate", inputs("gate", 3), ready)


def test_a_size_first_seen_in_a_graph_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(SPARSE, DType.INT8, "model.layers.0.mlp.down_proj")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SlideSparseError, match=r"model\.layers\.0\.mlp\.down_proj: 48 tokens .* captured"):
        linear_op._KINDS[ready.kind]._plan(("gate", False, 48), on_gpu=True)
