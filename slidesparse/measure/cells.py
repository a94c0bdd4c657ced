"""What becomes of one cell of a table: done before, measured, failed or skipped. One row, one count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from slidesparse.errors import ContextLost, DiskError, UnsupportedHere, VerificationError
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.plan import fingerprint
from slidesparse.rows import Row
from slidesparse.run import Outcome, Run

Cell = TypeVar("Cell")


@dataclass(frozen=True)
class Table:
    """Where the rows of cells go, and what counts them."""

    run: Run
    book: RowBook
    outcome: Outcome
    row: type[Row]

    def settle(
        self,
        cell: Cell,
        key: dict[str, Any],
        columns: dict[str, Any],
        conditions: Callable[[Cell], str],
        measure: Callable[[Cell], dict[str, Any]],
    ) -> bool:
        """Measure a cell unless its last row, of the same conditions, is there. False where it failed.

        The row says why it failed; by then nothing holds what was measured, so that memory can be freed.

        Args:
            cell: its text names it in the log.
            key: the columns that identify it; `columns`: all that its row says whatever becomes of it.
            conditions: the fingerprint of everything that decides the value.
            measure: the measured columns. UnsupportedHere: skipped; VerificationError: failed, and marked wrong.

        Raises:
            DiskError, RecordError: nothing more can be recorded.
            ContextLost: the GPU's context is gone.
        """
        columns = key | columns | {"fingerprint": ""}
        try:
            columns["fingerprint"] = conditions(cell)
            if self.book.done(key, columns["fingerprint"]):
                self.outcome.ok += 1
                self.outcome.done_before += 1
                return True
            row = self.row(**(columns | measure(cell) | self.run.stamp()))
        except (DiskError, ContextLost):
            raise
        except UnsupportedHere as error:
            self.skip(cell, key, columns, str(error))
            return True
        except Exception as error:
            self.run.log.exception("%s", cell)
            if isinstance(error, VerificationError):
                columns |= {"verified": "failed", "check": reason_of(error)}
            row = self.row(**(columns | self.run.stamp()), status="failed", reason=reason_of(error))
        self.outcome.ok += row.status == "ok"
        self.outcome.failed += row.status == "failed"
        self.book.add(row)
        return row.status == "ok"

    def skip(self, cell: object, key: dict[str, Any], columns: dict[str, Any], reason: str) -> None:
        """A row that says why the cell cannot run here; written once for one reason."""
        self.outcome.skipped += 1
        conditions = fingerprint(cell, "skipped", reason)
        if not self.book.done(key, conditions):
            columns = key | columns | self.run.stamp() | {"fingerprint": conditions}
            self.book.add(self.row(**columns, status="skipped", reason=reason))
