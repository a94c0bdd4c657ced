"""Ratios over the engine's own kernels and over dense: paired where steps ran in turns, said so where they did not."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from fixtures.result_trees import CPU, ENDS, GPU, OVER_STOCK, Writer
from hypothesis import given
from hypothesis import strategies as st
from report_text import block, section, table_under, tables

from slidesparse.report import compare, published
from slidesparse.report.collect import collect
from slidesparse.report.render import render_report
from slidesparse.report.standing import sizes
from slidesparse.result_tree import ResultTree

PREFILL = 3
"""Place of the task."""
HEADING = "Prefill, BitNet-2B INT8"


def paired(name: str, ratio: float, low: float, high: float) -> dict[str, float]:
    return {name: ratio, f"{name}_low": low, f"{name}_high": high}


def variant(sparsity: str, m: int) -> str:
    return f"prefill BitNet-2B-INT8 cusparselt {sparsity} M={m}"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> ResultTree:
    """2:8 loses to stock up to M=2048, cannot be told at 4096 and wins above; 2:10 loses everywhere."""
    writer = Writer(tmp_path_factory.mktemp("stock"), "bitnet-2b-cusparselt", GPU)
    for m in writer.profile.prefill.m:
        low, high = (0.94, 0.96) if m < 4096 else (0.99, 1.02) if m == 4096 else (1.01, 1.03)
        writer.changes[variant("2:8", m)] = paired("over_stock", (low + high) / 2, low, high)
        writer.changes[variant("2:10", m)] = paired("over_stock", 0.9, 0.89, 0.91)
    writer.changes[variant("2:8", 32768)] |= {"verified": "not_checked"}
    writer.changes["prefill BitNet-2B-INT8 vllm M=8192"] = {"status": "failed", "reason": "out of memory"}
    writer.task(writer.plan.tasks[PREFILL])
    writer.environment()
    render_report(writer.tree)
    return writer.tree


@pytest.fixture(scope="module")
def text(tree: ResultTree) -> str:
    return tree.report.read_text()


# -- numbers -------------------------------------------------------------------------------------------


def test_ratios_are_the_rows_own(tree: ResultTree) -> None:
    records = collect(tree)
    frame = compare.over_stock(records)
    same = (frame["dtype"] == "INT8") & (frame["backend"] == "cublaslt") & (frame["m"] == 512)
    (dense,) = (row for _, row in frame[same].iterrows())
    assert (dense["sparsity"], dense["baseline"], dense["paired"]) == ("", "vllm", True)
    assert dense["ratio"] == pytest.approx(OVER_STOCK)
    assert dense["low"] == pytest.approx(OVER_STOCK * ENDS["low"])
    assert not (frame["backend"] == "vllm").any(), "nothing is compared with itself"
    over_dense = compare.speedups(records)
    stock = over_dense[(over_dense["backend"] == "vllm") & (over_dense["m"] == 512)]
    assert stock["ratio"].to_numpy() == pytest.approx(1 / OVER_STOCK)
    assert set(over_dense["baseline"]) == {"auto"}, "the first dense variant of the profile that is not stock"
    assert over_dense["paired"].all()


def test_a_ratio_over_an_unchecked_stock_row_is_unchecked(tree: ResultTree) -> None:
    """At M = 8192 the engine's own kernels failed: that they ran beside the others proves nothing about them."""
    frame = compare.over_stock(collect(tree))
    rows = frame[(frame["dtype"] == "INT8") & (frame["kind"] == "prefill")].groupby("m")["checked"]
    assert rows.any()[8192].tolist() is False
    assert rows.any()[4096].tolist() is True


def test_published_figures_are_met_with_the_dense_side_that_they_have(tree: ResultTree) -> None:
    """`auto` is the better dense side; what was published is against cuBLASLt."""
    records = collect(tree)
    frame = compare.speedups(records, published.BASELINE)
    assert set(frame["baseline"]) == {"cublaslt"}
    row = frame[(frame["dtype"] == "FP8E4M3") & (frame["sparsity"] == "2:8") & (frame["m"] == 512)].iloc[0]
    rows = records.throughput["prefill"].query("dtype == 'FP8E4M3' and m == 512").set_index(["backend", "sparsity"])
    rates = rows["tokens_per_s"]
    assert row["ratio"] == pytest.approx(rates.loc[("cusparselt", "2:8")] / rates.loc[("cublaslt", "")])
    assert not row["paired"]
    assert set(compare.speedups(records, "cpu_dense")["baseline"]) == {"auto"}, "not measured: the first there is"


def test_a_paired_ratio_is_taken_before_that_of_two_medians(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.changes = {
        variant("2:8", 1024): {"tokens_per_s": 99_000.0, **paired("over_dense", 0.97, 0.96, 0.98)},
        variant("2:8", 2048): {"tokens_per_s": 18_000.0, **paired("over_dense", -1.0, -1.0, -1.0)},
    }
    writer.task(writer.plan.tasks[PREFILL])
    frame = compare.speedups(collect(writer.tree))
    rows = frame[(frame["dtype"] == "INT8") & (frame["sparsity"] == "2:8")].set_index("m")
    assert (rows.loc[1024, "ratio"], rows.loc[1024, "verdict"]) == (0.97, "slower")
    assert rows.loc[2048, "ratio"] == pytest.approx(2.0)
    assert list(rows["paired"][[1024, 2048]]) == [True, False]
    writer.environment()
    assert "1 of 42 ratios to dense are of two independent medians: not interleaved." in block(
        render_report(writer.tree).read_text(), HEADING
    )


# -- words ---------------------------------------------------------------------------------------------


def test_each_pattern_stands_in_one_plain_sentence(text: str) -> None:
    said = block(text, HEADING)
    assert (
        "- **cusparselt 2:8**: 0.95 to 1.02 times the rate of stock vLLM (faster at M=16384; **slower** at M=512 to "
        "2048; no difference shown at M=4096; 2 not checked); "
    ) in said
    assert (
        "- **cusparselt 2:10**: 0.90 times the rate of stock vLLM (**slower** at M=512 to 4096, 16384, 32768; 1 not "
        "checked);"
    ) in said
    assert (
        "- **cublaslt**: 1.15 times the rate of stock vLLM (faster at M=512 to 4096, 16384, 32768; 1 not checked"
        in said
    )
    assert (
        "- **auto**: 1.15 times the rate of stock vLLM (faster at M=512 to 4096, 16384, 32768; 1 not checked).\n"
        in said
    ), "the base of the others"
    assert len(re.findall(r"^- \*\*", said, re.M)) == 6
    assert "not interleaved" not in said.lower()


def test_conclusions_and_headline_name_stock(text: str) -> None:
    said = section(text, "Conclusions")
    line = next(line for line in said.splitlines() if line.startswith(f"- {HEADING}, against stock vLLM"))
    assert "**slower at every size measured**: cusparselt 2:10" in line
    assert "depends on the size, or no difference shown: cusparselt 2:8" in line
    assert f"- {HEADING}, times the rate of stock vLLM, all M: auto 1.15, cublaslt 1.15" in text[: text.index("## 1.")]


def test_tables_show_stock_as_a_row_and_as_a_base(text: str) -> None:
    performance, over_stock, over_dense = (table_under(text, HEADING, number) for number in (1, 2, 3))
    assert [row[0] for row in performance[2:5]] == ["vllm", "auto", "cublaslt"]
    failed = performance[0].index("M=8192")
    assert performance[2][failed] == "✗"
    assert over_stock[0][0] == "against vllm"
    assert "bound" not in over_stock[0], "L/(L-2) does not bind a ratio to another pipeline"
    assert {row[0]: row[1] for row in over_stock[2:]}["cusparselt 2:8"] == "▼ 0.95 [0.94, 0.96]"
    assert [row[0] for row in over_dense] == [
        "against auto", "---------------", "vllm", "cublaslt",
        *(f"cusparselt {p}" for p in ("2:4", "2:6", "2:8", "2:10")),
    ]  # fmt: skip
    assert "bound" in over_dense[0]


def test_compile_time_has_a_column_of_its_own(text: str) -> None:
    details = tables(block(text, HEADING))[-1]
    assert details[2][details[0].index("compile, s")] == "31.4"


def test_the_figure_has_a_panel_for_each_base(tree: ResultTree) -> None:
    svg = (tree.figures / "prefill_BitNet-2B-INT8.svg").read_text()
    assert "against stock (vllm)" in svg
    assert "against auto" in svg
    assert "stock time / time" in svg


def test_without_paired_ratios_the_report_says_so(tmp_path: Path) -> None:
    """Stock beside the others, but never in turns with them: no ratio to stock may be shown."""
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    gone = paired("over_stock", -1.0, -1.0, -1.0) | paired("over_dense", -1.0, -1.0, -1.0)
    writer.changes = {str(cell): gone for cell in writer.plan.tasks[PREFILL].cells}
    writer.task(writer.plan.tasks[PREFILL])
    writer.environment()
    said = block(render_report(writer.tree).read_text(), HEADING)
    assert "No ratio over the engine's own kernels: their steps were not interleaved" in said
    assert "**Not interleaved**: the variants were measured one after the other" in said
    assert "against vllm" not in said
    assert "stock vLLM" not in said


def test_old_records_without_these_columns_render(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "smoke", CPU)
    writer.task(writer.plan.tasks[PREFILL])
    writer.environment()
    for path in writer.tree.root.rglob("*_prefill.csv"):
        frame = pd.read_csv(path, keep_default_na=False)
        old = [name for name in frame.columns if not name.startswith("over_") and name != "compile_s"]
        frame[old].to_csv(path, index=False)
    said = block(render_report(writer.tree).read_text(), "Prefill, BitNet-tiny INT8 (emulation)")
    assert "**Not interleaved**" in said
    assert "compile, s" not in said
    assert "times the rate of dense (cpu_dense)" in said


# -- sizes ---------------------------------------------------------------------------------------------


@given(st.sets(st.integers(1, 12), min_size=1), st.data())
def test_sizes_name_every_size_and_no_other(powers: set[int], data: st.DataObject) -> None:
    every = sorted(2**p for p in powers)
    some = sorted(data.draw(st.sets(st.sampled_from(every), min_size=1)))
    said = sizes(some, every)
    named: list[int] = []
    for part in [] if said == "every M" else said.removeprefix("M=").split(", "):
        first, _, last = part.partition(" to ")
        named += [m for m in every if int(first) <= m <= int(last or first)]
    assert (every if said == "every M" else named) == some


def test_decode_has_its_sentences_too(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.task(writer.plan.tasks[PREFILL + 1])
    writer.environment()
    said = block(render_report(writer.tree).read_text(), "Decode, BitNet-2B FP8E4M3")
    assert len(re.findall(r"^- \*\*.*times the rate of stock vLLM", said, re.M)) == 6


def test_graphs_of_decode_steps_have_a_table_where_they_were_timed(tmp_path: Path, text: str) -> None:
    """Time and ratio of each variant; the engine's own has no ratio over itself. Prefill steps are no one graph."""
    assert "ms of a step's graph" not in text
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    for name, ms in (("vllm", 2.5), ("auto", 2.3), ("cusparselt 2:8", 2.0)):
        ratio = {} if name == "vllm" else paired("graph_over_stock", 2.5 / ms, 2.4 / ms, 2.6 / ms)
        writer.changes[f"decode BitNet-2B-INT8 {name} M=64"] = {"graph_ms": ms} | ratio
    writer.task(writer.plan.tasks[PREFILL + 1])
    writer.environment()
    render_report(writer.tree)
    report = writer.tree.report.read_text()
    (graphs,) = (table for table in tables(report) if table[0][0] == "ms of a step's graph")
    assert [row[:2] for row in graphs[2:]] == [
        ["vllm", "2.500"],
        ["auto", "2.300 (1.09 [1.04, 1.13])"],
        ["cusparselt 2:8", "2.000 (1.25 [1.20, 1.30])"],
    ]
    assert graphs[0][1] == "M=64"
    assert [row[2] for row in graphs[2:]] == [""] * 3, "not timed there"
