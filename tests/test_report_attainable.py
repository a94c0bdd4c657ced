"""What a machine can attain: the formulas by hand and from actual tensors, and how the report shows them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
import torch
from fixtures.result_trees import COPY_GB_S, DENSE_TOPS, GPU, SPARSE_GAIN, Writer
from fixtures.result_trees import CPU as CPU_HOST
from hypothesis import given
from hypothesis import strategies as st
from report_text import section, table_under, tables

from slidesparse.dtypes import DType
from slidesparse.pattern import Sparsity
from slidesparse.report.attainable import Attainable, gemm_bytes, output_bytes
from slidesparse.report.collect import collect
from slidesparse.report.render import render_report

PATTERNS = [Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None)]
RATES = Attainable(4000.0, {("INT8", False): 1500.0, ("INT8", True): 2400.0, ("BF16", False): 700.0})


# -- bytes ---------------------------------------------------------------------------------------------


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 40),
    k=st.integers(1, 100),
    dtype=st.sampled_from(list(DType)),
    pattern=st.sampled_from([None, *PATTERNS]),
)
def test_bytes_are_those_of_the_tensors_that_move(
    m: int, n: int, k: int, dtype: DType, pattern: Sparsity | None
) -> None:
    """Operands and output as they lie in memory; the compressed weight as torch's own 2:4 form has it: half the
    values, and 2 bits for each."""
    out = torch.empty(m, n, dtype=torch.int32)
    if pattern is None:
        parts = [torch.empty(m, k, dtype=dtype.torch), torch.empty(n, k, dtype=dtype.torch), out]
    else:
        columns = len(pattern.column_map(k))
        values = torch.empty(n, columns // 2, dtype=dtype.torch)
        indices = torch.empty(values.numel() * 2 // 8, dtype=torch.uint8)
        parts = [torch.empty(m, columns, dtype=dtype.torch), values, indices, out]
    assert gemm_bytes(dtype.value, m, n, k, pattern, 4) == sum(part.nbytes for part in parts)


def test_bytes_by_hand() -> None:
    """2:8, K = 2560: K' = 3840. A row: 1920 values and 480 index bytes; BF16 twice as many bytes of values."""
    assert gemm_bytes("INT8", 64, 100, 2560, Sparsity(8), 4) == 64 * 3840 + 100 * 2400 + 64 * 100 * 4
    assert gemm_bytes("BF16", 64, 100, 2560, Sparsity(8), 2) == 64 * 3840 * 2 + 100 * (3840 + 480) + 64 * 100 * 2
    assert gemm_bytes("FP8E4M3", 64, 100, 2560, None, 2) == 64 * 2560 + 100 * 2560 + 64 * 100 * 2


@pytest.mark.parametrize(
    ("dtype", "path", "expected"),
    [
        ("INT8", "", 4),
        ("FP8E4M3", "", 2),
        ("BF16", "", 2),
        ("FP16", "", 2),
        ("INT8", "cusparselt 3.s1 (split-K 1), INT8 -> int32", 4),
        ("INT8", "x, INT8 -> bfloat16", 2),
        ("FP8E4M3", "cublaslt 1 (tile 128x128), FP8E4M3 -> float32", 4),
        ("INT8", "quantise -> gemm", 4),
    ],
)
def test_the_output_is_what_the_path_says(dtype: str, path: str, expected: int) -> None:
    assert output_bytes(dtype, path) == expected


# -- times and speed-ups -------------------------------------------------------------------------------


def test_a_large_product_is_bound_by_arithmetic() -> None:
    """2 * 16384 * 13824 * 2560 operations at 1500 TOPS: 773.1 us; 2:8 has half as many again, at 2400 TOPS."""
    dense = RATES.microseconds("INT8", None, 16384, 13824, 2560)
    sparse = RATES.microseconds("INT8", Sparsity(8), 16384, 13824, 2560)
    assert dense == pytest.approx(2 * 16384 * 13824 * 2560 / 1500e12 * 1e6)
    assert dense == pytest.approx(773.1, abs=0.1)
    assert sparse == pytest.approx(1.5 * dense * 1500 / 2400)


def test_a_small_product_is_bound_by_memory() -> None:
    """64 tokens: 2560 * 6912 weights of 1 byte dominate; 18.6 MB at 4000 GB/s."""
    found = RATES.microseconds("INT8", None, 64, 2560, 6912)
    assert found == pytest.approx((64 * 6912 + 2560 * 6912 + 64 * 2560 * 4) / 4000e9 * 1e6)
    assert RATES.microseconds("INT8", None, 64, 2560, 6912, "INT8 -> bfloat16") < found


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_speedup_is_the_ratio_of_the_times_where_arithmetic_bounds_both(pattern: Sparsity) -> None:
    m, n, k = 65536, 8192, 8192
    dense, sparse = (RATES.microseconds("INT8", p, m, n, k) for p in (None, pattern))
    assert dense is not None
    assert sparse is not None
    assert RATES.speedup("INT8", pattern, [(n, k)]) == pytest.approx(dense / sparse)


def test_with_ideal_rates_it_is_the_theoretical_bound() -> None:
    """Twice the rate, and a K that needs no padding for any L (a multiple of each times 32): L / (L - 2)."""
    ideal = Attainable(None, {("FP16", False): 1.0, ("FP16", True): 2.0})
    for pattern in PATTERNS:
        assert ideal.speedup("FP16", pattern, [(1, 32 * 840)]) == pytest.approx(pattern.speedup_bound)


def test_layers_together_weigh_by_their_work() -> None:
    """K = 10 is padded to K' = 32 under 2:4, which costs a factor 3.2; K = 3200 is not padded at all."""
    gain = 2400 / 1500
    both = RATES.speedup("INT8", Sparsity(4), [(100, 10), (7, 3200)])
    assert both == pytest.approx(gain * (100 * 10 + 7 * 3200) / (100 * 32 + 7 * 3200))


def test_what_was_not_measured_is_not_made_up() -> None:
    assert RATES.speedup("BF16", Sparsity(4), [(8, 32)]) is None, "no sparse rate"
    assert RATES.microseconds("BF16", Sparsity(4), 8, 8, 32) is None
    assert RATES.microseconds("BF16", None, 8, 8, 32) is not None
    assert RATES.speedup("INT8", Sparsity(4), []) is None
    assert not Attainable.of(pd.DataFrame())


def test_rates_with_loads_are_taken_and_failures_are_none(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b", GPU)
    writer.changes = {
        "tensor cores FP8E4M3 2:4 with loads": {"status": "failed", "reason": "x"},
        "tensor cores INT8 dense": {"rate": 9999.0},
        "tensor cores BF16 dense with loads": {"verified": "not_checked"},
    }
    writer.task(writer.plan.tasks[9])
    found = Attainable.of(collect(writer.tree).calibration)
    assert found.copy == COPY_GB_S
    assert found.tensor["INT8", False] == DENSE_TOPS[DType.INT8]
    assert found.tensor["INT8", True] == pytest.approx(SPARSE_GAIN * DENSE_TOPS[DType.INT8])
    assert ("FP8E4M3", True) not in found.tensor
    assert ("BF16", False) not in found.tensor, "not checked"
    assert len(found.tensor) == 2 * 4 - 2


# -- in the report -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A kernel run with 16-bit types, squares and calibration; one rate failed."""
    writer = Writer(tmp_path_factory.mktemp("kernels"), "kernels", GPU)
    writer.changes = {
        "BitNet-2B-INT8 cublaslt qkv M=16384 N=3840 K=2560": {"lat_us_1": 400.0},
        "BitNet-2B-BF16 cusparselt 2:8 o M=64 N=2560 K=2560": {"lat_us_1": 10.0},
        "tensor cores FP16 2:4": {"status": "failed", "reason": "illegal instruction"},
    }
    for number in (5, 6, 7, 9):
        writer.task(writer.plan.tasks[number])
    writer.environment()
    return render_report(writer.tree).read_text()


def test_rates_and_their_ratio_with_intervals(text: str) -> None:
    part = section(text, "What this machine can do")
    assert re.search(r"by a copy: 4,200 \[4,1\d\d, 4,2\d\d\] GB/s", part)
    rates = {row[0]: row[1:] for row in tables(part)[0][2:]}
    assert list(rates) == ["INT8", "FP8E4M3", "BF16", "FP16"]
    assert rates["INT8"][3].startswith("1,500 [1,4")
    assert rates["INT8"][4].startswith("2,550 [2,5")
    assert re.fullmatch(r"1\.70 \[1\.6\d, 1\.7\d\]", rates["INT8"][5])
    assert rates["FP16"][1] == rates["FP16"][2] == "–", "a rate that failed has neither figure nor ratio"
    details = tables(part)[2]
    assert len(details) == 2 + 17
    failed = next(row for row in details if "✗" in row)
    assert failed[:2] == ["tensor cores, 2:4", "FP16"]
    assert "illegal instruction" in section(text, "Errors and skips")


def test_patterns_that_the_rates_rule_out_are_named(text: str) -> None:
    """1.7 / expansion: 2:14 0.992, 2:16 0.971, 2:inf 0.85."""
    part = section(text, "What this machine can do")
    patterns = {row[0]: row[1:] for row in tables(part)[1][2:]}
    assert patterns["2:8"] == ["1.333", "1.133", "1.133", "1.133", "1.133"]
    assert patterns["2:14"][1] == "0.992"
    line = next(line for line in section(text, "Conclusions").splitlines() if "this machine, INT8" in line)
    assert "2:4 can be up to 1.70 times as fast as dense; nothing is left for 2:14, 2:16, 2:inf there" in line


def test_kernel_tables_show_the_attainable_bound_and_share(text: str) -> None:
    latency, ratios = (table_under(text, "Kernel, BitNet-2B INT8", i) for i in (1, 2))
    point = 2 * 16384 * 3840 * 2560 / 1500e12 * 1e6
    assert latency[2][-1] == f"400.0 ({point / 400 * 100:.0f} %)"
    assert ratios[0][:4] == ["layer (N x K)", "against cublaslt", "bound", "attainable"]
    assert ratios[2][1:4] == ["cusparselt 2:4", "2.000", "1.700"]
    down = next(row for row in ratios if row[0].startswith("down"))
    assert down[3] == "1.700", "2:4 needs no padding at K = 6912"
    moved = 64 * 3840 * 2 + 2560 * (3840 + 480) + 64 * 2560 * 2
    sparse = [row for row in table_under(text, "Kernel, BitNet-2B BF16", 1) if row[1] == "cusparselt 2:8"]
    assert sparse[1][2] == f"10.00 ({moved / COPY_GB_S / 1e3 / 10 * 100:.0f} %)"


def test_squares_stand_on_one_line_by_size(text: str) -> None:
    latency, ratios = (table_under(text, "Kernel, SQUARE BF16", i) for i in (1, 2))
    assert latency[0] == ["shape", "latency, µs", "1,024", "2,048", "4,096", "8,192", "16,384"]
    assert [row[1] for row in latency[2:]][:2] == ["cublaslt", "cusparselt 2:4"]
    assert all("%" in cell for row in latency[2:] for cell in row[2:])
    assert ratios[0][4:] == ["1,024", "2,048", "4,096", "8,192", "16,384"]
    six = next(row for row in ratios if row[1] == "cusparselt 2:6")
    low, high = (1.7 * k / Sparsity(6).lifted_k(k) for k in (1024, 16384))
    assert six[3] == f"{low:.3f} to {high:.3f}", "K' is padded more where K is small"


def test_without_rates_the_report_says_so_and_how_to_get_them(tmp_path: Path) -> None:
    writer = Writer(tmp_path, "bitnet-2b", GPU)
    writer.task(writer.plan.tasks[5])
    writer.task(writer.plan.tasks[6])
    writer.environment()
    text = render_report(writer.tree).read_text()
    command = "Made by `make calibrate PROFILE=bitnet-2b`."
    assert command in section(text, "What this machine can do")
    assert command in section(text, "Kernel benchmark")
    assert "What is attainable is unmeasured" in section(text, "Kernel benchmark")
    head = table_under(text, "Kernel, BitNet-2B INT8", 2)[0]
    assert "attainable" not in head
    assert "%" not in " ".join(table_under(text, "Kernel, BitNet-2B INT8", 1)[2])


def test_emulation_is_never_held_against_rates_of_a_gpu(tmp_path: Path) -> None:
    for profile, number in (("smoke", 5), ("smoke", 6), ("bitnet-2b", 9)):
        writer = Writer(tmp_path, profile, GPU if profile == "bitnet-2b" else CPU_HOST)
        writer.tree = type(writer.tree)(writer.tree.root.parent / GPU.tag, GPU.tag)
        writer.task(writer.plan.tasks[number])
    writer.environment()
    text = render_report(writer.tree).read_text()
    assert "1.70 [" in section(text, "What this machine can do")
    assert "%" not in " ".join(table_under(text, "Kernel, BitNet-tiny INT8 (emulation)", 1)[2])
    assert "attainable" not in table_under(text, "Kernel, BitNet-tiny INT8 (emulation)", 2)[0]
