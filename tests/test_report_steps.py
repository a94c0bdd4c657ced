"""Where a step's time goes: categories and bounds in the report are those of the records, worked out by hand here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from fixtures.result_trees import COPY_GB_S, CPU, DENSE_TOPS, GPU, SPARSE_GAIN, STAMP, Writer
from report_text import block, section, table_under, tables

from slidesparse import records
from slidesparse.dtypes import DType
from slidesparse.measure import step_categories as c
from slidesparse.measure.step_profile import KernelTime, StepProfile, step_rows
from slidesparse.pattern import Sparsity
from slidesparse.plan import ThroughputCell
from slidesparse.report.attainable import Attainable
from slidesparse.report.collect import collect
from slidesparse.report.profiled import profiled
from slidesparse.report.render import render_report
from slidesparse.report.view import View
from slidesparse.result_tree import ResultTree

TITLE = "Where a step's time goes"
HEADING = "Prefill step, BitNet-2B INT8, M=16,384"


@pytest.fixture(scope="module")
def writer(tmp_path_factory: pytest.TempPathFactory) -> Writer:
    made = Writer(tmp_path_factory.mktemp("steps"), "bitnet-2b-cusparselt", GPU)
    made.task(made.plan.tasks[3])
    made.task(made.plan.tasks[-1])
    made.steps()
    made.environment()
    render_report(made.tree)
    return made


@pytest.fixture(scope="module")
def text(writer: Writer) -> str:
    return writer.tree.report.read_text()


def column(table: list[list[str]], name: str) -> dict[str, str]:
    place = table[0].index(name)
    return {row[0]: row[place] for row in table[2:]}


def number(cell: str) -> float:
    return float(re.split(r" [(/]", cell)[0].replace(",", ""))


# -- times ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["vllm", "cublaslt", "cusparselt 2:8"])
def test_categories_add_up_to_the_step(text: str, variant: str) -> None:
    times = column(table_under(text, HEADING, 0), variant)
    measured, whole = times.pop("whole step, as measured"), number(times.pop("whole step, profiled"))
    shares = [float(cell.split("(")[1].removesuffix(" %)")) for cell in times.values() if cell]
    assert sum(number(cell) for cell in times.values() if cell) == pytest.approx(whole, rel=2e-3)
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert number(measured) > 0


def test_stock_has_a_kernel_each_and_ours_one_for_all(text: str) -> None:
    table = table_under(text, HEADING, 0)
    stock, dense = column(table, "vllm"), column(table, "cublaslt")
    assert all(stock[name] and not dense[name] for name in (c.QUANTISE, c.NORM, c.GATE))
    assert all(dense[name] and not stock[name] for name in (c.FUSED, c.DEQUANTISE))
    assert c.COMMUNICATION not in stock, "a category without kernels has no line"


def test_steps_are_those_of_the_profile(text: str) -> None:
    titles = re.findall(r"^### (.* step, .*)$", section(text, TITLE), re.M)
    assert titles == [
        f"{phase} step, BitNet-2B {dtype}, M={m}"
        for dtype in ("INT8", "FP8E4M3")
        for phase, sizes in (("Prefill", ("512", "1,024", "2,048", "16,384")), ("Decode", ("64", "128", "256", "512")))
        for m in sizes
    ]


def test_kernels_alone_are_the_step_without_its_idle_time(text: str) -> None:
    """Of every profiled step, and their ratio to stock vLLM's: what a variant is worth where the host is slow."""
    busy = next(table for table in tables(section(text, TITLE)) if table[0][0] == "µs of kernels")
    for heading, line in ((HEADING, "prefill, M=16,384"), ("Decode step, BitNet-2B INT8, M=64", "decode, M=64")):
        times = table_under(text, heading, 0)
        stock = 0.0
        for name in ("vllm", "cublaslt", "cusparselt 2:8"):
            own = column(times, name)
            expected = number(own["whole step, profiled"]) - number(own.get(c.IDLE) or "0")
            found = column(busy, name)[line]
            assert number(found) == pytest.approx(expected, rel=2e-3)
            stock = stock or expected
            if name != "vllm":
                assert float(found.split("(")[1].rstrip(")")) == pytest.approx(stock / expected, abs=0.006)


# -- bounds --------------------------------------------------------------------------------------------


def test_bounds_by_hand(writer: Writer) -> None:
    """INT8 at M=16384 on the made-up machine: COPY_GB_S, DENSE_TOPS and SPARSE_GAIN times as much with 2:4."""
    steps = next(s for _, dtype, parts in profiled(View(collect(writer.tree))) if dtype == "INT8"
                 for s in parts if (s.phase, s.m) == ("prefill", 16384))  # fmt: skip
    by_name = {step.name: step.bounds for step in steps.variants}
    shapes, m, copy = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)], 16384, COPY_GB_S * 1e3
    tops = DENSE_TOPS[DType.INT8] * 1e6
    dense = 30 * sum(max(2 * m * n * k / tops, (m * k + n * k + 2 * m * n) / copy) for n, k in shapes)
    assert by_name["vllm"][c.LINEAR] == pytest.approx(dense)
    assert by_name["cublaslt"][c.LINEAR] == pytest.approx(dense)
    lifted = [(n, Sparsity(8).lifted_k(k)) for n, k in shapes]
    sparse = 30 * sum(
        max(2 * m * n * k / (tops * SPARSE_GAIN), (m * k + n * (k // 2 + k // 8) + 2 * m * n) / copy) for n, k in lifted
    )
    assert by_name["cusparselt 2:8"][c.LINEAR] == pytest.approx(sparse)
    half = DENSE_TOPS[DType.BF16] * 1e6
    causal = 30 * 16 * (1024 * 1025 // 2) * 4 * 20 * 128
    assert by_name["vllm"][c.ATTENTION] == pytest.approx(causal / half)
    head = max(2 * 16 * 128256 * 2560 / half, 2 * (16 * 2560 + 128256 * 2560 + 16 * 128256) / copy)
    assert by_name["cusparselt 2:8"][c.HEAD] == pytest.approx(head), "the output layer is never sparse"
    assert by_name["vllm"][c.CACHE] == pytest.approx(30 * m * 4 * 3840 / copy)
    row = records.read(writer.tree.step_profile("BitNet-2B", DType.INT8)).set_index(["M", "backend", "category"])
    between = row["bytes_moved"].loc[(16384, "vllm", c.NORM)]
    assert by_name["vllm"][c.BETWEEN] == by_name["cublaslt"][c.BETWEEN] == pytest.approx(float(between) / copy)
    assert by_name["cusparselt 2:8"][c.BETWEEN] > by_name["vllm"][c.BETWEEN]
    assert not {c.SAMPLING, c.REST, c.IDLE} & set(by_name["vllm"])


def test_a_bound_of_work_that_is_no_product() -> None:
    rates = Attainable(4000.0, {("BF16", False): 800.0})
    assert rates.roofline(8_000_000) == pytest.approx(2.0)
    assert rates.roofline(8_000_000, 800_000_000, "BF16") == pytest.approx(2.0)
    assert rates.roofline(8_000_000, 4_000_000_000, "BF16") == pytest.approx(5.0)
    assert rates.roofline(8_000_000, 1, "FP16") is None
    assert Attainable().roofline(8_000_000) is None


def test_the_distance_is_told_part_by_part(writer: Writer, text: str) -> None:
    """The parts that the sentence names, and those too small for it, make up the distance."""
    steps = next(s for _, dtype, parts in profiled(View(collect(writer.tree))) if dtype == "INT8"
                 for s in parts if (s.phase, s.m) == ("prefill", 16384))  # fmt: skip
    line = next(line for line in block(text, HEADING).splitlines() if line.startswith("- **cublaslt**"))
    step = steps.variants[2]
    assert f"{step.over:.2f} times the sum of its bounds" in line
    beyond, _, against = line.partition(" Against vllm ")
    named = [float(value.replace(",", "").replace("−", "-")) for value in re.findall(r"[+−][\d,.]+\d", beyond)]
    assert sum(named) == pytest.approx(step.whole_us - sum(step.bounds.values()), abs=0.02 * step.whole_us)
    assert against.startswith("−6,144 µs: between the products −6,144.")
    bounds = column(table_under(text, HEADING, 1), "cublaslt")
    assert list(bounds) == [c.LINEAR, c.BETWEEN, c.ATTENTION, c.CACHE, c.HEAD, "these together"]
    assert bounds["these together"].endswith(
        f"= {sum(step.groups[g] for g in step.bounds) / sum(step.bounds.values()):.2f}"
    )


def test_conclusions_say_how_far_the_largest_steps_are(text: str) -> None:
    said = section(text, "Conclusions")
    assert re.search(
        r"- Prefill step, BitNet-2B INT8, M=16,384, over the sum of its own bounds: vllm 1\.\d\d, auto", said
    )
    assert "M=1,024, over the sum" not in said


def test_without_rates_there_are_times_and_no_bounds(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.steps()
    writer.environment()
    said = section(render_report(writer.tree).read_text(), TITLE)
    assert "whole step, as measured" not in said, "no throughput row either"
    assert "How far the parts are from what this machine can attain is unmeasured. Missing: rates" in said
    assert "Time over its bound" not in said
    assert "sum of its bounds" not in said
    assert "**cublaslt**: 63,363 µs. Against vllm" in said


# -- what is hidden, missing, figure -------------------------------------------------------------------


def test_unknown_kernels_are_shown_by_name(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    cell = next(c for c in writer.plan.tasks[3].cells if isinstance(c, ThroughputCell) and c.m == 16384)
    kernels = (KernelTime("new|kernel<`x`>", 300.0, 2), *(KernelTime(f"other_{i}", 9.0, 1) for i in range(7)))
    columns = STAMP | {"engine": "vllm", "path": "p"}
    rows = step_rows(StepProfile(kernels, 1000.0), cell, writer.plan.bench.models["BitNet-2B"], 1024, columns)
    records.append(writer.tree.step_profile("BitNet-2B", DType.INT8), rows)
    said = block(render_report(writer.tree).read_text(), HEADING)
    assert "- Rest, vllm: `new|kernel<'x'>` 300.0 µs in 2; `other_0` 9.0 µs in 1;" in said
    assert "and 2 more kernels" in said
    assert ["vllm", "rest", r"`new\|kernel<'x'>`", "300.0", "2", "30.0 %"] in tables(said)[-1]


def test_a_step_profiled_again_replaces_the_old_one(writer: Writer, tmp_path: Path) -> None:
    tree = ResultTree(tmp_path, writer.tree.tag)
    path = tree.step_profile("BitNet-2B", DType.INT8)
    cell = next(c for c in writer.plan.tasks[3].cells if isinstance(c, ThroughputCell) and c.m == 16384)
    model, columns = writer.plan.bench.models["BitNet-2B"], STAMP | {"engine": "vllm", "path": "p"}
    for name, us in (("vllm::rms_norm_kernel", 50.0), ("flash_fwd_kernel", 70.0)):
        records.append(path, step_rows(StepProfile((KernelTime(name, us, 1),), 100.0), cell, model, 1024, columns))
    ((_, _, [steps]),) = list(profiled(View(collect(tree))))
    (step,) = steps.variants
    assert {name: us for name, us in step.groups.items() if us} == {c.ATTENTION: 70.0, c.IDLE: 30.0}


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        ("smoke", "Unmeasured: the backends of this profile run on the CPU, where no GPU kernel runs."),
        ("bitnet-2b", "Unmeasured: no step was profiled. Missing: profiled steps (`step_profile/`). Made by `make pre"),
    ],
)
def test_without_records_one_line_says_why(profile: str, reason: str, tmp_path: Path) -> None:
    writer = Writer(tmp_path, profile, GPU if profile == "bitnet-2b" else CPU)
    writer.environment()
    said = section(render_report(writer.tree).read_text(), TITLE)
    assert said.strip().splitlines()[-1].startswith(reason)
    assert not tables(said)


def test_steps_that_are_missing_are_counted(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.steps()
    writer.environment()
    path = writer.tree.step_profile("BitNet-2B", DType.FP8)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith("decode,512,cusparselt,2:8")))
    assert "Missing: 1 of the planned steps. Made by `make prefill PROFILE=bitnet-2b-cusparselt`." in section(
        render_report(writer.tree).read_text(), TITLE
    )


def test_the_figure_stacks_categories_and_marks_the_bounds(writer: Writer, text: str) -> None:
    assert "(figures/steps_BitNet-2B-INT8.svg)" in section(text, TITLE)
    svg = (writer.tree.figures / "steps_BitNet-2B-INT8.svg").read_text()
    for label in (c.LINEAR, c.FUSED, c.QUANTISE, c.IDLE, "sum of the bounds", "cusparselt 2:8", "Decode, M=512"):
        assert label in svg
    assert c.COMMUNICATION not in svg
