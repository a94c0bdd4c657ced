"""The rendered report: what a reader must find, must never find, and that it depends on records alone."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from fixtures.result_trees import CPU, GPU, Writer, hardware, smoke
from report_text import section, table_under, tables

from slidesparse import machine, records
from slidesparse.errors import SlideSparseError
from slidesparse.files import write_json
from slidesparse.report.collect import collect
from slidesparse.report.render import render_report
from slidesparse.result_tree import ResultTree
from slidesparse.rows import TuneRow

PUBLISHED_TREE = Path(__file__).parent / "fixtures" / "published"
SECTIONS = [
    "Overall status", "Environment", "Model preparation", "SlideSparse conversion", "Offline tuning",
    "Prefill benchmark", "Decode benchmark", "Where a step's time goes", "Kernel benchmark", "Whole linear layers",
    "What this machine can do", "Checks and quality", "Errors and skips",
    "Full test matrix", "Comparison with published figures", "Other machines", "Conclusions", "Log and status files",
]  # fmt: skip


def snapshot(root: Path) -> dict[str, bytes]:
    files = [root / "report.md", *sorted((root / "figures").iterdir())]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def smoke_tree(tmp_path_factory: pytest.TempPathFactory) -> ResultTree:
    tree = smoke(tmp_path_factory.mktemp("smoke"))
    render_report(tree)
    return tree


@pytest.fixture(scope="module")
def hardware_tree(tmp_path_factory: pytest.TempPathFactory) -> ResultTree:
    tree = hardware(tmp_path_factory.mktemp("hardware"))
    render_report(tree)
    return tree


@pytest.fixture(scope="module")
def smoke_text(smoke_tree: ResultTree) -> str:
    return smoke_tree.report.read_text()


@pytest.fixture(scope="module")
def hardware_text(hardware_tree: ResultTree) -> str:
    return hardware_tree.report.read_text()


# -- same records, same bytes ------------------------------------------------------------------------------


def test_same_records_same_bytes_wherever_and_on_whatever_machine(
    smoke_tree: ResultTree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(smoke_tree.root)
    copy = tmp_path / "elsewhere" / smoke_tree.tag
    shutil.copytree(smoke_tree.root, copy, ignore=shutil.ignore_patterns("report.md", "figures"))

    def looked(*_: object) -> None:
        raise AssertionError("the report looked at the machine")

    monkeypatch.setattr(machine, "detect", looked)
    monkeypatch.setattr(machine, "package_versions", looked)
    render_report(ResultTree(copy, smoke_tree.tag))
    assert snapshot(copy) == before
    assert len(before) == 9, "a report and eight figures"


def test_a_changed_record_changes_the_report_and_stale_figures_go(smoke_tree: ResultTree, tmp_path: Path) -> None:
    copy = tmp_path / smoke_tree.tag
    shutil.copytree(smoke_tree.root, copy)
    tree = ResultTree(copy, smoke_tree.tag)
    before = snapshot(copy)
    shutil.rmtree(copy / "throughput_benchmark_results" / "decode")
    render_report(tree)
    after = snapshot(copy)
    assert after["report.md"] != before["report.md"]
    assert {name for name in before if "decode" in name} == set(before) - set(after)
    assert "Missing: decode results" in after["report.md"].decode()


# -- what every report has -----------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["smoke_text", "hardware_text"])
def test_every_section_is_there_in_order(which: str, request: pytest.FixtureRequest) -> None:
    text: str = request.getfixturevalue(which)
    titles = re.findall(r"^## (\d+)\. (.+)$", text, re.M)
    assert [int(number) for number, _ in titles] == list(range(1, len(SECTIONS) + 1))
    for (_, title), expected in zip(titles, SECTIONS, strict=True):
        assert title.startswith(expected)


@pytest.mark.parametrize("which", ["smoke_text", "hardware_text"])
def test_no_placeholder_ever_shows(which: str, request: pytest.FixtureRequest) -> None:
    text: str = request.getfixturevalue(which)
    for cell in (cell for table in tables(text) for row in table for cell in row):
        assert cell not in ("-1", "-1.0", "nan", "None", "inf", "True", "False"), cell
        assert not re.search(r"(?<![\w.-])(nan|-1(\.0)?)\b", cell), cell
    assert "{{" not in text
    assert "{%" not in text


@pytest.mark.parametrize("which", ["smoke_text", "hardware_text"])
def test_tables_are_whole(which: str, request: pytest.FixtureRequest) -> None:
    """Same number of cells in every row; GitHub wants a blank line before and a rule of dashes second."""
    text: str = request.getfixturevalue(which)
    assert len(tables(text)) > 20
    for table in tables(text):
        assert {len(row) for row in table} == {len(table[0])}
        assert all(re.fullmatch(r"-+:?", cell) for cell in table[1])
        assert len(table) > 2
    assert not re.search(r"^[^|\n].*\n\|", text, re.M), "a table runs into the paragraph before it"


@pytest.mark.parametrize("which", ["smoke_tree", "hardware_tree"])
def test_links_lead_somewhere(which: str, request: pytest.FixtureRequest) -> None:
    tree: ResultTree = request.getfixturevalue(which)
    text = tree.report.read_text()
    figures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)
    assert len(figures) == (10 if which == "hardware_tree" else 8)
    for name in figures:
        assert (tree.root / name).read_text().startswith("<?xml")
    files = re.findall(r"^- `((?:throughput|benchmark)[^`]+\.csv)`$", text, re.M)
    variants = 7 if which == "hardware_tree" else 5
    assert len(files) == 2 * 2 * variants + 2 * 9 + 2
    assert all((tree.root / name).exists() for name in files)


def test_status_counts_and_pipes_in_notes(smoke_text: str) -> None:
    part = section(smoke_text, "Overall status")
    assert "8 succeeded, 1 failed, 0 skipped" in part
    assert any("2 cells \\| failed" in row for row in tables(part)[0])


def test_title_names_the_machine(smoke_text: str, hardware_text: str) -> None:
    assert smoke_text.startswith("# SlideSparse report: Test CPU\n")
    assert hardware_text.startswith("# SlideSparse report: NVIDIA H100 PCIe\n")


# -- marks, failures, noise ------------------------------------------------------------------------------------


def cell_of(text: str, heading: str, table: int, row: str, column: str) -> str:
    found = table_under(text, heading, table)
    return next(line for line in found if line[0] == row)[found[0].index(column)]


def test_a_tick_means_checked(smoke_text: str) -> None:
    heading = "Prefill, BitNet-tiny INT8 (emulation)"
    assert cell_of(smoke_text, heading, 0, "cpu_sparse 2:6", "M=64") == "✓"
    assert cell_of(smoke_text, heading, 0, "cpu_sparse 2:8", "M=64") == "✗"
    assert cell_of(smoke_text, heading, 0, "cpu_sparse 2:8", "M=128") == "○"
    assert cell_of(smoke_text, heading, 0, "cpu_sparse 2:8", "checked") == "1 of 3"
    assert cell_of(smoke_text, heading, 1, "cpu_sparse 2:8", "M=64") == "✗", "no number for a failed cell"
    assert cell_of(smoke_text, heading, 2, "cpu_sparse 2:8", "M=128").endswith("○")
    assert cell_of(smoke_text, "Decode, BitNet-tiny FP8E4M3 (emulation)", 0, "cpu_sparse 2:10", "M=8") == "⊘"


def test_noise_and_host_bound_are_marked(smoke_text: str) -> None:
    assert cell_of(smoke_text, "Prefill, BitNet-tiny FP8E4M3 (emulation)", 1, "cpu_dense", "M=16").endswith("± 21 % †")
    assert cell_of(smoke_text, "Decode, BitNet-tiny INT8 (emulation)", 1, "cpu_dense", "M=2").endswith("‡")
    assert cell_of(smoke_text, "Decode, BitNet-tiny INT8 (emulation)", 2, "cpu_sparse 2:4", "M=2").endswith("‡")


def test_failures_and_skips_say_why(smoke_text: str) -> None:
    rows = tables(section(smoke_text, "Errors and skips"))[0][2:]
    found = {(row[0], row[1], row[2], row[3]): row[4] for row in rows}
    reason = found[("prefill benchmark", "BitNet-tiny INT8 cpu_sparse 2:8", "✗ failed", "M=64")]
    assert reason == r'no kernel for M=64 \| "shape", see \<b\>#3\</b\> and \`this\`'
    assert found[("decode benchmark", "BitNet-tiny FP8E4M3 cpu_sparse 2:10", "⊘ skipped", "M=8")] == "no FP8 here"
    assert ("SlideSparse conversion", "BitNet-tiny FP8E4M3 2:10", "✗ failed", "") in found
    assert len(rows) == 4


def test_matrix_counts_every_planned_cell(smoke_text: str) -> None:
    rows = tables(section(smoke_text, "Full test matrix"))[0][2:]
    found = {tuple(row[:3]): row[3:] for row in rows}
    assert found[("prefill benchmark", "BitNet-tiny", "INT8")] == ["13", "1", "1", "0", "0", "15", "86.7 %"]
    assert found[("kernel, sparse low", "BitNet-tiny", "FP8E4M3")] == ["47", "0", "1", "0", "0", "48", "97.9 %"]
    assert found[("base model preparation", "BitNet-tiny", "INT8")][-1] == "100 %"


def test_cells_that_did_not_run_are_shown_with_the_command(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "smoke", CPU)
    writer.task(writer.plan.tasks[3])
    writer.environment()
    writer.status()
    tree = writer.tree
    next(tree.root.glob("throughput_benchmark_results/prefill/*INT8*/cpu_sparse/2_6/*.csv")).unlink()
    text = render_report(tree).read_text()
    heading = "Prefill, BitNet-tiny INT8 (emulation)"
    assert [cell_of(text, heading, 0, "cpu_sparse 2:6", f"M={m}") for m in (16, 64, 128)] == ["·"] * 3
    assert "Missing: 3 cells of this table. Made by `make prefill PROFILE=smoke`." in text
    rows = {tuple(row[:3]): row[3:] for row in tables(section(text, "Full test matrix"))[0][2:]}
    assert rows[("prefill benchmark", "BitNet-tiny", "INT8")][4:] == ["3", "15", "80.0 %"]
    assert rows[("decode benchmark", "BitNet-tiny", "INT8")][4:] == ["10", "10", "0 %"]
    assert rows[("kernel, dense", "all", "all")][4:] == ["24", "24", "0 %"]


def test_an_empty_tree_says_what_makes_each_table(tmp_path: Path) -> None:
    text = render_report(ResultTree(tmp_path / "X_cc0_py311_cu0_x86_64", "X_cc0_py311_cu0_x86_64")).read_text()
    for stage in ("prepare", "convert", "tune", "prefill", "decode", "kernel", "linear", "calibrate", "all"):
        assert f"Made by `make {stage}`." in text
    assert "nothing can be said about sparsity here" in section(text, "Conclusions")


# -- emulation is never a speed-up ----------------------------------------------------------------------------


def test_emulation_is_never_called_a_speedup(smoke_text: str) -> None:
    own = smoke_text[: smoke_text.index("## 15.")] + smoke_text[smoke_text.index("## 16.") :]
    assert not re.search(r"speed-?up", own, re.I)
    assert "**Emulation.**" in smoke_text[:400]
    assert "Time ratio (emulation)" in own
    assert "is not answered by this machine" in section(smoke_text, "Conclusions")
    assert "faster than dense" not in smoke_text


def test_figures_of_emulation_say_so(smoke_tree: ResultTree) -> None:
    for path in smoke_tree.figures.iterdir():
        svg = path.read_text()
        assert "time ratio (emulation)" in svg, path
        assert not re.search(r"speed-?up", svg, re.I)


def test_failed_rows_do_not_turn_emulation_into_hardware(tmp_path: Path) -> None:
    """A row that failed before it ran has emulation=False by default."""
    writer = Writer(tmp_path, "smoke", CPU)
    writer.changes = {str(cell): {"status": "failed", "reason": "x"} for cell in writer.plan.tasks[3].cells}
    writer.task(writer.plan.tasks[3])
    assert collect(writer.tree).emulation


def test_hardware_and_emulation_in_one_tree_stay_apart(tmp_path: Path) -> None:
    for profile in ("smoke", "bitnet-2b"):
        writer = Writer(tmp_path, profile, GPU)
        writer.task(writer.plan.tasks[4])
        writer.environment()
    text = render_report(writer.tree).read_text()
    assert "### Decode, BitNet-tiny INT8 (emulation)" in text
    assert "### Decode, BitNet-2B INT8\n" in text
    assert "Some tables below are marked **(emulation)**" in text
    assert "is not answered by this machine" not in text


# -- conclusions and comparison ---------------------------------------------------------------------------------


def test_losses_are_said_plainly(hardware_text: str) -> None:
    lines = [
        line
        for line in section(hardware_text, "Conclusions").splitlines()
        if line.startswith("- Kernel, BitNet-2B INT8")
    ]
    assert len(lines) == 1
    wins, _, losses = lines[0].partition("**sparse loses at every size measured**: ")
    assert "faster than dense at every size measured: cusparselt 2:4" in wins
    assert "cusparselt 2:inf" in losses
    assert "2:4" not in losses


def test_a_ratio_above_its_bound_is_questioned(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    over = {"speedup": 2.2, "speedup_low": 2.1, "speedup_high": 2.3}
    writer.changes = {"BitNet-2B-INT8 cusparselt 2:8 o M=1024 N=2560 K=2560": over}
    writer.task(writer.plan.tasks[6])
    text = section(render_report(writer.tree).read_text(), "Conclusions")
    assert "above the bound, which sparse hardware cannot explain" in text
    assert "cusparselt 2:8 (1 of 36)" in text


def test_the_same_gpu_is_compared_cell_by_cell(hardware_text: str) -> None:
    part = section(hardware_text, "Comparison with published figures")
    assert "This machine is the published H100" in part
    summary = next(table for table in tables(part) if "reproduced" in table[0])
    rows = {tuple(row[:3]): [int(cell) for cell in row[3:]] for row in summary[2:]}
    assert rows[("kernel", "BitNet-2B", "INT8")][-1] == 288
    assert all(sum(row[:-1]) == row[-1] for row in rows.values())
    total = sum(row[-1] for row in rows.values())
    assert f"Of {total} speed-ups published for this GPU (H100)" in section(hardware_text, "Conclusions")


def test_another_gpu_is_put_side_by_side(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b-cusparselt", GPU)
    writer.machine.gpu["name"], before = "NVIDIA H200", writer.machine.gpu["name"]  # type: ignore[index]
    try:
        writer.task(writer.plan.tasks[4])
        writer.environment()
    finally:
        writer.machine.gpu["name"] = before  # type: ignore[index]
    part = section(render_report(writer.tree).read_text(), "Comparison with published figures")
    assert "No figures are published for this GPU. Side by side:" in part
    decode = next(t for t in tables(part) if t[0][-1] == "M=512" and len(t[0]) == 7)
    assert {row[1] for row in decode[2:]} == {"A100", "H100", "RTX5080", "GB10", "**here**, cusparselt"}


def test_other_machines_stand_beside(hardware_tree: ResultTree, tmp_path: Path) -> None:
    copy = tmp_path / "reports" / hardware_tree.tag
    shutil.copytree(hardware_tree.root, copy)
    text = render_report(ResultTree(copy, hardware_tree.tag), [PUBLISHED_TREE]).read_text()
    part = section(text, "Other machines")
    table = tables(part[part.index("### Decode, BitNet-2B INT8, by machine") :])[0]
    rows = {row[2]: row for row in table[2:4]}
    assert set(rows) == {"H100_cc90, cusparselt", "GB10_cc121, cusparselt"}
    assert rows["GB10_cc121, cusparselt"][4] == "1.22 ○"
    assert "Prefill, BitNet-2B INT8: only H100_cc90" in part


def test_a_folder_without_results_is_refused(hardware_tree: ResultTree, tmp_path: Path) -> None:
    for folder, problem in ((tmp_path, "no benchmark results"), (tmp_path / "x", "no such folder")):
        with pytest.raises(SlideSparseError, match=problem):
            render_report(hardware_tree, [folder])


# -- odd records -------------------------------------------------------------------------------------------------


def test_unreadable_files_are_reported_not_fatal(tmp_path: Path) -> None:
    tree = Writer(tmp_path, "smoke", CPU)
    tree.task(tree.plan.tasks[3])
    broken = next(tree.tree.root.glob("throughput_benchmark_results/prefill/*INT8*/cpu_sparse/2_6/*.csv"))
    broken.write_text("a,b\n1\n")
    tree.tree.status.write_text("{")
    tree.tree.prepare.parent.mkdir()
    tree.tree.prepare.write_text("model,dtype\nx,\n")
    write_json(tree.tree.environment, {"profile_config": {"models": []}})
    text = section(render_report(tree.tree).read_text(), "Errors and skips")
    assert re.search(r"2\\?_6/BitNet-tiny-INT8_prefill.csv: line 2: 1 fields under 2 columns", text)
    assert "status.json: not JSON" in text
    assert "environment.json: profile\\_config" in text or "environment.json: profile_config" in text


def test_a_published_tree_renders_with_failures_as_failures(tmp_path: Path) -> None:
    root = tmp_path / "GB10_cc121_py312_cu129_aarch64"
    shutil.copytree(PUBLISHED_TREE, root)
    path = next(root.glob("throughput_benchmark_results/prefill/*/cusparselt/2_8/*.csv"))
    path.write_text(re.sub(r"^(512,.*?,128,128,).*$", r"\1-1,-1,-1", path.read_text(), flags=re.M))
    text = render_report(ResultTree(root, root.name)).read_text()
    assert "the published file has -1 here" in section(text, "Errors and skips")
    assert cell_of(text, "Prefill, BitNet-2B FP8E4M3", 0, "cusparselt 2:8", "M=512") == "✗"
    assert cell_of(text, "Prefill, BitNet-2B FP8E4M3", 0, "cusparselt 2:8", "M=1024") == "○"
    assert "nothing can be said about sparsity here" in section(text, "Conclusions")


def test_tuning_shows_the_newest_candidates_of_a_cell(tmp_path: Path) -> None:
    """Tuned again under other conditions, with fewer candidates: the old set must not mix in."""
    tree = ResultTree(tmp_path, "X_cc0_py311_cu0_x86_64")
    from slidesparse.dtypes import DType

    def row(algorithm: str, latency: float, **changes: object) -> TuneRow:
        cell = {"granularity": "fine", "operation": "sparse_gemm", "backend": "cpu_sparse", "sparsity": "2:8", "M": 4}
        cell |= {
            "N": 8,
            "K": 16,
            "alg_id": 0,
            "run_id": "r",
            "fingerprint": "new",
            "time_utc": "2026-02-02T00:00:00+00:00",
        }
        values = {"algorithm": algorithm, "lat_us": latency, "verified": "exact", "samples": 5, "stop": "interval"}
        return TuneRow.model_validate(cell | values | changes)

    old = {"fingerprint": "old", "time_utc": "2026-01-01T00:00:00+00:00"}
    path = tree.tune("m", DType.INT8)
    records.append(path, [row("", -1.0, status="failed", reason="boom", verified="not_checked")])
    records.append(path, [row("gone", 1.0, winner=True, **old), row("dot", 50.0, **old)])
    records.append(path, [row("dot", 30.0), row("axpy", 10.0, winner=True)])
    frame = collect(tree).tune
    assert sorted(frame["algorithm"]) == ["axpy", "dot"]
    table = tables(section(render_report(tree).read_text(), "Offline tuning"))[0]
    assert table[2][:8] == ["sparse gemm", "cpu_sparse 2:8", "fine", "1", "2", "`axpy`", "2.00x", "2.00x"]


def test_tuning_says_how_many_candidates_there_were(hardware_text: str) -> None:
    """Sparse GEMM: 3 rows of cells with 40 candidates, since only the leaders of a first look get one."""
    table = tables(section(hardware_text, "Offline tuning"))[0]
    shown = {row[0]: row[4] for row in table[2:]}
    assert shown["sparse gemm"] == "3 of 40"
    assert shown["dense gemm"] == "3"
