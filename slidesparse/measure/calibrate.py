"""Task 10: what this machine can do at most, cell by cell; the report puts kernels beside it."""

from __future__ import annotations

from typing import Any

from slidesparse.errors import DiskError, UnsupportedHere, VerificationError
from slidesparse.kernels import peak_library
from slidesparse.measure import rates, telemetry
from slidesparse.measure.book import RowBook, reason_of
from slidesparse.measure.rates import Rate, Rig
from slidesparse.measure.telemetry import PERIOD_S, measured_unthrottled
from slidesparse.plan import CalibrateCell, Task, fingerprint
from slidesparse.progress import track
from slidesparse.rows import CalibrationRow
from slidesparse.run import Outcome, Run
from slidesparse.tuning.store import kernel_versions


def run_task(run: Run, task: Task) -> Outcome:
    """Measure all rates. One that this GPU does not have, or that needs the library of csrc/device, is skipped.

    Raises:
        DiskError, RecordError: nothing more can be recorded.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, CalibrateCell)]
    with track(task.title, len(cells), run.quiet) as bar, RowBook(run.tree.calibration) as book:
        calibrator = _Calibrator(run, book, outcome)
        for cell in cells:
            calibrator.measure(cell)
            bar.advance(note=str(cell))
    return outcome


class _Calibrator:
    """The rates of one run."""

    def __init__(self, run: Run, book: RowBook, outcome: Outcome) -> None:
        self._run, self._book, self._outcome = run, book, outcome
        self._stopping = rates.steady(run.plan.profile.calibrate.seconds)
        self._method = rates.METHOD, peak_library.ABI_VERSION, kernel_versions()
        self._probe = telemetry.probe(run.machine)
        self._rig: Rig | None = None

    def measure(self, cell: CalibrateCell) -> None:
        seed = self._run.plan.profile.seed
        conditions = fingerprint(cell, self._stopping, seed, self._method)
        columns: dict[str, Any] = _key(cell) | {"fingerprint": conditions}
        if self._book.done(_key(cell), conditions):
            self._outcome.ok += 1
            self._outcome.done_before += 1
            return
        try:
            rate, watched = measured_unthrottled(self._probe, lambda: self._rate(cell, seed), PERIOD_S)
            row = CalibrationRow(**columns, **rate.columns(), **watched, **self._run.stamp())
            self._outcome.ok += 1
        except DiskError:
            raise
        except UnsupportedHere as error:
            self._skip(cell, str(error))
            return
        except Exception as error:
            self._run.log.exception("calibrate %s", cell)
            self._outcome.failed += 1
            if isinstance(error, VerificationError):
                columns |= {"verified": "failed", "check": reason_of(error)}
            row = CalibrationRow(**columns, **self._run.stamp(), status="failed", reason=reason_of(error))
        self._book.add(row)

    def _rate(self, cell: CalibrateCell, seed: int) -> Rate:
        gpu = self._run.machine.gpu
        if gpu is None:
            raise UnsupportedHere("rates are measured on an NVIDIA GPU, and torch sees none")
        if self._rig is None:
            self._rig = Rig.here()
        if cell.dtype is None:
            return rates.copy_rate(self._rig, self._stopping, seed)
        library = peak_library.load()
        what = gpu.compute_capability, cell.dtype, cell.sparse, cell.loads
        return rates.tensor_core_rate(self._rig, library, *what, self._stopping, seed)

    def _skip(self, cell: CalibrateCell, reason: str) -> None:
        self._outcome.skipped += 1
        conditions = fingerprint(cell, "skipped", reason)
        if not self._book.done(_key(cell), conditions):
            columns = _key(cell) | self._run.stamp() | {"fingerprint": conditions}
            self._book.add(CalibrationRow(**columns, status="skipped", reason=reason))


def _key(cell: CalibrateCell) -> dict[str, Any]:
    dtype = "" if cell.dtype is None else cell.dtype.value
    return {"quantity": cell.quantity, "dtype": dtype, "sparse": cell.sparse, "loads": cell.loads}
