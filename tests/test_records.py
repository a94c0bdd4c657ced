"""Result tables: what a run may lose (nothing that was recorded), what a reader may see (whole files only)."""

from __future__ import annotations

import csv
import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidesparse import records
from slidesparse.dtypes import DType
from slidesparse.errors import RecordError
from slidesparse.files import PARTIAL
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.result_tree import ResultTree
from slidesparse.rows import DecodeRow, KernelDenseRow, KernelRow, PrefillRow, Row, TuneRow

PUBLISHED = Path(__file__).parent / "fixtures" / "published"
TAG = "GB10_cc121_py312_cu129_aarch64"
STAMP = {"fingerprint": "f0", "run_id": "r1", "time_utc": "2026-01-28T10:00:00+00:00"}


def prefill(m: int, **changes: object) -> PrefillRow:
    values = {
        "M_prefill": m, "prompt_len": 64, "max_num_seqs": 1, "num_prompts": 4, "N_prefill": 4, "requests_per_s": 2.5,
        "tokens_per_s": 162.5, "elapsed_time_s": 1.6, "model": "tiny", "dtype": "INT8", "backend": "cpu_dense",
    }  # fmt: skip
    return PrefillRow.model_validate(values | STAMP | changes)


def decode() -> DecodeRow:
    return DecodeRow(
        M_decode=64, prompt_len=16, max_num_seqs=64, num_prompts=64, N_decode=8, output_len=8,
        model="t", dtype="INT8", backend="b", **STAMP,
    )  # fmt: skip


def kernel(kind: type[KernelRow] = KernelRow, **changes: object) -> KernelRow:
    return kind.model_validate({"M": 64, "N": 96, "K": 128, "K_model": 96, "backend": "b", **STAMP, **changes})


# -- two tables put together ----------------------------------------------------------------------------


def test_rows_of_both_stand_by_time_and_keep_their_order(tmp_path: Path) -> None:
    """Our second 2 was written with an older time than the row before it, as happens within a tuned cell."""
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    for path, rows in (
        (ours, ((1, "T1"), (2, "T3"), (2, "T2"), (4, "T5"))),
        (theirs, ((2, "T2"), (1, "T4"), (4, "T4"))),
    ):
        records.append(path, [prefill(m, time_utc=time, requests_per_s=float(m)) for m, time in rows], [path.stem])
    text = records.merged(ours, theirs, PrefillRow)
    assert text is not None
    ours.write_text(text)
    frame = records.read(ours)
    assert list(zip(frame["M_prefill"], frame["time_utc"], strict=True)) == [
        (1, "T1"), (2, "T3"), (2, "T2"), (1, "T4"), (4, "T4"), (4, "T5"),
    ]  # fmt: skip
    assert text.startswith("# ours\n")
    assert records.merged(ours, theirs, PrefillRow) is None, "the second time nothing is missing"
    assert records.merged(theirs, ours, PrefillRow) is not None


def test_a_new_table_is_the_other_one(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs.csv"
    records.append(theirs, [prefill(64), prefill(128)], ["GPU: none"])
    assert records.merged(tmp_path / "ours.csv", theirs, PrefillRow) == theirs.read_text()


def test_columns_of_older_versions_are_added_and_unknown_ones_refused(tmp_path: Path) -> None:
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    records.append(ours, [prefill(64)])
    old = pd.read_csv(ours, dtype=str, keep_default_na=False).drop(columns=["peak_rss_mib"])
    old.assign(M_prefill="128").to_csv(theirs, index=False)
    text = records.merged(ours, theirs, PrefillRow)
    assert text is not None
    assert text.splitlines()[:2] == ours.read_text().splitlines()
    old.assign(surprise="1").to_csv(theirs, index=False)
    with pytest.raises(RecordError, match=r"theirs\.csv: unknown columns surprise"):
        records.merged(ours, theirs, PrefillRow)


# -- the columns that either side reads --------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "published"),
    [
        (prefill(64), "throughput_benchmark_results/prefill/*FP8*/cublaslt/BitNet-2B-FP8_prefill.csv"),
        (decode(), "throughput_benchmark_results/decode/*INT8*/cublaslt/BitNet-2B-INT8_decode.csv"),
        (kernel(), f"benchmark_kernel/cuSPARSELt/*/{TAG}/FP8/alg_search_BitNet-2B-INT8_2_8.csv"),
        (kernel(KernelDenseRow), f"benchmark_kernel/cuBLASLt/*/{TAG}/FP8/alg_search_BitNet-2B-INT8.csv"),
    ],
    ids=["prefill", "decode", "kernel", "kernel_dense"],
)  # fmt: skip
def test_leading_columns_are_those_of_the_published_files(tmp_path: Path, row: Row, published: str) -> None:
    path = tmp_path / "ours.csv"
    records.append(path, [row], header=["GPU: none"])
    theirs = list(pd.read_csv(next(PUBLISHED.glob(published)), comment="#").columns)
    ours = list(pd.read_csv(path, comment="#").columns)
    assert ours[: len(theirs)] == theirs
    assert "verified" in ours[len(theirs) :]
    assert "path" in ours[len(theirs) :]


def test_a_reader_of_published_files_reads_ours(tmp_path: Path) -> None:
    path = tmp_path / "ours.csv"
    reason = 'shape (64, 96): "no algorithm", see # 3\nsecond line'
    failed = {"status": "failed", "reason": reason, "tokens_per_s": -1.0}
    records.append(path, [prefill(64), prefill(128, **failed)], header=["GPU: none"])
    frame = pd.read_csv(path, comment="#")
    assert frame["M_prefill"].tolist() == [64, 128]
    assert frame["tokens_per_s"].tolist() == [162.5, -1.0]
    assert frame["reason"].tolist()[1] == reason


def test_published_kernel_file_is_read_with_its_quirks() -> None:
    path = PUBLISHED / f"benchmark_kernel/cuSPARSELt/alg_search_results/{TAG}/FP8/alg_search_BitNet-2B-INT8_2_8.csv"
    frame = records.read(path)
    reference = pd.read_csv(path, comment="#")
    assert len(frame) == 36
    for name in reference.columns:
        assert frame[name].astype(float).equals(reference[name].astype(float)), name
    assert sorted(frame["K"].unique()) == [Sparsity(8).lifted_k(2560), Sparsity(8).lifted_k(6912)]


def test_published_blanks_are_missing_not_minus_one(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text("# GPU: x\r\nM,N,K,alg_count,tops_1,lat_us_1\r\n64,96,128,2,1.5,-1\r\n64,96,256,,,\r\n")
    frame = records.read(path)
    assert frame["lat_us_1"].tolist()[0] == -1
    assert frame["tops_1"].isna().tolist() == [False, True]


def test_tree_has_the_published_places() -> None:
    tree = ResultTree(PUBLISHED, TAG)
    sparse = Variant("cusparselt", Sparsity(8))
    for dtype, phase in ((DType.FP8, "prefill"), (DType.INT8, "decode")):
        assert tree.throughput(phase, "BitNet-2B", dtype, Variant("cublaslt")).exists()  # type: ignore[arg-type]
    assert tree.throughput("prefill", "BitNet-2B", DType.FP8, sparse).exists()
    name = tree.kernel("BitNet-2B", DType.INT8, sparse).relative_to(PUBLISHED).as_posix()
    assert name == f"benchmark_kernel/cuSPARSELt/alg_search_results/{TAG}/INT8/alg_search_BitNet-2B-INT8_2_8.csv"


# -- append, read, resume ----------------------------------------------------------------------------

AWKWARD = ["a, b", 'he said "no"', "two\nlines", "two\r\nlines", "bare\rreturn", "# not a comment", "x\n# nor this",
           "-1", "nan", "NA", "True", " padded ", "\u2028 separator", "ünïcode"]  # fmt: skip


@pytest.mark.parametrize("reason", AWKWARD)
def test_reason_comes_back_as_written(tmp_path: Path, reason: str) -> None:
    path = tmp_path / "t.csv"
    records.append(path, [prefill(64, status="failed", reason=reason)], header=["GPU: x"])
    records.append(path, [prefill(128)])
    records.append(path, [prefill(256, status="skipped", reason=reason)])
    assert records.read(path)["reason"].tolist() == [reason, "", reason]
    assert path.read_text().splitlines()[0] == "# GPU: x"


@settings(max_examples=60, deadline=None)
@given(reasons=st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=30), min_size=1, max_size=4))
def test_any_text_round_trips(tmp_path_factory: pytest.TempPathFactory, reasons: list[str]) -> None:
    path = tmp_path_factory.mktemp("records") / "t.csv"
    for number, reason in enumerate(reasons):
        records.append(path, [prefill(number, reason=reason)])
    assert records.read(path)["reason"].tolist() == reasons


@settings(max_examples=40, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_keep_every_bit(tmp_path_factory: pytest.TempPathFactory, value: float) -> None:
    path = tmp_path_factory.mktemp("records") / "t.csv"
    records.append(path, [prefill(1, tokens_per_s=value)])
    assert records.read(path)["tokens_per_s"].tolist() == [value]


def test_nan_is_written_as_a_blank(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    records.append(path, [prefill(1, tokens_per_s=float("nan"))])
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert rows[0]["tokens_per_s"] == ""


def test_types_come_back(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    records.append(path, [prefill(1, host_bound=True, emulation=True), prefill(2)])
    frame = records.read(path)
    assert frame["host_bound"].tolist() == [True, False]
    assert frame["host_bound"].dtype == bool
    assert pd.api.types.is_integer_dtype(frame["M_prefill"])
    assert frame["sparsity"].tolist() == ["", ""]


def test_the_last_row_of_a_cell_counts_in_first_seen_order(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    records.append(path, [prefill(64, status="failed"), prefill(128)])
    records.append(path, [prefill(64, tokens_per_s=7.0)])
    frame = records.latest(records.read(path), PrefillRow.KEY)
    assert frame["M_prefill"].tolist() == [64, 128]
    assert frame["tokens_per_s"].tolist() == [7.0, 162.5]
    assert list(frame.columns) == PrefillRow.columns()
    assert records.latest(pd.DataFrame(), PrefillRow.KEY).empty


@pytest.mark.parametrize(
    ("last", "done"),
    [
        ({"status": "ok"}, True),
        ({"status": "skipped"}, True),
        ({"status": "failed"}, False),
        ({"status": "ok", "fingerprint": "f1"}, False),
    ],
)
def test_is_done_looks_at_the_last_row(tmp_path: Path, last: dict[str, object], done: bool) -> None:
    path = tmp_path / "t.csv"
    before = {"status": "failed"} if done else {}
    records.append(path, [prefill(64, **before), prefill(64, **last), prefill(128)])
    assert records.is_done(path, PrefillRow, {"M_prefill": 64}, "f0") is done


def test_is_done_knows_other_cells_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    assert not records.is_done(path, PrefillRow, {"M_prefill": 64}, "f0")
    records.append(path, [prefill(64)])
    assert not records.is_done(path, PrefillRow, {"M_prefill": 128}, "f0")
    with pytest.raises(ValueError, match="no column M_decode"):
        records.is_done(path, PrefillRow, {"M_decode": 64}, "f0")


def test_a_published_file_never_counts_as_done() -> None:
    path = PUBLISHED / "throughput_benchmark_results/decode/GB10_cc121_INT8_py312_cu129_aarch64/cublaslt"
    assert not records.is_done(path / "BitNet-2B-INT8_decode.csv", DecodeRow, {"M_decode": 64}, "f0")


def test_tune_key_with_several_columns(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    common = {"granularity": "fine", "operation": "sparse_gemm", "backend": "cpu_sparse", "M": 4, "N": 8, "K": 16}
    rows = [
        TuneRow.model_validate(common | STAMP | {"sparsity": s, "algorithm": a, "alg_id": 0})
        for s in ("2:4", "2:8")
        for a in ("dot", "axpy")
    ]
    records.append(path, rows[:3])
    key = common | {"sparsity": "2:8"}
    assert records.is_done(path, TuneRow, key | {"algorithm": "dot"}, "f0")
    assert not records.is_done(path, TuneRow, key | {"algorithm": "axpy"}, "f0")


# -- files of other versions, broken files -----------------------------------------------------------


def test_an_older_file_with_fewer_columns_is_extended(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("# GPU: x\nM_prefill,tokens_per_s,status,fingerprint\n64,11.5,ok,f0\n")
    records.append(path, [prefill(128, host_bound=True)])
    frame = records.read(path)
    assert list(frame.columns) == PrefillRow.columns()
    assert frame["tokens_per_s"].tolist() == [11.5, 162.5]
    assert frame["host_bound"].tolist() == [False, True]
    assert frame["reason"].tolist() == ["", ""]
    assert frame["requests_per_s"].isna().tolist() == [True, False]
    assert records.is_done(path, PrefillRow, {"M_prefill": 64}, "f0")


def test_unknown_columns_are_refused_and_the_file_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    text = "M_prefill,colour\n64,red\n"
    path.write_text(text)
    with pytest.raises(RecordError, match=r"t\.csv: unknown columns colour.*move it aside"):
        records.append(path, [prefill(128)])
    assert path.read_text() == text
    assert records.read(path)["M_prefill"].tolist() == [64]


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "no column names"),
        (b"# only a header\n", "no column names"),
        (b"a,b\n1,2\n3\n", "line 3: 1 fields under 2 columns"),
        (b"# x\na,b\n1,2,3\n", "line 3: 3 fields under 2 columns"),
        (b"a,b\n\xff\xfe,2\n", "not a result table"),
        (b'a,b\n"open,2\n', "not a result table"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "broken.csv"
    path.write_bytes(content)
    for action in (lambda: records.read(path), lambda: records.append(path, [prefill(1)])):
        with pytest.raises(RecordError, match=problem) as error:
            action()
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
    assert path.read_bytes() == content


def test_a_folder_in_the_way_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordError, match="cannot be read"):
        records.read(tmp_path)


# -- killed at any moment ----------------------------------------------------------------------------


def test_a_torn_partial_file_is_ignored_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    records.append(path, [prefill(64)])
    torn = path.with_name(path.name + PARTIAL)
    torn.write_text("M_prefill,tok")
    assert records.read(path)["M_prefill"].tolist() == [64]
    records.append(path, [prefill(128)])
    assert records.read(path)["M_prefill"].tolist() == [64, 128]
    assert not torn.exists()


def test_kill_9_leaves_every_acknowledged_row_and_whole_rows_only(tmp_path: Path) -> None:
    """A child appends as fast as it can and says each row that is recorded; it is killed at varying moments."""
    path = tmp_path / "t.csv"
    program = textwrap.dedent(
        """
        import sys
        sys.path.insert(0, sys.argv[2])
        from pathlib import Path
        from slidesparse import records
        from test_records import prefill
        path = Path(sys.argv[1])
        start = len(records.read(path))
        for number in range(start, start + 10_000):
            records.append(path, [prefill(number, reason="x" * 2000)])
            print(number, flush=True)
        """
    )
    acknowledged = -1
    for delay in (0.0, 0.013, 0.031):
        child = subprocess.Popen(
            [sys.executable, "-c", program, str(path), str(Path(__file__).parent)],
            stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
        )  # fmt: skip
        assert child.stdout is not None
        acknowledged = int(child.stdout.readline())
        deadline = time.monotonic() + delay
        while time.monotonic() < deadline:
            records.read(path)  # a reader at the same time never sees a torn table
        child.send_signal(signal.SIGKILL)
        for line in child.stdout:
            acknowledged = int(line)
        child.wait()
        frame = records.read(path)
        assert frame["M_prefill"].tolist() == list(range(len(frame)))
        assert len(frame) >= acknowledged + 1
        assert set(frame["reason"]) == {"x" * 2000}
    assert acknowledged >= 2
