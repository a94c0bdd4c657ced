"""GEMM operators: straight to the library outside a traced graph, one operator inside; the same operands either way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from slidesparse.kernels import gemm_library, gemm_ops
from slidesparse.kernels.gemm_library import PLAIN, SCALED, SCALED_BIAS, Problem

M, N, K = 16, 32, 64
OPAQUE = list(range(8))


class Library:
    """Remembers what it is asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Problem, Any, tuple[Any, ...]]] = []

    def dense_gemm(self, problem: Problem, algorithm: Any, *operands: Any) -> None:
        self.calls.append(("dense", problem, algorithm, operands))

    def sparse_gemm(self, problem: Problem, algorithm: Any, *operands: Any) -> None:
        self.calls.append(("sparse", problem, algorithm, operands))


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    found = Library()
    monkeypatch.setattr(gemm_library, "load", lambda: found)
    return found


X = torch.ones(M, K, dtype=torch.int8)
W = torch.ones(N, K, dtype=torch.int8)
OUT = torch.empty(M, N, dtype=torch.int32)
Y = torch.empty(M, N, dtype=torch.bfloat16)
SCALES = torch.ones(M, 1), torch.ones(N, 1)
BIAS = torch.ones(N, dtype=torch.bfloat16)
CALLS: dict[str, Callable[[], None]] = {
    "dense_gemm": lambda: gemm_ops.dense_gemm(X, W, OUT, OPAQUE, 48),
    "dense_gemm_scaled": lambda: gemm_ops.dense_gemm_scaled(X, SCALES[0], W, SCALES[1], BIAS, Y, OPAQUE, 48),
    "sparse_gemm": lambda: gemm_ops.sparse_gemm(X, W, OUT, 7, 2, 48),
}


def test_the_library_gets_the_operands_themselves(library: Library) -> None:
    for call in CALLS.values():
        call()
    gemm_ops.dense_gemm_scaled(X, SCALES[0], W, SCALES[1], None, Y, OPAQUE, 48)
    dense, scaled, sparse, unbiased = library.calls
    assert [call[1].epilogue for call in library.calls] == [PLAIN, SCALED_BIAS, PLAIN, SCALED]
    assert all(call[1] == Problem(M, N, K, torch.int8, call[3][2].dtype, call[1].epilogue) for call in library.calls)
    for call, operands in ((dense, (X, W, OUT)), (scaled, (X, W, Y)), (sparse, (X, W, OUT)), (unbiased, (X, W, Y))):
        assert all(given is own for given, own in zip(call[3], operands, strict=False))
        assert call[3][3].numel() == 48, "scratch memory of the algorithm"
    assert scaled[3][4:] == (*SCALES, BIAS)
    assert unbiased[3][4:] == (*SCALES, None)
    assert gemm_ops.opaque_numbers(dense[2]) == OPAQUE
    assert (sparse[2].alg_id, sparse[2].split_k) == (7, 2)


@pytest.mark.parametrize("name", CALLS)
def test_a_traced_graph_shows_one_operator(name: str, library: Library) -> None:
    seen: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        seen.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return lambda *given: ()

    torch._dynamo.reset()
    torch.compile(CALLS[name], fullgraph=True, backend=keep)()
    assert seen == [f"slidesparse.{name}.default"]
    assert not library.calls, "tracing runs nothing"
