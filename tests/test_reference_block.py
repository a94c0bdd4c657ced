"""The yardstick chooses its GEMM among algorithms that may run."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import gemm_library
from slidesparse.kernels.gemm_library import GemmAlgorithm

reference_block = pytest.importorskip("slidesparse.measure.reference_block")


def test_an_algorithm_that_crashes_the_gpu_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of the same library as ours, which has bars it."""
    offered = [GemmAlgorithm(number, 1, 0, bytes(64), -1, -1, -1) for number in (35, 36)]
    library = SimpleNamespace(sparse_algorithms=lambda problem: offered)
    monkeypatch.setattr(gemm_library, "load", lambda: library)
    layer = SimpleNamespace(problem="M=64", gemm=lambda codes, found, out: out, accumulator=lambda: torch.empty(1))
    buffers = [(layer, torch.empty(1))]
    fastest = reference_block.ReferenceBlock._fastest
    assert fastest(buffers, None, frozenset({"36.s1"})) is offered[0]
    assert fastest(buffers, None, frozenset({"35.s1"})) is offered[1]
    with pytest.raises(UnsupportedHere, match="no algorithm"):
        fastest(buffers, None, frozenset({"35.s1", "36.s1"}))
