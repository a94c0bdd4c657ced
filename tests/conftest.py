"""Markers: `gpu` tests are skipped where torch sees no GPU, `slow` ones unless --slow is given."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
from hypothesis import settings

# Read once, when Triton is first imported: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ["TRITON_INTERPRET"] = "1"

# A job started in the background has Ctrl-C ignored, and so would have every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A first call compiles (numba) or imports (torch): the time of one example says nothing about a fault.
settings.register_profile("slidesparse", deadline=None, print_blob=True)
settings.load_profile("slidesparse")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run tests marked slow as well")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))
    if any("gpu" in item.keywords for item in items):
        import torch

        if not torch.cuda.is_available():
            for item in items:
                if "gpu" in item.keywords:
                    item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))
