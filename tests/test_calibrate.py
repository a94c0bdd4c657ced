"""Task 10: rates of the right work under steady power, instructions checked first, cells skipped with a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
from fake_gpu import COPY_S, OPERATIONS_PER_S, FakeClock, FakeLibrary
from small_runs import MACHINE, small_run, task

from slidesparse import records
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import peak_library, triton_copy
from slidesparse.machine import Gpu
from slidesparse.measure import calibrate, rates, telemetry
from slidesparse.measure.timer import measure
from slidesparse.rows import CalibrationRow
from slidesparse.run import Run


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> FakeLibrary:
    """Stands for the GPU and its library in every run of the test."""
    fake = FakeLibrary()
    monkeypatch.setattr(peak_library, "load", lambda: fake)
    monkeypatch.setattr(telemetry, "probe", lambda machine: telemetry.CpuProbe())
    rig = rates.Rig(FakeClock(fake), "cpu", 2 * triton_copy.GRAIN, 1 << 20)
    monkeypatch.setattr(rates.Rig, "here", classmethod(lambda cls: replace(rig, clock=FakeClock(fake))))
    return fake


def calibration(folder: Path, capability: tuple[int, int] | None = (9, 0), seconds: float = 0.05) -> Run:
    """A run on a machine with such a GPU."""
    backends = {"dense": ["cublaslt"], "sparse": ["cusparselt"]}
    run = small_run(folder, backends=backends, calibrate={"seconds": seconds})
    gpu = None if capability is None else Gpu("NVIDIA Test", capability, 1 << 34, "1")
    return replace(run, machine=replace(MACHINE, gpu=gpu))


def table(run: Run) -> pd.DataFrame:
    return records.read(run.tree.calibration)


# -- rates ---------------------------------------------------------------------------------------------


def test_every_cell_has_the_rate_of_its_best_form_under_steady_power(tmp_path: Path, library: FakeLibrary) -> None:
    run = calibration(tmp_path)
    outcome = calibrate.run_task(run, task(run, "calibrate"))
    assert (outcome.ok, outcome.failed, outcome.skipped) == (17, 0, 0)
    frame = table(run)
    assert set(frame["verified"]) == {"exact"}
    assert not frame["emulation"].any()
    copy, cores = frame[frame["quantity"] == "copy"], frame[frame["quantity"] == "tensor cores"]
    assert copy["rate"].item() == pytest.approx(2 * 2 * triton_copy.GRAIN / COPY_S * 1e-9), "read and written"
    assert copy["unit"].item() == "GB/s"
    assert len(cores.drop_duplicates(list(CalibrationRow.KEY))) == 16
    assert cores["rate"].tolist() == pytest.approx([OPERATIONS_PER_S * 1e-12] * 16), "not the 25 % more of a rested GPU"
    assert set(cores["unit"]) == {"TOPS"}
    assert set(cores["instruction"]) == {"mma of 2 units"}, "one unit reaches half"
    assert cores["path"].str.startswith("csrc/device, mma of 2").all()
    for row in frame.itertuples():
        assert row.ci_low <= row.rate <= row.ci_high
        assert row.p20 <= row.rate * (1 + 1e-9)
        assert row.rate <= row.p80 * (1 + 1e-9)


def test_loads_beside_the_multiplications_are_counted(tmp_path: Path, library: FakeLibrary) -> None:
    run = calibration(tmp_path)
    calibrate.run_task(run, task(run, "calibrate"))
    frame = table(run).query("quantity == 'tensor cores'")
    assert frame[frame["loads"]]["load_rate"].tolist() == pytest.approx([5.0] * 8, rel=1e-3)
    assert set(frame[~frame["loads"]]["load_rate"]) == {-1.0}


def test_samples_are_taken_once_the_rate_has_stopped_falling() -> None:
    fake = FakeLibrary()
    clock = FakeClock(fake)
    samples = measure(clock.prepare([lambda: None]), rates.steady(0.05), clock)
    assert set(samples.values) == {COPY_S}
    assert samples.warmup_s >= 0.3


# -- what is skipped, failed, resumed --------------------------------------------------------------------


def test_a_wrong_instruction_fails_its_cells_and_leaves_no_number(tmp_path: Path, library: FakeLibrary) -> None:
    library.wrong = "1 units"  # not the best form: none may be wrong
    run = calibration(tmp_path)
    outcome = calibrate.run_task(run, task(run, "calibrate"))
    assert (outcome.ok, outcome.failed) == (1, 16)
    cores = table(run).query("quantity == 'tensor cores'")
    assert set(cores["verified"]) == {"failed"}
    assert cores["reason"].str.contains(r"mma of 1 units: check failed: .*1 of \d+ differ").all()
    for column in ("rate", "load_rate", "ci_low", "p20"):
        assert (cores[column] == -1).all(), column


def test_a_copy_that_misses_a_byte_fails(tmp_path: Path, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy(source: torch.Tensor, target: torch.Tensor, launch: triton_copy.Launch) -> None:
        target[:-1].copy_(source[:-1])

    monkeypatch.setattr(triton_copy, "copy", copy)
    run = calibration(tmp_path)
    assert calibrate.run_task(run, task(run, "calibrate")).failed == 1
    row = table(run).iloc[0]
    assert (row["quantity"], row["status"], row["verified"], row["rate"]) == ("copy", "failed", "failed", -1)


def reasons(run: Run) -> set[str]:
    frame = table(run)
    return set(frame[frame["status"] == "skipped"]["reason"])


def test_without_a_gpu_all_is_skipped_and_recorded_once(tmp_path: Path) -> None:
    run = calibration(tmp_path, None)
    for _ in range(2):
        outcome = calibrate.run_task(run, task(run, "calibrate"))
        assert (outcome.ok, outcome.skipped, outcome.status) == (0, 17, "skipped")
    assert len(table(run)) == 17
    assert reasons(run) == {"rates are measured on an NVIDIA GPU, and torch sees none"}


def test_what_the_gpu_lacks_is_skipped_with_the_reason(tmp_path: Path, library: FakeLibrary) -> None:
    run = calibration(tmp_path, (8, 0))
    outcome = calibrate.run_task(run, task(run, "calibrate"))
    assert (outcome.ok, outcome.skipped, outcome.failed) == (13, 4, 0)
    frame = table(run)
    assert set(frame[frame["status"] == "skipped"]["dtype"]) == {"FP8E4M3"}
    assert reasons(run) == {"FP8E4M3 needs compute capability 8.9"}


def test_without_the_library_the_copy_is_measured_and_the_rest_says_how_to_build(
    tmp_path: Path, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_built() -> peak_library.PeakLibrary:
        raise UnsupportedHere("not built; run `python -m slidesparse.kernels.build`")

    with monkeypatch.context() as patch:
        patch.setattr(peak_library, "load", not_built)
        run = calibration(tmp_path)
        outcome = calibrate.run_task(run, task(run, "calibrate"))
        assert (outcome.ok, outcome.skipped) == (1, 16)
        assert all("slidesparse.kernels.build" in reason for reason in reasons(run))
    outcome = calibrate.run_task(run, task(run, "calibrate"))
    assert (outcome.ok, outcome.done_before) == (17, 1), "once it is built, the skipped cells are measured"


def test_a_second_run_does_nothing_and_other_conditions_measure_again(
    tmp_path: Path, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = calibration(tmp_path)
    calibrate.run_task(run, task(run, "calibrate"))
    with monkeypatch.context() as patch:
        patch.setattr(rates, "_best", lambda *a: pytest.fail("measured again"))
        outcome = calibrate.run_task(run, task(run, "calibrate"))
        assert outcome.done_before == outcome.ok == 17
    longer = calibration(tmp_path, seconds=0.06)
    assert calibrate.run_task(longer, task(longer, "calibrate")).done_before == 0
    monkeypatch.setattr(peak_library, "ABI_VERSION", peak_library.ABI_VERSION + 1)
    assert calibrate.run_task(longer, task(longer, "calibrate")).done_before == 0, "another library measures otherwise"


def test_an_interrupted_run_keeps_its_rates(
    tmp_path: Path, library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine, calls = rates.tensor_core_rate, []

    def rate(*arguments: object) -> object:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return genuine(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(rates, "tensor_core_rate", rate)
    run = calibration(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        calibrate.run_task(run, task(run, "calibrate"))
    assert table(run)["status"].tolist() == ["ok"] * 3
    assert calibrate.run_task(run, task(run, "calibrate")).done_before == 3
