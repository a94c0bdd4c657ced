"""The Z:L formula against the table of the method and against literal, independent statements of it."""

from __future__ import annotations

from itertools import combinations, product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse.pattern import OVERFULL, Sparsity, align, first_fit

LENGTHS = (4, 6, 8, 10, 12, 14, 16)
#           L: expansion, speed-up bound, as printed in the paper's terms
TABLE = {
    4: (1.000, 2.000), 6: (1.333, 1.500), 8: (1.500, 1.333), 10: (1.600, 1.250),
    12: (1.667, 1.200), 14: (1.714, 1.167), 16: (1.750, 1.143),
}  # fmt: skip


@pytest.mark.parametrize(("length", "row"), TABLE.items())
def test_expansion_and_bound_are_those_of_the_method(length: int, row: tuple[float, float]) -> None:
    pattern = Sparsity(length)
    assert (round(pattern.expansion, 3), round(pattern.speedup_bound, 3)) == row


def test_two_to_infinity_is_dense_weights_at_twice_the_width() -> None:
    assert (Sparsity(None).expansion, Sparsity(None).speedup_bound) == (2.0, 1.0)
    for k in range(1, 200):
        assert Sparsity(None).lifted_k(k) == align(2 * k, 32)


@pytest.mark.parametrize(("pattern", "share"), [("2:4", 0.625), ("2:6", 0.8333), ("2:8", 0.9375), ("2:10", 1.0)])
def test_weight_bytes_relative_to_dense(pattern: str, share: float) -> None:
    k = 4 * 6 * 8 * 10 * 32  # no padding in any of them
    assert Sparsity.parse(pattern).weight_bytes(3, k) / (3 * k) == pytest.approx(share, abs=1e-4)


@pytest.mark.parametrize(
    ("pattern", "k", "lifted"),
    [  # computed by hand: align(ceil(K/L) * 4 * (L/2 - 1), 32)
        ("2:4", 2560, 2560), ("2:6", 2560, 3424), ("2:8", 2560, 3840), ("2:10", 2560, 4096),
        ("2:4", 6912, 6912), ("2:6", 6912, 9216), ("2:8", 6912, 10368), ("2:10", 6912, 11072),
        ("2:16", 17, 64), ("2:4", 1, 32), ("2:inf", 2560, 5120),
    ],
)  # fmt: skip
def test_lifted_k(pattern: str, k: int, lifted: int) -> None:
    assert Sparsity.parse(pattern).lifted_k(k) == lifted


@given(st.sampled_from(LENGTHS), st.integers(1, 400))
def test_column_map_states_the_formula(length: int, k: int) -> None:
    """Lifted column c of group g, window w, lane i reads input column g*L + 2*w + i."""
    windows = length // 2 - 1
    expected = []
    for group in range(-(-k // length)):
        for window, lane in product(range(windows), range(4)):
            column = group * length + 2 * window + lane
            expected.append(column if column < k else -1)
    expected += [-1] * (-len(expected) % 32)
    assert Sparsity(length).column_map(k).tolist() == expected
    assert len(expected) == Sparsity(length).lifted_k(k)


@given(st.integers(1, 400))
def test_column_map_of_infinity_has_windows_at_stride_two(k: int) -> None:
    columns = Sparsity(None).column_map(k)
    expected = [c if c < k else -1 for window in range((k + 1) // 2) for c in range(2 * window, 2 * window + 4)]
    assert columns.tolist() == expected + [-1] * (-len(expected) % 32)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_entry_of_the_lift_table_is_first_fit(length: int) -> None:
    """Every one of the 2**L groups: the table says what first fit says, and that is a valid assignment."""
    table = Sparsity(length).lift_table()
    assert table.shape == (2**length,)
    for mask in range(2**length):
        nonzero = [j for j in range(length) if mask >> j & 1]
        if len(nonzero) > length - 2:
            assert table[mask] == OVERFULL
            with pytest.raises(ValueError, match=f"{len(nonzero)} non-zeros"):
                first_fit(nonzero, length)
            continue
        kept = [(bit // 4, bit % 4) for bit in range(4 * (length // 2 - 1)) if int(table[mask]) >> bit & 1]
        assert sorted(kept) == sorted(first_fit(nonzero, length))
        assert sorted(2 * window + lane for window, lane in kept) == nonzero
        assert all(sum(w == window for w, _ in kept) <= 2 for window in range(length // 2 - 1))


def test_first_fit_takes_the_leftmost_window_with_room() -> None:
    assert first_fit([0, 1, 2, 3, 4, 5], 8) == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]
    assert first_fit([2, 3, 4, 5, 6, 7], 8) == [(0, 2), (0, 3), (1, 2), (1, 3), (2, 2), (2, 3)]


def test_infinity_has_no_finite_table() -> None:
    with pytest.raises(ValueError, match="2:inf"):
        Sparsity(None).lift_table()


@pytest.mark.parametrize("text", ["3:8", "2:7", "2:2", "2:18", "2:0", "8", "2:", "2:8:4", "x"])
def test_impossible_patterns_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="sparsity"):
        Sparsity.parse(text)


@pytest.mark.parametrize("text", [*(f"2:{length}" for length in LENGTHS), "2:inf"])
def test_names_round_trip(text: str) -> None:
    pattern = Sparsity.parse(text)
    assert str(pattern) == text
    assert Sparsity.parse(pattern.slug) == pattern


@given(st.integers(0, 10**6), st.integers(1, 512))
def test_align(value: int, multiple: int) -> None:
    up = align(value, multiple)
    assert up % multiple == 0
    assert 0 <= up - value < multiple


def test_at_most_l_minus_two_is_not_a_bound_that_could_be_raised() -> None:
    """L - 2 non-zeros always fit, whichever they are; that is the claim the whole method rests on."""
    for length in (4, 6, 8, 10):
        for nonzero in combinations(range(length), length - 2):
            assert len(first_fit(list(nonzero), length)) == length - 2
    assert np.uint32(0xFFFFFFFF) == OVERFULL
