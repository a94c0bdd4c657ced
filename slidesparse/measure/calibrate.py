"""Task 10: what this machine can do at most, cell by cell; the report puts kernels beside it."""

from __future__ import annotations

from typing import Any

from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import peak_library
from slidesparse.measure import rates, telemetry
from slidesparse.measure.book import RowBook
from slidesparse.measure.cells import Table
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
        self._run, self._table = run, Table(run, book, outcome, CalibrationRow)
        self._stopping = rates.steady(run.plan.profile.calibrate.seconds)
        self._method = rates.METHOD, peak_library.ABI_VERSION, kernel_versions()
        self._probe = telemetry.probe(run.machine)
        self._rig: Rig | None = None

    def measure(self, cell: CalibrateCell) -> None:
        self._table.settle(cell, _key(cell), {}, self._conditions, self._columns)

    def _conditions(self, cell: CalibrateCell) -> str:
        return fingerprint(cell, self._stopping, self._run.plan.profile.seed, self._method)

    def _columns(self, cell: CalibrateCell) -> dict[str, Any]:
        rate, watched = measured_unthrottled(self._probe, lambda: self._rate(cell), PERIOD_S)
        return rate.columns() | watched

    def _rate(self, cell: CalibrateCell) -> Rate:
        gpu = self._run.machine.gpu
        if gpu is None:
            raise UnsupportedHere("rates are measured on an NVIDIA GPU, and torch sees none")
        if self._rig is None:
            self._rig = Rig.here()
        seed = self._run.plan.profile.seed
        if cell.dtype is None:
            return rates.copy_rate(self._rig, self._stopping, seed)
        library = peak_library.load()
        what = gpu.compute_capability, cell.dtype, cell.sparse, cell.loads
        return rates.tensor_core_rate(self._rig, library, *what, self._stopping, seed)


def _key(cell: CalibrateCell) -> dict[str, Any]:
    dtype = "" if cell.dtype is None else cell.dtype.value
    return {"quantity": cell.quantity, "dtype": dtype, "sparse": cell.sparse, "loads": cell.loads}
