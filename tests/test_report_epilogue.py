"""The kernel section of a backend whose GEMM has its epilogue: beside two kernels, apart from the other ratios."""

from __future__ import annotations

from pathlib import Path

from fixtures.result_trees import GPU, Writer
from report_text import block

from slidesparse.report.render import render_report

KERNEL_HIGH = 6
"""Place of the task."""
HEADING = "Kernel, BitNet-2B INT8"
WORDS = "over the library's sparse GEMM and a second kernel for it, paired"


def test_ratios_to_two_kernels_have_a_table_of_their_own(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-fused", GPU)
    figures = {"over_two_kernels": 1.42, "over_two_kernels_low": 1.40, "over_two_kernels_high": 1.44}
    for m in (64, 512):
        writer.changes[f"BitNet-2B-INT8 fused 2:8 o M={m} N=2560 K=2560"] = {"two_kernels_us": 9.0, **figures}
    writer.task(writer.plan.tasks[KERNEL_HIGH])
    writer.environment()
    said = block(render_report(writer.tree).read_text(), HEADING)
    table = said[said.index(WORDS) :].split("\n\n")[1].splitlines()
    assert len(table) == 3, "the one line that has any"
    assert "fused 2:8" in table[2]
    assert table[2].count("1.42 [1.40, 1.44]") == 2


def test_without_such_rows_there_is_no_table(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b", GPU)
    writer.task(writer.plan.tasks[KERNEL_HIGH])
    writer.environment()
    assert WORDS not in render_report(writer.tree).read_text()
