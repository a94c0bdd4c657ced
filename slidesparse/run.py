"""One run: what every stage is given, and what it gives back."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from slidesparse.machine import Machine
from slidesparse.plan import Plan
from slidesparse.result_tree import ResultTree


@dataclass(frozen=True)
class Run:
    """Given to every stage. Stages read the plan and append records; they keep no state of their own."""

    plan: Plan
    tree: ResultTree
    machine: Machine
    run_id: str
    log: logging.Logger
    quiet: bool = False

    def stamp(self) -> dict[str, Any]:
        """The columns that say when and by which run a row was made."""
        return {"run_id": self.run_id, "time_utc": datetime.now(UTC).isoformat(timespec="seconds")}


@dataclass
class Outcome:
    """Cells of one task: what became of them. `notes` go into the status table."""

    ok: int = 0
    failed: int = 0
    skipped: int = 0
    done_before: int = 0
    """Cells of `ok` that an earlier run had finished."""
    notes: list[str] = field(default_factory=list)
    seconds: float | None = None
    """This task's share, where several are run together; None: all the time that went by."""

    @property
    def status(self) -> str:
        if self.failed:
            return "failed"
        return "skipped" if self.skipped and not self.ok else "succeeded"
