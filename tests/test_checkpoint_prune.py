"""Pruning against a literal sort of every group: natural zeros first, then magnitude, then column."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse.checkpoint.prune import Method, prune
from slidesparse.pattern import Sparsity

Layer = tuple[npt.NDArray[np.int8], torch.Tensor]
PATTERNS = [Sparsity(length) for length in range(4, 17, 2)] + [Sparsity(None)]


def bf16(values: npt.ArrayLike) -> torch.Tensor:
    return torch.as_tensor(np.asarray(values), dtype=torch.bfloat16)


def bits(weight: torch.Tensor) -> npt.NDArray[np.uint16]:
    return weight.view(torch.uint16).numpy()


def reference_prune(codes: npt.NDArray[np.int8], weight: torch.Tensor, pattern: Sparsity) -> npt.NDArray[np.int8]:
    out = codes.copy()
    if pattern.l is None:
        return out
    magnitude = weight.float().abs().numpy()
    k = codes.shape[1]
    for row in range(codes.shape[0]):
        for first in range(0, k, pattern.l):
            columns = range(first, min(first + pattern.l, k))
            missing = 2 - (pattern.l - len(columns)) - sum(codes[row, c] in (0, -128) for c in columns)
            kept = [c for c in columns if codes[row, c] not in (0, -128)]
            for c in sorted(kept, key=lambda c: (magnitude[row, c], c))[: max(0, missing)]:
                out[row, c] = 0
    return out


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    """Few distinct magnitudes, so that ties are common; codes are zero where the weight is small."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    levels = draw(st.integers(1, 12))
    weight = bf16(rng.integers(-levels, levels + 1, (n, k)) / 8)
    smallest = draw(st.integers(0, 4)) / 8
    values = weight.float().numpy()
    codes = np.where(np.abs(values) > smallest, np.sign(values), 0).astype(np.int8)
    if draw(st.booleans()):
        codes[draw(st.integers(0, n - 1))] = 0
    codes[(codes == 0) & (rng.random((n, k)) < 0.2)] = -128  # e4m3's -0 counts as zero
    return codes, weight


@given(layers(), st.sampled_from(PATTERNS))
@settings(max_examples=150)
def test_the_smallest_original_magnitudes_go(case: Layer, pattern: Sparsity) -> None:
    codes, weight = case
    made = prune(codes, bits(weight), pattern, "magnitude", 0, "layer")
    expected = reference_prune(codes, weight, pattern)
    zero = np.isin(codes, (0, -128))
    np.testing.assert_array_equal(np.where(zero, 0, made.codes), np.where(zero, 0, expected))
    assert np.isin(made.codes[zero], (0, -128)).all()
    gone = (made.codes == 0) & ~zero
    squares = weight.double().numpy() ** 2
    assert made.removed == gone.sum()
    assert made.natural_zeros == zero.sum()
    assert made.energy == pytest.approx(squares[~zero].sum())
    assert made.energy_removed == pytest.approx(squares[gone].sum())


@given(layers(), st.sampled_from(PATTERNS), st.sampled_from(["magnitude", "random"]))
@settings(max_examples=100)
def test_every_group_keeps_the_pattern_and_no_more_is_removed_than_needed(
    case: Layer, pattern: Sparsity, method: Method
) -> None:
    codes, weight = case
    made = prune(codes, bits(weight), pattern, method, 3, "layer")
    unpruned = groups = 0
    for row in range(codes.shape[0]):
        for first in range(0, codes.shape[1], pattern.group_columns(codes.shape[1])):
            before = codes[row, first : first + pattern.group_columns(codes.shape[1])]
            after = made.codes[row, first : first + len(before)]
            groups += 1
            allowed = len(before) if pattern.l is None else pattern.l - 2
            had = int((~np.isin(before, (0, -128))).sum())
            assert int((~np.isin(after, (0, -128))).sum()) == min(had, allowed)
            unpruned += had <= allowed
    assert (made.groups, made.groups_unpruned) == (groups, unpruned)
    changed = made.codes != codes
    assert (made.codes[changed] == 0).all()


@given(layers())
def test_two_to_infinity_changes_no_byte(case: Layer) -> None:
    codes, weight = case
    for method in ("magnitude", "random"):
        made = prune(codes, bits(weight), Sparsity(None), method, 0, "layer")
        assert made.codes.tobytes() == codes.tobytes()
        assert (made.removed, made.groups_unpruned) == (0, made.groups)


def test_ties_take_the_lowest_column() -> None:
    codes = np.ones((1, 8), dtype=np.int8)
    weight = bf16(np.full((1, 8), 0.5))
    assert prune(codes, bits(weight), Sparsity(8), "magnitude", 0, "x").codes.tolist() == [[0, 0, 1, 1, 1, 1, 1, 1]]
    weight[0, 1] = -0.75  # larger, whatever its sign
    assert prune(codes, bits(weight), Sparsity(8), "magnitude", 0, "x").codes.tolist() == [[0, 1, 0, 1, 1, 1, 1, 1]]


def test_natural_zeros_are_used_before_smaller_weights() -> None:
    codes = np.array([[1, 0, -1, 1]], dtype=np.int8)
    weight = bf16([[0.25, 4.0, 0.5, 1.0]])  # the zero code belongs to the largest weight
    assert prune(codes, bits(weight), Sparsity(4), "magnitude", 0, "x").codes.tolist() == [[0, 0, -1, 1]]


def test_random_depends_on_seed_layer_and_pattern_alone_and_not_on_magnitude() -> None:
    rng = np.random.default_rng(0)
    codes = np.ones((64, 240), dtype=np.int8)
    one, other = (bf16(rng.standard_normal(codes.shape)) for _ in range(2))

    def mask(weight: torch.Tensor, seed: int, layer: str) -> npt.NDArray[np.bool_]:
        return prune(codes, bits(weight), Sparsity(8), "random", seed, layer).codes == 0

    first = mask(one, 0, "a")
    np.testing.assert_array_equal(first, mask(other, 0, "a"))
    assert (first != mask(one, 1, "a")).mean() > 0.2
    assert (first != mask(one, 0, "b")).mean() > 0.2
    share = first.reshape(64, -1, 8).mean(axis=(0, 1))  # 64 * 30 groups: every lane is hit about equally often
    assert share == pytest.approx(np.full(8, 0.25), abs=0.05)


def test_subnormal_and_huge_weights_are_ordered() -> None:
    codes = np.ones((1, 4), dtype=np.int8)
    weight = torch.tensor([[3.0e38, 1e-40, 9.2e-41, 1e-3]], dtype=torch.bfloat16)
    assert prune(codes, bits(weight), Sparsity(4), "magnitude", 0, "x").codes.tolist() == [[1, 0, 0, 1]]
