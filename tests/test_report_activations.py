"""Activation kernels beside a copy of as many bytes; power cap and throttling told apart."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
from fixtures.result_trees import COPY_GB_S, CPU, GPU, Writer
from report_text import block, tables

from slidesparse.report.activations import activation_table
from slidesparse.report.collect import collect
from slidesparse.report.render import render_report
from slidesparse.report.view import View, throttled


@pytest.fixture(scope="module")
def view(tmp_path_factory: pytest.TempPathFactory) -> View:
    return View(collect(Writer(tmp_path_factory.mktemp("gpu"), "bitnet-2b", GPU).everything()))


def test_every_kernel_pattern_and_size_has_a_line(view: View) -> None:
    tune = view.records.tune
    table = activation_table(view, tune[tune["dtype"] == "INT8"])
    names = [row[0] for row in table.rows]
    lines = {name: names[place + 1 :] for place, name in enumerate(names) if name}
    count = {
        name: 1 + next((place for place, after in enumerate(rest) if after), len(rest)) for name, rest in lines.items()
    }
    assert count == {
        "quantise": 2, "quantise + lift": 8 * 2, "dequantise + bias": 3,
        "norm + quantise": 1, "norm + quantise + lift": 4,
        "add + norm + quantise": 1, "add + norm + quantise + lift": 4,
        "gate + norm + quantise": 1, "gate + norm + quantise + lift": 4,
    }, "each pattern of the linears at K = 2560 and 6912; fused kernels at their one K"  # fmt: skip
    assert [row[2] for row in table.rows[-3:]] == ["N=2560", "N=3840", "N=13824"]
    assert list(table.head[3:5]) == ["M=64", "M=128"]


def test_shares_are_of_the_copy_and_of_the_copy_bandwidth(view: View) -> None:
    tune = view.records.tune
    at = (tune["operation"] == "quantise_lift") & (tune["sparsity"] == "2:8") & (tune["K"] == 6912) & tune["winner"]
    row = tune[at & (tune["M"] == 4096) & (tune["dtype"] == "INT8")].iloc[0]
    table = activation_table(view, tune[tune["dtype"] == "INT8"])
    cell = next(r for r in table.rows if r[1] == "cusparselt 2:8" and r[2] == "K=6912")[
        list(table.head).index("M=4,096")
    ]
    of_copy = row["copy_us"] / row["lat_us"]
    of_large = 4 * 4096 * 6912 / (row["lat_us"] * 1e-6) / (COPY_GB_S * 1e9)
    assert cell.endswith(f"({of_copy:.0%}, {of_large:.0%})")


def test_the_cpu_has_no_such_table(tmp_path: Path) -> None:
    text = render_report(Writer(tmp_path, "smoke", CPU).everything()).read_text()
    assert "Activation kernels" not in text
    assert tables(block(text, "BitNet-tiny INT8 (emulation), tuning"))


def test_a_power_cap_is_not_throttling() -> None:
    frame = pd.DataFrame({"throttle": ["", "power cap", "power cap, thermal (software)", "hardware slowdown"]})
    assert throttled(frame).tolist() == [False, False, True, True]
