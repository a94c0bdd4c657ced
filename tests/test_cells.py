"""The cell loop of a table: one row and one count a cell, whatever becomes of it; a second run repeats nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_runs import small_run

from slidesparse import records
from slidesparse.errors import ContextLost, DiskError, UnsupportedHere, VerificationError
from slidesparse.measure.book import RowBook
from slidesparse.measure.cells import Table
from slidesparse.rows import CalibrationRow
from slidesparse.run import Outcome

MEASURED = {"rate": 2.0, "unit": "GB/s"}


def settle(
    folder: Path, measure: Callable[[str], dict[str, Any]], conditions: Callable[[str], str] = lambda cell: "same"
) -> tuple[bool, Outcome, dict[str, Any], int]:
    """One cell in a run of its own: what `settle` says, the counts, the cell's last row, and how many it has."""
    run, outcome, path = small_run(folder), Outcome(), folder / "table.csv"
    with RowBook(path) as book:
        good = Table(run, book, outcome, CalibrationRow).settle(
            "the copy", {"quantity": "copy"}, {"instruction": "said in any case"}, conditions, measure
        )
    frame = records.read(path)
    row = {str(name): value for name, value in frame.iloc[-1].items()}
    return good, outcome, row, len(frame)


def raising(error: Exception) -> Callable[[str], dict[str, Any]]:
    def measure(cell: str) -> dict[str, Any]:
        raise error

    return measure


def test_a_measured_cell_is_not_measured_again(tmp_path: Path) -> None:
    good, first, row, _ = settle(tmp_path, lambda cell: MEASURED)
    assert (good, first.ok, first.done_before, first.failed) == (True, 1, 0, 0)
    assert (row["status"], row["rate"], row["instruction"], row["fingerprint"]) == ("ok", 2, "said in any case", "same")
    good, second, _, rows = settle(tmp_path, raising(AssertionError("measured twice")))
    assert (good, second.ok, second.done_before, rows) == (True, 1, 1, 1)


def test_other_conditions_measure_it_again(tmp_path: Path) -> None:
    settle(tmp_path, lambda cell: MEASURED)
    good, outcome, row, _ = settle(tmp_path, lambda cell: MEASURED | {"rate": 3.0}, lambda cell: "other")
    assert (good, outcome.done_before, row["rate"], row["fingerprint"]) == (True, 0, 3, "other")


@pytest.mark.parametrize(
    ("error", "verified", "reason"),
    [
        (VerificationError("3 of 8 elements differ"), "failed", "3 of 8 elements differ"),
        (RuntimeError("CUDA out\nof memory"), "not_checked", "RuntimeError: CUDA out of memory"),
    ],
)
def test_a_failed_cell_says_why_and_is_tried_again(
    tmp_path: Path, error: Exception, verified: str, reason: str
) -> None:
    good, outcome, row, _ = settle(tmp_path, raising(error))
    assert (good, outcome.ok, outcome.failed) == (False, 0, 1)
    assert (row["status"], row["reason"], row["verified"]) == ("failed", reason, verified)
    assert row["instruction"] == "said in any case"
    good, outcome, row, _ = settle(tmp_path, lambda cell: MEASURED)
    assert (good, outcome.done_before, row["status"]) == (True, 0, "ok")


def test_conditions_that_cannot_be_told_fail_the_cell(tmp_path: Path) -> None:
    good, outcome, row, _ = settle(tmp_path, lambda cell: MEASURED, raising(OSError("no such checkpoint")))  # type: ignore[arg-type]
    assert (good, outcome.failed, row["fingerprint"]) == (False, 1, "")


@pytest.mark.parametrize("early", [True, False], ids=["conditions", "measuring"])
def test_what_cannot_run_here_is_skipped_and_said_once(tmp_path: Path, early: bool) -> None:
    refusal = raising(UnsupportedHere("needs an NVIDIA GPU"))
    given = (lambda cell: MEASURED, refusal) if early else (refusal,)
    for _ in range(2):
        good, outcome, row, rows = settle(tmp_path, *given)
        assert (good, outcome.ok, outcome.failed, outcome.skipped, rows) == (True, 0, 0, 1, 1)
        assert (row["status"], row["reason"]) == ("skipped", "needs an NVIDIA GPU")


@pytest.mark.parametrize("error", [DiskError("disk full"), ContextLost("the GPU's context is gone")], ids=type)
def test_what_ends_the_run_is_not_taken_for_a_failed_cell(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)):
        settle(tmp_path, raising(error))
    assert not (tmp_path / "table.csv").exists()
