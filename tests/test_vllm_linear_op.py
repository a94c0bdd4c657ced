"""The operator that vLLM's linears call: exact values, any M, one graph for all M and layers, paths, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gemm_doubles import Double
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError, SlideSparseError, UnsupportedHere
from slidesparse.kernels import operands, verify
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.vllm_plugin import linear_op
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.linear_op import Prepared

N, K = 24, 64
DENSE, SPARSE = Variant("cublaslt"), Variant("cusparselt", Sparsity(8))


@pytest.fixture(autouse=True)
def doubles(monkeypatch: pytest.MonkeyPatch) -> dict[str, Double]:
    found = {"cublaslt": Double("cublaslt", False), "cusparselt": Double("cusparselt", True)}
    monkeypatch.setattr("slidesparse.kernels.linear.backend", found.__getitem__)
    monkeypatch.setattr(linear_op, "_KINDS", {})
    return found


def operands_of(variant: Variant, dtype: DType, seed: int = 5) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    codes = operands.random_weight(N, K, dtype, variant.sparsity, seed)
    scale = torch.rand(N, 1, generator=generator) / 50 + 0.01
    return codes, scale, torch.randn(N, generator=generator).to(torch.bfloat16)


def prepared(variant: Variant, dtype: DType, layer: str = "layer", seed: int = 5, store: Any = None) -> Prepared:
    codes, scale, _ = operands_of(variant, dtype, seed)
    return linear_op.prepare(layer, codes, scale, variant, dtype, store)


def run(x: torch.Tensor, ready: Prepared, bias: torch.Tensor | None = None) -> torch.Tensor:
    y: torch.Tensor = torch.ops.slidesparse.linear(x, ready.weight, ready.scale, bias, ready.kind)
    return y


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", [DENSE, SPARSE, Variant("cusparselt", Sparsity(None))], ids=str)
@pytest.mark.parametrize("m", [1, 16, 37])
def test_values_are_those_of_the_layer(variant: Variant, dtype: DType, m: int, doubles: dict[str, Double]) -> None:
    codes, scale, bias = operands_of(variant, dtype)
    ready = linear_op.prepare("layer", codes, scale, variant, dtype, None)
    x = operands.activation(m, K, 1)
    side = doubles[variant.backend]
    error, _ = side.accumulation_error(dtype, ready.weight.shape[1])
    for given_bias in (None, bias):
        y = run(x, ready, given_bias)
        assert y.shape == (m, N)
        assert y.is_contiguous()
        wanted = None if given_bias is None else given_bias.float()
        check = verify.check_linear(x, y, codes, scale, wanted, dtype, error)
        assert check.verified == ("exact" if dtype is DType.INT8 else "within_bound"), check.text
    assert set(side.rows) == {bucket(m)}, "kernels see sizes of buckets only"


def test_no_tokens() -> None:
    assert run(operands.activation(0, K, 1), prepared(SPARSE, DType.INT8)).shape == (0, N)


def test_rows_do_not_see_their_padding() -> None:
    ready = prepared(SPARSE, DType.INT8)
    x = operands.activation(300, K, 1)
    assert torch.equal(run(x[:290], ready), run(x, ready)[:290])


@given(st.integers(1, 600), st.integers(1, 600))
def test_algorithms_are_chosen_once_a_bucket(first: int, second: int) -> None:
    asked = []

    class Store:
        def find(self, operation: str, family: str, dtype: DType, sparsity: Any, size: Any, candidates: Any) -> None:
            asked.append((operation, size))

    linear_op._KINDS.clear()
    ready = prepared(SPARSE, DType.INT8, store=Store())
    for m in (first, second, first):
        run(operands.activation(m, K, 1), ready)
    gemms = [size for operation, size in asked if operation == "sparse_gemm"]
    assert gemms == [(m, N, K) for m in dict.fromkeys((bucket(first), bucket(second)))]


def test_layers_of_one_shape_share_a_kind_and_keep_their_weights() -> None:
    one, two = prepared(SPARSE, DType.INT8, "a", 5), prepared(SPARSE, DType.INT8, "b", 6)
    assert one.kind == two.kind == f"cusparselt 2:8 INT8 {N}x{K}"
    x = operands.activation(8, K, 1)
    assert not torch.equal(run(x, one), run(x, two))
    assert prepared(DENSE, DType.INT8).kind != one.kind
    assert linear_op.layers() == {"a": one.kind, "b": one.kind, "layer": f"cublaslt INT8 {N}x{K}"}


def test_paths_name_what_ran_and_are_counted_from_reset() -> None:
    ready = prepared(DENSE, DType.INT8)
    for m in (3, 16, 17):
        run(operands.activation(m, K, 1), ready)
    assert linear_op.paths() == {
        f"cublaslt INT8 {N}x{K}": {
            "M=16: quantise fused > int_mm > fused": 2,
            "M=32: quantise fused > int_mm > fused": 1,
        }
    }
    linear_op.reset()
    assert linear_op.paths() == {f"cublaslt INT8 {N}x{K}": {}}
    run(operands.activation(3, K, 1), ready)
    assert list(linear_op.paths()[ready.kind].values()) == [1]


def test_the_tuned_algorithm_runs() -> None:
    class Store:
        def find(self, operation: str, *rest: Any) -> str | None:
            return {"dense_gemm": "float64", "quantise": "torch"}.get(operation)

    ready = prepared(DENSE, DType.INT8, store=Store())
    x = operands.activation(5, K, 1)
    y = run(x, ready)
    assert list(linear_op.paths()[ready.kind]) == ["M=16: quantise torch > float64 > fused"]
    another = prepared(DENSE, DType.INT8, store=None)
    assert torch.equal(run(x, another), y)
    assert list(linear_op.paths()[another.kind]) == ["M=16: quantise fused > int_mm > fused"], (
        "the new model's own store"
    )


@pytest.mark.parametrize("variant", [DENSE, SPARSE], ids=str)
def test_the_operator_keeps_to_torchs_rules(variant: Variant) -> None:
    _, _, bias = operands_of(variant, DType.INT8)
    ready = prepared(variant, DType.INT8)
    for given_bias in (None, bias):
        arguments = (operands.activation(9, K, 1), ready.weight, ready.scale, given_bias, ready.kind)
        torch.library.opcheck(torch.ops.slidesparse.linear.default, arguments)


def test_one_compiled_graph_serves_every_m() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(str(graph.graph))
        return graph.forward

    ready = prepared(SPARSE, DType.INT8)
    compiled = torch.compile(lambda x: run(x, ready) * 2, backend=count, fullgraph=True)
    for m in (24, 7, 300):
        x = operands.activation(m, K, m)
        torch._dynamo.mark_dynamic(x, 0)  # as vLLM does
        assert torch.equal(compiled(x), run(x, ready) * 2)
    assert len(graphs) == 1
    assert graphs[0].count("slidesparse.linear") == 1, "nothing of what is inside is in the graph"


def test_graphs_of_equal_layers_are_equal() -> None:
    """So vLLM compiles one decoder layer, not one for each: nothing in a graph names a layer."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    for layer, seed in (("model.layers.0.x", 5), ("model.layers.1.x", 6)):
        torch._dynamo.reset()
        ready = prepared(SPARSE, DType.INT8, layer, seed)
        weight, scale, kind = ready.weight, ready.scale, ready.kind
        torch.compile(
            lambda x, w, s, kind=kind: torch.ops.slidesparse.linear(x, w, s, None, kind), backend=keep, fullgraph=True
        )(operands.activation(16, K, 1), weight, scale)
    assert graphs[0] == graphs[1]


def test_a_size_first_seen_in_a_graph_capture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ready = prepared(SPARSE, DType.INT8, "model.layers.0.mlp.down_proj")
    kind = linear_op._KINDS[ready.kind]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(SlideSparseError, match=r"model\.layers\.0\.mlp\.down_proj: 48 tokens .* captured"):
        kind._plan((None, False, 48), on_gpu=True)


def test_a_weight_that_breaks_the_pattern_is_refused_with_its_layer() -> None:
    codes, scale, _ = operands_of(DENSE, DType.INT8)
    codes[:] = 0
    codes[3, 8:16] = 1
    with pytest.raises(CheckpointError, match=r"^mlp\.down_proj: row 3, columns 8 to 15: .*2:8"):
        linear_op.prepare("mlp.down_proj", codes, scale, SPARSE, DType.INT8, None)
    assert linear_op.layers() == {}


def test_a_backend_without_an_algorithm_is_an_error(
    doubles: dict[str, Double], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doubles["cublaslt"], "algorithms", lambda *size: ())
    with pytest.raises(UnsupportedHere, match=f"cublaslt has no algorithm for cublaslt INT8 {N}x{K}"):
        prepared(DENSE, DType.INT8)
