"""The transform: lifted weights are 2:4 and multiply to the same product, for any L, any K, any zeros."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from slidesparse.checkpoint.lift import count_not_2_4, lift_activation, lift_weight, unlift_weight
from slidesparse.errors import CheckpointError
from slidesparse.pattern import Sparsity, first_fit

Bytes = npt.NDArray[np.int8]
PATTERNS = [Sparsity(length) for length in range(4, 17, 2)] + [Sparsity(None)]
NEGATIVE_ZERO = -128  # 0x80, the e4m3 byte of -0


def reference_lift(codes: Bytes, pattern: Sparsity) -> Bytes:
    """First fit, element by element, as the method describes it."""
    n, k = codes.shape
    out = np.zeros((n, pattern.lifted_k(k)), dtype=np.int8)
    if pattern.l is None:  # window w keeps columns 2w and 2w + 1
        for row, column in zip(*np.nonzero((codes != 0) & (codes != NEGATIVE_ZERO)), strict=True):
            out[row, 4 * (column // 2) + column % 2] = codes[row, column]
        return out
    length, windows = pattern.l, pattern.l // 2 - 1
    for row, group in np.ndindex(n, -(-k // length)):
        first = group * length
        values = [int(value) for value in codes[row, first : first + length]]
        nonzero = [j for j, value in enumerate(values) if value not in (0, NEGATIVE_ZERO)]
        for window, lane in first_fit(nonzero, length):
            out[row, 4 * (group * windows + window) + lane] = values[2 * window + lane]
    return out


@st.composite
def prunable(draw: st.DrawFn) -> tuple[Bytes, Sparsity]:
    """Codes of any K that keep the pattern, -0 and all-zero rows among them."""
    pattern = draw(st.sampled_from(PATTERNS))
    n, k = draw(st.integers(1, 5)), draw(st.integers(1, 70))
    element = st.one_of(st.sampled_from([0, NEGATIVE_ZERO, 1, -1]), st.integers(-127, 127))
    codes = draw(arrays(np.int8, (n, k), elements=element))
    if draw(st.booleans()):
        codes[draw(st.integers(0, n - 1))] = 0
    if pattern.l is not None:
        for first in range(0, k, pattern.l):
            width = min(pattern.l, k - first)
            for row in range(n):
                surplus = int(np.sum(~np.isin(codes[row, first : first + width], (0, NEGATIVE_ZERO)))) - (pattern.l - 2)
                columns = draw(st.permutations(range(width))) if surplus > 0 else []
                for column in columns:
                    if surplus > 0 and codes[row, first + column] not in (0, NEGATIVE_ZERO):
                        codes[row, first + column] = draw(st.sampled_from([0, NEGATIVE_ZERO]))
                        surplus -= 1
    return codes, pattern


@given(prunable())
@settings(max_examples=300)
def test_lift_is_first_fit_and_2_4_and_reversible(case: tuple[Bytes, Sparsity]) -> None:
    codes, pattern = case
    lifted = lift_weight(codes, pattern, "layer")
    assert lifted.shape == (codes.shape[0], pattern.lifted_k(codes.shape[1]))
    np.testing.assert_array_equal(lifted, reference_lift(codes, pattern))
    windows = (lifted.reshape(len(codes), -1, 4) != 0).sum(axis=2)
    assert windows.max(initial=0) <= 2
    assert count_not_2_4(lifted) == 0
    plain = np.where(codes == NEGATIVE_ZERO, 0, codes)
    np.testing.assert_array_equal(unlift_weight(lifted, codes.shape[1], pattern), plain)


@given(prunable(), st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_lifted_product_is_the_plain_product(case: tuple[Bytes, Sparsity], seed: int) -> None:
    codes, pattern = case
    x = np.random.default_rng(seed).integers(-127, 128, (3, codes.shape[1]), dtype=np.int8)
    plain = x.astype(np.int64) @ np.where(codes == NEGATIVE_ZERO, 0, codes).astype(np.int64).T
    lifted = lift_activation(x, pattern).astype(np.int64) @ lift_weight(codes, pattern, "layer").astype(np.int64).T
    np.testing.assert_array_equal(lifted, plain)


@given(st.sampled_from(PATTERNS), st.integers(1, 90))
def test_lifted_activation_is_the_column_map(pattern: Sparsity, k: int) -> None:
    x = np.arange(1, 2 * k + 1, dtype=np.int32).reshape(2, k)
    lifted = lift_activation(x, pattern)
    for c, column in enumerate(pattern.column_map(k)):
        expected = x[:, column] if column >= 0 else np.zeros(2)
        np.testing.assert_array_equal(lifted[:, c], expected)


@given(st.sampled_from(PATTERNS[:-1]), st.data())
def test_a_group_with_too_many_non_zeros_is_refused_by_layer_row_and_column(
    pattern: Sparsity, data: st.DataObject
) -> None:
    assert pattern.l is not None
    groups = data.draw(st.integers(1, 4))
    row, group = data.draw(st.integers(0, 2)), data.draw(st.integers(0, groups - 1))
    codes = np.zeros((3, groups * pattern.l), dtype=np.int8)
    first = group * pattern.l
    codes[row, first : first + pattern.l - 1] = 1  # one more than fits
    with pytest.raises(CheckpointError) as caught:
        lift_weight(codes, pattern, "model.layers.3.mlp.up_proj")
    message = str(caught.value)
    assert "\n" not in message
    assert f"model.layers.3.mlp.up_proj: row {row}, columns {first} to {first + pattern.l - 1}" in message
    assert f"{pattern.l - 1} non-zeros" in message


def test_zeros_past_a_partial_last_group_count_as_zeros() -> None:
    codes = np.ones((1, 10), dtype=np.int8)  # 2:8: the second group has two columns and six of padding
    codes[0, :2] = 0
    lifted = lift_weight(codes, Sparsity(8), "layer")
    assert int(lifted.sum()) == 8


def test_two_to_infinity_takes_dense_weights() -> None:
    codes = np.arange(1, 12, dtype=np.int8)[None]
    lifted = lift_weight(codes, Sparsity(None), "layer")
    assert lifted[0, :8].tolist() == [1, 2, 0, 0, 3, 4, 0, 0]
    assert count_not_2_4(lifted) == 0


def test_count_finds_bad_windows() -> None:
    lifted = np.zeros((2, 32), dtype=np.int8)
    lifted[0, 4:7] = 1
    lifted[1, 8:12] = -1
    lifted[1, 14:18] = 1  # two windows with two each: fine
    assert count_not_2_4(lifted) == 2
