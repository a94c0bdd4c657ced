"""What this machine is: GPU, driver, CPU, memory, versions, and the result tag made of them."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache

import psutil
import torch


@dataclass(frozen=True)
class Gpu:
    """One NVIDIA GPU as the driver reports it."""

    name: str
    compute_capability: tuple[int, int]
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """The host of a run. `gpu` is None where no NVIDIA GPU can be used by torch."""

    gpu: Gpu | None
    gpu_count: int
    cpu: str
    cores: int
    memory_bytes: int
    arch: str
    python: str
    torch: str
    cuda: str
    """CUDA version of the torch build, empty for a CPU build."""

    @property
    def tag(self) -> str:
        """`{GPU}_cc{CC}_py{XY}_cu{XYZ}_{arch}`; without a GPU its place holds `CPU-{model}` and cc and cu are 0."""
        return self.tag_of(1)

    def tag_of(self, ranks: int) -> str:
        """The tag of runs that split a model over `ranks` GPUs, `H200x2_cc90_...`: figures of another machine."""
        python = "".join(self.python.split(".")[:2])
        cuda = self.cuda.replace(".", "") or "0"
        if self.gpu is None:
            return f"CPU-{_slug(self.cpu)}_cc0_py{python}_cu0_{self.arch}"
        major, minor = self.gpu.compute_capability
        times = "" if ranks == 1 else f"x{ranks}"
        return f"{_slug(self.gpu.name)}{times}_cc{major}{minor}_py{python}_cu{cuda}_{self.arch}"

    def supports_fp8(self) -> bool:
        """FP8 tensor cores: compute capability 8.9 and later. The CPU emulates both types."""
        return self.gpu is None or self.gpu.compute_capability >= (8, 9)

    def describe(self) -> dict[str, object]:
        """For `environment.json`."""
        return asdict(self) | {"tag": self.tag}


_NOT_IN_TAG = re.compile(
    r"\([RrTtMm]+\)|@.*"
    r"|\b(NVIDIA|GeForce|Tesla|GPU|PCIe|SXM\d*|NVL|HBM\w*|\d+ ?GB)\b"
    r"|\b(Intel|AMD|CPU|Processor|\d+-Core)\b"
)
"""Maker, form factor, memory and core count: published tags name the chip alone (`H100`, `RTX5080`)."""


def _slug(name: str) -> str:
    """`NVIDIA A100-SXM4-80GB` -> `A100`; `Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz` -> `XeonPlatinum8481C`."""
    return re.sub(r"[^A-Za-z0-9]", "", _NOT_IN_TAG.sub(" ", name)) or "unknown"


@lru_cache(maxsize=1)
def detect() -> Machine:
    """Look once; the answer does not change during a run."""
    gpu, count = _gpu()
    return Machine(
        gpu=gpu,
        gpu_count=count,
        cpu=_cpu_name(),
        cores=len(os.sched_getaffinity(0)),
        memory_bytes=psutil.virtual_memory().total,
        arch=platform.machine(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda or "",
    )


def package_versions() -> dict[str, str]:
    """Installed packages that can change a result."""
    names = ("torch", "triton", "transformers", "numpy", "numba", "safetensors", "compressed-tensors", "vllm")
    libraries = ("nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13", "nvidia-cublas")
    versions = {}
    for name in (*names, *libraries):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions | {"python": sys.version.split()[0]}


def _gpu() -> tuple[Gpu | None, int]:
    if not torch.cuda.is_available():
        return None, 0
    properties = torch.cuda.get_device_properties(0)
    return (
        Gpu(properties.name, (properties.major, properties.minor), properties.total_memory, _driver()),
        torch.cuda.device_count(),
    )


def _driver() -> str:
    import pynvml

    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return "unknown"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as stream:
            for line in stream:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
