"""Tasks 4 and 5: cell definitions, rates from counted tokens, checks first, failures that stay in their cell."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pandas as pd
import pytest
import torch
from small_models import BITNET, checkpoint
from small_runs import MODEL, QUICK, small_run, task

from slidesparse import records
from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError, DiskError
from slidesparse.kernels.verify import Check
from slidesparse.measure import throughput
from slidesparse.measure.engines.base import DecodeResult, Limits, StepResult
from slidesparse.measure.side_by_side import Measured
from slidesparse.measure.step_profile import KernelTime, StepProfile
from slidesparse.measure.timer import Samples
from slidesparse.pattern import Sparsity
from slidesparse.plan import Phase, Variant
from slidesparse.run import Outcome, Run
from slidesparse.tuning import search
from slidesparse.tuning.store import TuningStore

DENSE, SPARSE = Variant("cpu_dense"), Variant("cpu_sparse", Sparsity(8))
PUBLISHED = {
    "prefill": "M_prefill,prompt_len,max_num_seqs,num_prompts,N_prefill,requests_per_s,tokens_per_s,elapsed_time_s",
    "decode": (
        "M_decode,prompt_len,max_num_seqs,num_prompts,N_decode,output_len,requests_per_s,tokens_per_s,elapsed_time_s"
    ),
}


class FakeSession:
    """An engine of known speed: 1 ms a token in a step."""

    vocabulary = 50
    startup_s = 0.25
    compile_s = 0.5
    lead_in = 0
    own_process = False

    def __init__(self) -> None:
        self.prompts: list[torch.Tensor] = []
        self.log: Counter[str] = Counter()
        self.variant: Variant | None = None
        self.slower = 1.0
        self.graphs: list[float] = []
        self.lost = 0
        self.fail_at = -1
        self.logits = Check("exact", "logits fine")
        self.closed = False

    def begin(self) -> None:
        self.log["begin"] += 1

    def prefill_steps(self, tokens: torch.Tensor) -> tuple[StepResult, ...]:
        steps = [self.prefill_step(batch) for batch in tokens]
        for step in steps[: self.lead_in]:
            steps[0] = replace(step, seconds=10 * step.seconds)
        return tuple(steps)

    def prefill_step(self, tokens: torch.Tensor) -> StepResult:
        if tokens.numel() == self.fail_at:
            raise MemoryError("no room for 16 tokens")
        self.prompts.append(tokens)
        self.log["steps"] += 1
        return StepResult(tokens.numel() * 1e-3 * self.slower, tokens.numel() - self.lost, tokens.shape[0])

    def decode(self, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        count = tokens.shape[0]
        steps = tuple(StepResult(count * 1e-3, count, count) for _ in range(output_len - 1))
        if self.graphs:
            gpu = self.graphs.pop(0)
            steps = tuple(replace(step, graph_seconds=gpu) for step in steps)
        return DecodeResult(self.prefill_step(tokens), steps, torch.zeros(count, output_len, dtype=torch.int64))

    def check_logits(self, prompts: torch.Tensor) -> Check:
        return self.logits

    def check_step(self, tokens: torch.Tensor, phase: Phase) -> Check:
        self.log[f"check {phase} {tuple(tokens.shape)}"] += 1
        return Check("within_bound", "layers fine")

    def profile_step(self, tokens: torch.Tensor, phase: Phase) -> StepProfile | None:
        if phase == "decode":
            raise RuntimeError("no profiler")
        return StepProfile((KernelTime("flash_fwd_kernel", 30.0, 2),), 40.0)

    def path(self) -> str:
        return "fake path"

    def tuning(self) -> str:
        return "hits 0, nearest 0, missed 0, stale 0"

    def close(self) -> None:
        self.closed = True


class FakeEngine:
    name = "transformers"

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.settings: dict[str, object] = {}
        self.unloadable: Variant | None = None
        self.room = 1

    def require(self, machine: object) -> None:
        pass

    def versions(self) -> dict[str, str]:
        return {"fake": "1"}

    def together(self, folders: Sequence[Path], limits: Limits, machine: object) -> int:
        self.limits = limits
        return self.room

    def open(self, folder: Path, dtype: DType, variant: Variant, store: TuningStore, limits: Limits) -> FakeSession:
        if variant == self.unloadable:
            raise MemoryError("model too large")
        session = FakeSession()
        session.variant = variant
        for name, value in self.settings.items():
            setattr(session, name, value)
        self.sessions.append(session)
        return session


@pytest.fixture(autouse=True)
def checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any folder of the plan holds its checkpoint."""

    def opens(folder: Path) -> object:
        dtype = DType.INT8 if "-INT8" in folder.name else DType.FP8
        return checkpoint(BITNET, dtype, Sparsity(8) if "SlideSparse" in folder.name else None)

    monkeypatch.setattr(Checkpoint, "open", opens)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()
    monkeypatch.setattr(throughput, "engine", lambda name: fake)
    return fake


def measure(run: Run, phase: str) -> Outcome:
    """One of the two tasks, alone."""
    return throughput.run_tasks(run, [task(run, phase)])[0]


def table(run: Run, phase: Phase, variant: Variant = DENSE, dtype: DType = DType.INT8) -> pd.DataFrame:
    return records.read(run.tree.throughput(phase, MODEL, dtype, variant))


# -- figures -------------------------------------------------------------------------------------------


def test_prefill_figures_follow_the_definition(tmp_path: Path, fake: FakeEngine) -> None:
    """M = 16, prompts of 8: 2 sequences a step, 2 steps: 4 prompts, 32 prompt tokens + 4 outputs in 32 ms."""
    run = small_run(tmp_path)
    assert measure(run, "prefill").failed == 0
    row = table(run, "prefill").query("M_prefill == 16").iloc[0]
    assert (row["prompt_len"], row["max_num_seqs"], row["num_prompts"], row["N_prefill"]) == (8, 2, 4, 2)
    assert row["elapsed_time_s"] == pytest.approx(0.032)
    assert row["tokens_per_s"] == pytest.approx(36 / 0.032)
    assert row["requests_per_s"] == pytest.approx(4 / 0.032)
    assert row["output_tokens_per_s"] == pytest.approx(4 / 0.032)
    assert row["steady_tokens_per_s"] == pytest.approx(1000)
    assert (row["step_ms"], row["tokens_per_step"]) == (pytest.approx(16), 16)
    assert row["ci_low"] == pytest.approx(row["tokens_per_s"]) == row["p20"]
    assert (row["stop"], row["passes"], row["samples"]) == ("interval", 1, 2)
    assert (row["verified"], row["check"]) == ("within_bound", "logits fine; layers fine")
    assert (row["path"], row["emulation"]) == ("fake path", True)
    assert row["greedy_tokens"] == " / ".join(["0 0 0 0 0 0 0 0"] * 4)
    assert (row["startup_s"], row["compile_s"], row["over_stock"], row["over_dense"]) == (0.25, 0.5, -1, -1)


def test_the_first_step_of_a_burst_is_not_counted_where_steps_overlap(tmp_path: Path, fake: FakeEngine) -> None:
    """The fake's first step of a run takes ten times as long."""
    fake.settings["lead_in"] = 1
    run = small_run(tmp_path, dtypes=["INT8"])
    measure(run, "prefill")
    row = table(run, "prefill").query("M_prefill == 16").iloc[0]
    assert (row["elapsed_time_s"], row["step_ms"]) == (pytest.approx(0.032), pytest.approx(16))
    assert (row["num_prompts"], row["passes"], row["samples"]) == (4, 2, 2), "2 steps are a burst"


def test_decode_figures_follow_the_definition(tmp_path: Path, fake: FakeEngine) -> None:
    """3 sequences of 4 prompt and 3 output tokens: 12 ms to read, 2 steps of 3 ms."""
    run = small_run(tmp_path)
    measure(run, "decode")
    row = table(run, "decode").iloc[0]
    assert (row["M_decode"], row["num_prompts"], row["N_decode"], row["output_len"]) == (3, 3, 3, 3)
    assert row["elapsed_time_s"] == pytest.approx(0.018)
    assert row["tokens_per_s"] == pytest.approx((12 + 9) / 0.018)
    assert row["output_tokens_per_s"] == pytest.approx(9 / 0.018)
    assert row["steady_tokens_per_s"] == pytest.approx(6 / 0.006), "reading the prompts is left out"
    assert (row["step_ms"], row["tokens_per_step"]) == (pytest.approx(3), 3)


def test_every_step_has_fresh_prompts_and_runs_repeat_them(tmp_path: Path, fake: FakeEngine) -> None:
    for number in (1, 2):
        run = small_run(tmp_path / str(number))
        measure(run, "prefill")
    first, second = fake.sessions[0].prompts, fake.sessions[4].prompts
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


def test_published_columns_lead(tmp_path: Path, fake: FakeEngine) -> None:
    run = small_run(tmp_path)
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        measure(run, phase)
        text = run.tree.throughput(phase, MODEL, DType.FP8, SPARSE).read_text()
        assert text.startswith(PUBLISHED[phase] + ",")


# -- order, sessions, resume -----------------------------------------------------------------------------


def test_one_session_a_variant_and_every_cell_checked_at_its_own_size(tmp_path: Path, fake: FakeEngine) -> None:
    run = small_run(tmp_path)
    outcome = measure(run, "prefill")
    assert outcome.ok == 8
    assert len(fake.sessions) == 4, "2 types x (dense, 2:8)"
    for session in fake.sessions:
        assert session.closed
        assert session.log["begin"] == 2
        assert session.log["check prefill (1, 4)"] == session.log["check prefill (2, 8)"] == 1


def test_a_second_run_opens_nothing_and_a_new_winner_measures_again(tmp_path: Path, fake: FakeEngine) -> None:
    run = small_run(tmp_path)
    measure(run, "decode")
    opened = len(fake.sessions)
    outcome = measure(run, "decode")
    assert outcome.done_before == outcome.ok == 4
    assert len(fake.sessions) == opened
    search.run_task(run, task(run, "tune"))
    assert measure(run, "decode").done_before == 0, "tuning decides what runs"


def test_only_missing_cells_are_measured(tmp_path: Path, fake: FakeEngine) -> None:
    few = small_run(tmp_path, prefill={"m": [16], "prompt_cap": 8, "steps": 2, "stopping": QUICK})
    measure(few, "prefill")
    run = small_run(tmp_path)
    outcome = measure(run, "prefill")
    assert (outcome.ok, outcome.done_before) == (8, 4)
    assert len(table(run, "prefill")) == 2


# -- side by side ----------------------------------------------------------------------------------------


def test_both_phases_share_one_session_a_variant(tmp_path: Path, fake: FakeEngine) -> None:
    run = small_run(tmp_path)
    prefill, decode = throughput.run_tasks(run, [task(run, "prefill"), task(run, "decode")])
    assert (prefill.ok, decode.ok) == (8, 4)
    assert len(fake.sessions) == 4
    assert prefill.seconds
    assert decode.seconds
    assert fake.limits.sizes == (3, 4, 16)
    assert (fake.limits.sequences, fake.limits.positions, fake.limits.cached_tokens) == (3, 9, 21)


def test_ratios_are_of_steps_taken_in_turns(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both variants alive: every round runs a step of each; the sparse one takes 0.8 of the time."""
    fake.room = 2
    turns: list[Variant | None] = []
    genuine = FakeSession.prefill_step

    def step(self: FakeSession, tokens: torch.Tensor) -> StepResult:
        self.slower = 0.8 if self.variant == SPARSE else 1.0
        turns.append(self.variant)
        return genuine(self, tokens)

    monkeypatch.setattr(FakeSession, "prefill_step", step)
    run = small_run(tmp_path, dtypes=["INT8"])
    measure(run, "prefill")
    rounds = [frozenset(turns[i : i + 2]) for i in range(0, len(turns), 2)]
    assert rounds
    assert set(rounds) == {frozenset({DENSE, SPARSE})}
    row = table(run, "prefill", SPARSE).iloc[0]
    assert row["over_dense"] == pytest.approx(1.25)
    assert row["over_dense_low"] <= row["over_dense"] <= row["over_dense_high"]
    assert row["over_stock"] == -1
    assert table(run, "prefill", DENSE).iloc[0]["over_dense"] == -1
    first, second = fake.sessions
    assert all(torch.equal(a, b) for a, b in zip(first.prompts, second.prompts, strict=True)), "the same work"


def test_a_session_is_checked_while_another_starts(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The dense engine is not there before the sparse one has been checked."""
    fake.room = 2
    checked = Event()
    genuine = FakeEngine.open

    def opened(self: FakeEngine, folder: Path, dtype: DType, variant: Variant, *others: Any) -> FakeSession:
        if variant == DENSE and not checked.wait(20):
            raise TimeoutError("no other was checked meanwhile")
        return genuine(self, folder, dtype, variant, *others)

    def check(self: FakeSession, prompts: torch.Tensor) -> Check:
        if self.variant == SPARSE:
            checked.set()
        return self.logits

    monkeypatch.setattr(FakeEngine, "open", opened)
    monkeypatch.setattr(FakeSession, "check_logits", check)
    run = small_run(tmp_path, dtypes=["INT8"])
    assert measure(run, "prefill").failed == 0


def test_graphs_of_decode_steps_are_compared_batch_by_batch(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU slows down from batch to batch: 1, 2, 4 ms in the dense engine, 0.8 of that in the sparse one. The host
    takes 3 ms a step in both."""
    fake.room = 2
    genuine = FakeEngine.open
    shown = 1e-3  # of the tokens shown after opening, in a batch of their own

    def opened(self: FakeEngine, folder: Path, dtype: DType, variant: Variant, *others: Any) -> FakeSession:
        session = genuine(self, folder, dtype, variant, *others)
        by = 0.8 if variant == SPARSE else 1.0
        warm_up = 7e-3
        session.graphs = [shown, warm_up, *(by * ms * 1e-3 for ms in (1, 2, 4))]
        return session

    monkeypatch.setattr(FakeEngine, "open", opened)
    monkeypatch.setattr(throughput, "first", lambda sides, stock: next(s for s in sides if s.variant == DENSE))
    stopping = QUICK | {"min_samples": 3, "max_samples": 3, "cap_s": 10}
    decode = {"m": [3], "prompt_len": 4, "output_len": 3, "stopping": stopping}
    run = small_run(tmp_path, dtypes=["INT8"], decode=decode)
    measure(run, "decode")
    dense, sparse = (table(run, "decode", variant).iloc[0] for variant in (DENSE, SPARSE))
    assert (dense["graph_ms"], dense["graph_over_stock"]) == (pytest.approx(2.0), -1)
    assert (sparse["graph_ms"], sparse["graph_over_stock"]) == (pytest.approx(1.6), pytest.approx(1.25))
    assert sparse["graph_over_stock_low"] == sparse["graph_over_stock_high"] == pytest.approx(1.25)
    assert (sparse["over_stock"], sparse["step_ms"]) == (pytest.approx(1.0), pytest.approx(3.0))


def test_a_sample_of_graph_time_is_a_block_of_a_batch() -> None:
    """Two batches of 70 steps: blocks of 32, 32 and 6, none over the end of a batch."""
    batches = [[1.0] * 32 + [2.0] * 32 + [3.0] * 6, [4.0] * 32 + [5.0] * 32 + [6.0] * 6]
    steps = [StepResult(9.0, 64, 64, graph_seconds=seconds) for batch in batches for seconds in batch]
    prompts = [StepResult(9.0, 1024, 64)] * 2
    measured = Measured(Samples((9.0,) * 6, "time cap", 0.0, 1.0), prompts, steps)
    assert measured.graphs == (1, 2, 3, 4, 5, 6)


def test_samples_of_decode_are_blocks_at_the_same_place_in_a_batch(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A batch of 70 steps, which slow down from 1 to 3 ms: one batch a variant is enough for an interval, and every
    ratio is of the same blocks."""
    fake.room = 2

    def decode(self: FakeSession, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        self.log["batches"] += output_len == 71
        by = 0.8e-3 if self.variant == SPARSE else 1e-3
        count = tokens.shape[0]
        steps = tuple(StepResult(by * (1 + place // 32), count, count) for place in range(output_len - 1))
        return DecodeResult(self.prefill_step(tokens), steps, torch.zeros(count, output_len, dtype=torch.int64))

    monkeypatch.setattr(FakeSession, "decode", decode)
    stopping = QUICK | {"min_samples": 3, "max_samples": 3}
    decoding = {"m": [3], "prompt_len": 4, "output_len": 71, "stopping": stopping}
    run = small_run(tmp_path, dtypes=["INT8"], decode=decoding)
    measure(run, "decode")
    assert [session.log["batches"] for session in fake.sessions] == [1, 1]
    dense, sparse = (table(run, "decode", variant).iloc[0] for variant in (DENSE, SPARSE))
    assert (dense["samples"], dense["passes"], dense["step_ms"]) == (3, 1, pytest.approx(2.0))
    assert (sparse["step_ms"], sparse["over_dense"]) == (pytest.approx(1.6), pytest.approx(1.25))
    assert sparse["over_dense_low"] == sparse["over_dense_high"] == pytest.approx(1.25)


def test_graphs_that_are_not_all_known_are_not_said(tmp_path: Path, fake: FakeEngine) -> None:
    fake.room = 2
    fake.settings = {"graphs": [1e-3, 1e-3, 1e-3]}  # the first three batches, then -1
    run = small_run(tmp_path, dtypes=["INT8"])
    measure(run, "decode")
    assert table(run, "decode", SPARSE).iloc[0]["graph_ms"] == -1


def test_a_missing_cell_is_measured_beside_its_reference_whose_row_stays(tmp_path: Path, fake: FakeEngine) -> None:
    fake.room = 2
    fake.unloadable = SPARSE
    run = small_run(tmp_path, dtypes=["INT8"])
    measure(run, "prefill")
    before = table(run, "prefill", DENSE)
    fake.unloadable = None
    assert measure(run, "prefill").done_before == 2
    assert table(run, "prefill", SPARSE).query("status == 'ok'")["over_dense"].tolist() == [1.0, 1.0]
    pd.testing.assert_frame_equal(table(run, "prefill", DENSE), before)


def test_all_that_fit_stand_side_by_side(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for just the two that there are: one group, not the reference alone and then both."""
    groups: list[list[Variant]] = []
    genuine = throughput._Model._measure_group

    def noted(self: Any, group: list[Any], *others: Any) -> None:
        groups.append([side.variant for side in group])
        genuine(self, group, *others)

    monkeypatch.setattr(throughput._Model, "_measure_group", noted)
    fake.room = 2
    measure(small_run(tmp_path, dtypes=["INT8"]), "prefill")
    assert groups == [[DENSE, SPARSE]]


def test_a_reference_is_measured_beside_every_group_and_recorded_once(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for two of three: the dense variant is opened again beside the second sparse one."""
    fake.room = 2
    sparsity = {"end_to_end": ["2:4", "2:8"], "kernel_high": ["2:8"], "kernel_low": ["2:inf"]}
    run = small_run(tmp_path, dtypes=["INT8"], sparsity=sparsity)
    outcome = measure(run, "prefill")
    assert [session.variant for session in fake.sessions].count(DENSE) == 2
    assert table(run, "prefill", DENSE)["M_prefill"].tolist() == [4, 16]
    assert (outcome.ok, outcome.failed, len(task(run, "prefill").cells)) == (6, 0, 6)
    assert outcome.notes == [
        "Tiny-INT8: 2 groups of engines, as 2 fit into memory at a time; 1 started again, to compare the others with"
    ]
    for sparse in (Variant("cpu_sparse", Sparsity(4)), SPARSE):
        assert table(run, "prefill", sparse)["over_dense"].tolist() == [1.0, 1.0]


def test_one_that_fails_does_not_stop_those_beside_it(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.room = 2
    genuine = FakeSession.prefill_step

    def step(self: FakeSession, tokens: torch.Tensor) -> StepResult:
        if self.variant == SPARSE and tokens.numel() == 16:
            raise MemoryError("no room for 16 tokens")
        return genuine(self, tokens)

    monkeypatch.setattr(FakeSession, "prefill_step", step)
    run = small_run(tmp_path, dtypes=["INT8"])
    outcome = measure(run, "prefill")
    assert (outcome.ok, outcome.failed) == (3, 1)
    row = table(run, "prefill", SPARSE).set_index("M_prefill").loc[16]
    assert (row["status"], row["reason"]) == ("failed", "MemoryError: no room for 16 tokens")


def test_steps_of_the_named_sizes_are_profiled(tmp_path: Path, fake: FakeEngine) -> None:
    run = small_run(tmp_path, dtypes=["INT8"], step_profiles={"prefill_m": [16], "decode_m": [3]})
    outcomes = throughput.run_tasks(run, [task(run, "prefill"), task(run, "decode")])
    assert [outcome.failed for outcome in outcomes] == [0, 0], "a profiler that fails costs no cell"
    frame = records.read(run.tree.step_profile(MODEL, DType.INT8))
    assert set(frame["phase"]) == {"prefill"}
    assert set(frame["M"]) == {16}
    assert set(frame["backend"]) == {"cpu_dense", "cpu_sparse"}
    dense = frame.query("backend == 'cpu_dense'").set_index("category")["us"]
    assert (dense["attention"], dense["idle"]) == (30.0, 10.0)
    marks = table(run, "prefill").set_index("M_prefill")["host_bound"]
    assert marks.to_dict() == {4: False, 16: True}, "30 us of kernels in a step of 16 ms; M=4 has no profile"


def test_a_step_profile_asked_for_later_is_made(tmp_path: Path, fake: FakeEngine) -> None:
    measure(small_run(tmp_path, dtypes=["INT8"]), "prefill")
    run = small_run(tmp_path, "run2", dtypes=["INT8"], step_profiles={"prefill_m": [16], "decode_m": []})
    assert measure(run, "prefill").done_before == 2, "the cells of M = 4"
    assert set(records.read(run.tree.step_profile(MODEL, DType.INT8))["M"]) == {16}


# -- failures ------------------------------------------------------------------------------------------


def test_a_memory_error_ends_its_cell_only(tmp_path: Path, fake: FakeEngine) -> None:
    fake.settings["fail_at"] = 16
    run = small_run(tmp_path)
    outcome = measure(run, "prefill")
    assert (outcome.ok, outcome.failed, outcome.status) == (4, 4, "failed")
    frame = table(run, "prefill").set_index("M_prefill")
    assert (frame.loc[4, "status"], frame.loc[16, "status"]) == ("ok", "failed")
    assert frame.loc[16, "reason"] == "MemoryError: no room for 16 tokens"
    assert frame.loc[16, "tokens_per_s"] == frame.loc[16, "elapsed_time_s"] == frame.loc[16, "ci_low"] == -1
    fake.settings.clear()
    assert measure(run, "prefill").done_before == 4


def test_a_variant_that_does_not_load_fails_its_cells_only(tmp_path: Path, fake: FakeEngine) -> None:
    fake.unloadable = SPARSE
    run = small_run(tmp_path)
    outcome = measure(run, "prefill")
    assert (outcome.ok, outcome.failed) == (4, 4)
    assert set(table(run, "prefill", SPARSE)["reason"]) == {"MemoryError: model too large"}


def test_a_variant_with_wrong_logits_is_measured_but_marked(tmp_path: Path, fake: FakeEngine) -> None:
    fake.settings["logits"] = Check("failed", "logits: relative error 0.7")
    run = small_run(tmp_path)
    outcome = measure(run, "decode")
    assert (outcome.ok, outcome.failed, outcome.status) == (0, 4, "failed")
    row = table(run, "decode").iloc[0]
    assert (row["status"], row["verified"]) == ("ok", "failed")
    assert row["tokens_per_s"] > 0
    assert "relative error 0.7" in row["reason"]
    fake.settings.clear()
    again = measure(run, "decode")
    assert (again.ok, again.done_before) == (4, 0), "a marked cell is not done"


def test_what_could_not_be_compared_is_no_failure(tmp_path: Path, fake: FakeEngine) -> None:
    """As on several ranks, whose layers are not looked at."""
    fake.settings["logits"] = Check("not_checked", "no reference fits")
    run = small_run(tmp_path, dtypes=["INT8"])
    outcome = measure(run, "prefill")
    assert (outcome.ok, outcome.failed) == (4, 0)
    row = table(run, "prefill").iloc[0]
    assert (row["status"], row["verified"]) == ("ok", "not_checked")


def test_no_variant_loads(tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: object) -> FakeSession:
        raise MemoryError("model too large")

    monkeypatch.setattr(fake, "open", fails)
    assert measure(small_run(tmp_path), "prefill").failed == 8


def test_steps_that_hold_other_tokens_than_the_cell_are_no_result(tmp_path: Path, fake: FakeEngine) -> None:
    """An engine that splits or pads a step would otherwise report another M's rate."""
    fake.settings["lost"] = 1
    run = small_run(tmp_path)
    assert measure(run, "prefill").failed == 8
    row = table(run, "prefill").iloc[0]
    assert "steps held [3] tokens" in row["reason"]
    assert row["tokens_per_s"] == -1


def test_a_missing_checkpoint_is_a_failure_with_its_reason(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(folder: Path) -> object:
        raise CheckpointError(f"{folder.name}: no config.json; run prepare first")

    monkeypatch.setattr(Checkpoint, "open", missing)
    run = small_run(tmp_path)
    assert measure(run, "decode").failed == 4
    assert table(run, "decode").iloc[0]["reason"] == "Tiny-INT8: no config.json; run prepare first"


def test_missing_hardware_is_skipped_once(tmp_path: Path) -> None:
    run = small_run(tmp_path, engine="vllm")
    for _ in range(2):
        outcome = measure(run, "decode")
        assert (outcome.skipped, outcome.failed, outcome.status) == (4, 0, "skipped")
    frame = table(run, "decode")
    assert frame["status"].tolist() == ["skipped"]
    assert "needs an NVIDIA GPU" in frame["reason"].iloc[0]


def test_a_full_disk_ends_the_run_and_keeps_what_was_recorded(
    tmp_path: Path, fake: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = small_run(tmp_path)
    genuine, written = records.append, Counter[str]()

    def append(path: Path, rows: object, header: object = ()) -> None:
        rows = list(rows)  # type: ignore[call-overload]
        written["rows"] += len(rows)
        if written["rows"] > 1:
            raise DiskError("disk full")
        genuine(path, rows, header)  # type: ignore[arg-type]

    monkeypatch.setattr(records, "append", append)
    with pytest.raises(DiskError):
        measure(run, "prefill")
    assert len(table(run, "prefill")) == 1


# -- with the real engine --------------------------------------------------------------------------------


def test_tuned_end_to_end_on_the_transformers_engine(tmp_path: Path) -> None:
    run = small_run(tmp_path)
    search.run_task(run, task(run, "tune"))
    phases: tuple[Phase, ...] = ("prefill", "decode")
    for phase in phases:
        outcome = measure(run, phase)
        assert (outcome.failed, outcome.skipped) == (0, 0)
        for dtype in QUANTISED:
            for variant in (DENSE, SPARSE):
                frame = table(run, phase, variant, dtype)
                assert set(frame["verified"]) <= {"exact", "within_bound"}
                assert (frame["tokens_per_s"] > 0).all()
                assert frame["path"].str.contains(variant.backend).all()
                assert frame["tuning"].str.contains(r"missed 0, stale 0").all(), frame["tuning"].tolist()
                assert (frame["peak_rss_mib"] > 10).all()
