"""A program of its own, because Triton's interpreter cannot be left: the command line, with a profile of few launches.

baked_few.py launch         launch them through the JIT with a driver that runs nothing; a line each: digest, hit
baked_few.py anything else  the command `slidesparse`
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher
from triton.runtime import driver

from slidesparse.bake import counts, launchers, warm
from slidesparse.bake.stub import StubDriver
from slidesparse.cli import main
from slidesparse.dtypes import DType
from slidesparse.kernels import triton_activations, triton_bitnet, triton_dequantise
from slidesparse.pattern import Sparsity

ARCHITECTURE = 90
LAUNCHES = 5


def launch_few(*_: object) -> None:
    """One of each kind, and each class of M."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    triton_activations.quantise_lift(empty(3, 64, dtype=torch.bfloat16), DType.FP8, Sparsity(8))
    x, weight = empty(7, 128, dtype=torch.bfloat16), empty(128, dtype=torch.bfloat16)
    triton_bitnet.add_norm_quantise_lift(x, x, weight, 1e-5, DType.INT8, None)
    for m in (1, 35, 48):
        acc = empty(m, 64, dtype=torch.int32)
        triton_dequantise.dequantise_bias(acc, empty(m, 1), empty(64, 1), None)


class Utilities:
    """What the real driver knows of a device and does with machine code."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[None, None, int, int, int]:
        assert kernel.startswith(b"\x7fELF")
        return None, None, 0, 0, 1024


class NoOp:
    """Triton's launcher, made and looked up as for a launch, and then not called."""

    def __init__(self, source: Any, metadata: Any) -> None:
        CudaLauncher(source, metadata)

    def __call__(self, *arguments: Any) -> None:
        launched.append(arguments[:3])


class RecordingDriver(StubDriver):
    utils = Utilities()
    launcher_cls = NoOp


launched: list[tuple[int, int, int]] = []


def launch() -> None:
    def refuse(*arguments: object) -> str:
        raise AssertionError("a launcher was compiled")

    def say(**event: Any) -> None:
        print(event["metadata"]["hash"], "hit" if event["cache_hit"] else "miss", flush=True)

    triton.knobs.compilation.listener = say
    counts.follow()
    counts.follow()  # the plugin of an engine may do so more than once
    with launchers.empty_driver_library():
        triton.knobs.build.impl = refuse
        driver.set_active(RecordingDriver(ARCHITECTURE))
        launch_few()
    assert len(launched) == LAUNCHES
    assert launched[0] == (3, 1, 1)


if __name__ == "__main__":
    if sys.argv[1:] == ["launch"]:
        launch()
    else:
        warm.launch_all = launch_few
        main()
