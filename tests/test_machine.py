"""The result tag: `{GPU}_cc{CC}_py{XY}_cu{XYZ}_{arch}`, the same for every board of one chip."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from slidesparse.machine import Gpu, Machine, detect

CPU = Machine(None, 0, "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", 8, 2**34, "x86_64", "3.11.7", "2.13.0+cpu", "")


def gpu_machine(name: str, capability: tuple[int, int], **changes: object) -> Machine:
    gpu = Gpu(name, capability, 80 * 2**30, "580.95.05")
    return replace(CPU, gpu=gpu, gpu_count=1, python="3.12.3", torch="2.11.0", cuda="12.9", **changes)


@pytest.mark.parametrize(
    ("name", "capability", "arch", "tag"),
    [
        # the tags of the published result trees
        ("NVIDIA GB10", (12, 1), "aarch64", "GB10_cc121_py312_cu129_aarch64"),
        ("NVIDIA H100 80GB HBM3", (9, 0), "x86_64", "H100_cc90_py312_cu129_x86_64"),
        # the names that drivers give to the other machines
        ("NVIDIA H100 PCIe", (9, 0), "x86_64", "H100_cc90_py312_cu129_x86_64"),
        ("NVIDIA H100 NVL", (9, 0), "x86_64", "H100_cc90_py312_cu129_x86_64"),
        ("NVIDIA H200", (9, 0), "x86_64", "H200_cc90_py312_cu129_x86_64"),
        ("NVIDIA GH200 480GB", (9, 0), "aarch64", "GH200_cc90_py312_cu129_aarch64"),
        ("NVIDIA B200", (10, 0), "x86_64", "B200_cc100_py312_cu129_x86_64"),
        ("NVIDIA A100 80GB PCIe", (8, 0), "x86_64", "A100_cc80_py312_cu129_x86_64"),
        ("NVIDIA A100-SXM4-80GB", (8, 0), "x86_64", "A100_cc80_py312_cu129_x86_64"),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", (8, 0), "x86_64", "A100MIG1g5gb_cc80_py312_cu129_x86_64"),
        ("NVIDIA GeForce RTX 5080", (12, 0), "x86_64", "RTX5080_cc120_py312_cu129_x86_64"),
        ("NVIDIA GeForce RTX 4090", (8, 9), "x86_64", "RTX4090_cc89_py312_cu129_x86_64"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", (8, 9), "x86_64", "RTX4090Laptop_cc89_py312_cu129_x86_64"),
    ],
)
def test_gpu_tag(name: str, capability: tuple[int, int], arch: str, tag: str) -> None:
    assert gpu_machine(name, capability, arch=arch).tag == tag


def test_two_ranks_are_another_machine() -> None:
    one = gpu_machine("NVIDIA H200", (9, 0))
    assert one.tag_of(1) == one.tag
    assert one.tag_of(2) == one.tag.replace("H200_", "H200x2_")


@pytest.mark.parametrize(
    ("cpu", "slug"),
    [
        (CPU.cpu, "XeonPlatinum8481C"),
        ("Intel(R) Core(TM) i7-9700K CPU @ 3.60GHz", "Corei79700K"),
        ("AMD EPYC 7763 64-Core Processor", "EPYC7763"),
        ("Neoverse-N1", "NeoverseN1"),
        ("", "unknown"),
    ],
)
def test_cpu_tag(cpu: str, slug: str) -> None:
    assert replace(CPU, cpu=cpu).tag == f"CPU-{slug}_cc0_py311_cu0_x86_64"


def test_cpu_tag_of_a_cuda_build_still_says_cu0() -> None:
    """Without a GPU the CUDA of the build decides nothing."""
    assert replace(CPU, cuda="13.0").tag == CPU.tag


@pytest.mark.parametrize(("capability", "fp8"), [((8, 0), False), ((8, 6), False), ((8, 9), True), ((12, 1), True)])
def test_fp8_needs_8_9(capability: tuple[int, int], fp8: bool) -> None:
    assert gpu_machine("NVIDIA X", capability).supports_fp8() is fp8


def test_this_machine() -> None:
    machine = detect()
    assert re.fullmatch(r"[A-Za-z0-9-]+_cc\d+_py3\d+_cu\d+_\w+", machine.tag)
    assert machine.cores >= 1
    assert machine.memory_bytes > 2**28
    assert machine.describe()["tag"] == machine.tag
