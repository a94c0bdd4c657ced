"""Speed-ups and verdicts against hand-computed values; the published figures against the published files."""

from __future__ import annotations

import math
from pathlib import Path

import pandas as pd
import pytest
from fixtures.result_trees import CPU, GPU, Writer, smoke

from slidesparse.report import compare, published
from slidesparse.report.collect import collect, trees_in
from slidesparse.result_tree import ResultTree

PUBLISHED_TREE = Path(__file__).parent / "fixtures" / "published"


def select(frame: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1, frame
    return frame.iloc[0]


@pytest.fixture(scope="module")
def smoke_tree(tmp_path_factory: pytest.TempPathFactory) -> ResultTree:
    return smoke(tmp_path_factory.mktemp("smoke"))


def test_end_to_end_ratio_and_interval_by_hand(tmp_path: Path) -> None:
    """r = s/d; ln half widths add in squares: lower from (s low, d high), upper from (s high, d low)."""
    writer = Writer(tmp_path, "smoke", CPU)
    figures = {"tokens_per_s": 1200.0, "ci_low": 1100.0, "ci_high": 1250.0}
    writer.changes = {
        "decode BitNet-tiny-INT8 cpu_sparse 2:8 M=8": figures,
        "decode BitNet-tiny-INT8 cpu_dense M=8": {"tokens_per_s": 1000.0, "ci_low": 980.0, "ci_high": 1030.0},
    }
    writer.task(writer.plan.tasks[4])
    row = select(compare.speedups(collect(writer.tree)), dtype="INT8", sparsity="2:8", m=8)
    down = math.hypot(math.log(1200 / 1100), math.log(1030 / 1000))
    up = math.hypot(math.log(1250 / 1200), math.log(1000 / 980))
    assert row["ratio"] == pytest.approx(1.2)
    assert row["low"] == pytest.approx(1.2 * math.exp(-down))
    assert row["high"] == pytest.approx(1.2 * math.exp(up))
    assert (row["baseline"], row["verdict"], row["bound"]) == ("cpu_dense", "faster", pytest.approx(4 / 3))


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.01, 1.05, "faster"),
        (0.9, 0.99, "slower"),
        (0.99, 1.01, "no difference shown"),
        (1.0, 1.2, "no difference shown"),
        (0.8, 1.0, "no difference shown"),
        (float("nan"), float("nan"), "no interval"),
        (-1.0, -1.0, "no interval"),
    ],
)
def test_verdict(low: float, high: float, expected: str) -> None:
    assert compare.verdict(low, high) == expected


def test_kernel_ratio_is_the_paired_one_of_the_row(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "smoke", CPU)
    paired = {"speedup": 1.31, "speedup_low": 1.29, "speedup_high": 1.34, "lat_us_1": 77.0}
    writer.changes = {"BitNet-tiny-INT8 cpu_sparse 2:8 qkv M=64 N=224 K=160": paired}
    writer.task(writer.plan.tasks[5])
    writer.task(writer.plan.tasks[6])
    row = select(compare.speedups(collect(writer.tree)), dtype="INT8", sparsity="2:8", m=64, n=224)
    assert (row["ratio"], row["low"], row["high"], row["k"]) == (1.31, 1.29, 1.34, 160)
    assert row["layer"] == "qkv"


def test_trust_needs_both_sides_checked(smoke_tree: ResultTree) -> None:
    frame = compare.speedups(collect(smoke_tree))
    prefill = frame[(frame["kind"] == "prefill") & (frame["dtype"] == "INT8")]
    assert not select(prefill, sparsity="2:8", m=128)["checked"]
    assert select(prefill, sparsity="2:6", m=128)["checked"]
    assert prefill[(prefill["sparsity"] == "2:8") & (prefill["m"] == 64)].empty, "a failed cell has no ratio"
    noisy = frame[(frame["kind"] == "prefill") & (frame["dtype"] == "FP8E4M3") & (frame["m"] == 16)]
    assert noisy["noisy"].all(), "the dense side's noise marks every ratio that rests on it"
    host = frame[(frame["kind"] == "decode") & (frame["dtype"] == "INT8") & (frame["m"] == 2)]
    assert host["host_bound"].all()
    assert frame["emulation"].all()


@pytest.mark.parametrize(
    ("backends", "expected"),
    [(["vllm", "cublaslt"], "cublaslt"), (["vllm"], "vllm"), (["cpu_dense"], "cpu_dense"), ([], "")],
)
def test_stock_kernels_are_never_the_base_if_there_is_another(backends: list[str], expected: str) -> None:
    assert compare.baseline(backends) == expected


def test_emulated_and_real_rows_are_never_divided(tmp_path: Path) -> None:
    """A GPU host that ran both the smoke profile and the reference run has one tree."""
    for profile in ("smoke", "bitnet-2b"):
        writer = Writer(tmp_path, profile, GPU)
        writer.task(writer.plan.tasks[4])
    records = collect(writer.tree)
    frame = compare.speedups(records)
    assert set(zip(frame["emulation"], frame["baseline"], strict=True)) == {(True, "cpu_dense"), (False, "auto")}
    assert (frame["emulation"] == frame["backend"].str.startswith("cpu_")).all()
    assert not records.emulation
    assert records.partly_emulation


# -- published figures -----------------------------------------------------------------------------------


def test_published_ratio_equals_that_of_the_published_files() -> None:
    """Two routes to the same number: the tidy rows shipped, and the files in the original layout."""
    trees = trees_in(PUBLISHED_TREE)
    assert [tree.tag for tree in trees] == ["GB10_cc121_py312_cu129_aarch64"]
    ours = compare.speedups(collect(trees[0]))
    shipped = published.speedups()
    shipped = shipped[(shipped["gpu"] == "GB10") & (shipped["model"] == "BitNet-2B")]
    both = ours.merge(shipped, on=published.KIND, suffixes=("", "_shipped"))
    assert len(both) == len(ours) == 2 * 7 + 4 + 2 * 36
    assert set(both["kind"]) == {"prefill", "decode", "kernel"}
    assert (both["ratio"] / both["ratio_shipped"] - 1).abs().max() < 1e-4


def test_published_rows_support_no_statement() -> None:
    frame = compare.speedups(collect(trees_in(PUBLISHED_TREE)[0]))
    assert not frame["checked"].any()
    assert set(frame["verdict"]) == {"no interval"}


def test_known_published_outliers_are_there() -> None:
    """The brief quotes two: FP8 2:8 prefill at M=32768 is 0.96x of dense on H100 and 0.88x on GB10."""
    frame = published.speedups().query(
        "kind == 'prefill' and model == 'BitNet-2B' and dtype == 'FP8E4M3' and m == 32768"
    )
    for gpu, ratio in (("H100", 0.96), ("GB10", 0.88)):
        assert select(frame, gpu=gpu, sparsity="2:8")["ratio"] == pytest.approx(ratio, abs=0.005)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H100 80GB HBM3", ""),
        ("NVIDIA H200", ""),
        ("NVIDIA A100 80GB PCIe", "A100"),
        ("NVIDIA A100-SXM4-80GB", ""),
        ("NVIDIA GeForce RTX 5080", "RTX5080"),
        ("NVIDIA GB10", "GB10"),
        ("", ""),
    ],
)
def test_same_machine_means_the_same_card(name: str, gpu: str) -> None:
    assert published.same_machine(name) == gpu


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (1.19, 1.21, "reproduced"),
        (1.26, 1.30, "reproduced"),
        (1.2601, 1.30, "higher"),
        (1.10, 1.14, "reproduced"),
        (1.10, 1.1399, "lower"),
        (0.5, 2.0, "reproduced"),
        (float("nan"), float("nan"), "not measured"),
    ],
)
def test_outcome_is_overlap_with_five_percent(low: float, high: float, expected: str) -> None:
    assert published.outcome(1.2, low, high) == expected


def test_only_the_published_backends_are_compared(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.task(writer.plan.tasks[4])
    frame = compare.speedups(collect(writer.tree), published.BASELINE)
    found = published.beside(frame, "H100", ["decode"])
    assert len(found) == 2 * 4 * 4
    assert "not measured" not in set(found["outcome"])
    stock = published.beside(frame.assign(backend="fused"), "H100", ["decode"])
    assert set(stock["outcome"]) == {"not measured"}


def test_published_failures_are_left_out() -> None:
    assert (published.speedups()["ratio"] > 0).all()
    assert published.speedups()["ratio"].map(math.isfinite).all()
