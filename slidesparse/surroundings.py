"""What a host offers beyond its hardware: driver, libraries, disk, hub, backends. Looked up for `doctor`."""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import os
import shutil
import site
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.files import existing_parent
from slidesparse.kernels.backend import require
from slidesparse.machine import Machine
from slidesparse.measure.engines.base import engine
from slidesparse.plan import Plan

HUB_TIMEOUT_S = 4.0
PACKAGES = ("triton", "vllm")
LIBRARIES = ("cublasLt", "cusparseLt")


@dataclass(frozen=True)
class Surroundings:
    """Facts only; `doctor.diagnose` judges them. An empty reason means: nothing is in the way."""

    nvidia_gpus: tuple[str, ...] = ()
    """As the driver lists them, whether or not this torch can use them."""
    driver: str = ""
    packages: Mapping[str, str] = field(default_factory=dict)
    """Versions of those of PACKAGES that are installed."""
    libraries: Mapping[str, str] = field(default_factory=dict)
    """Paths of those of LIBRARIES that are found."""
    free_bytes: int = 0
    present_bytes: int = 0
    """What the data folder already holds of this plan's models."""
    cannot_write: str = ""
    models_to_get: tuple[str, ...] = ()
    """Models whose BF16 base is not in the data folder yet; source `local`: is not in the folder named for it."""
    hub_problem: str | None = None
    """None: not asked, because nothing is to be fetched from the hub."""
    backend_problems: Mapping[tuple[str, DType], str] = field(default_factory=dict)
    engine_problem: str = ""
    rates_problem: str = ""
    """Why tensor-core rates cannot be measured, for what is installed; not asked without a GPU backend."""


def look(plan: Plan, machine: Machine) -> Surroundings:
    """Look around. Writes one temporary file into the data folder; asks the hub only if the plan needs it."""
    gpus, driver = _nvml()
    profile = plan.profile
    missing = tuple(model for model in profile.models if not _is_there(_source_folder(plan, model)))
    names = profile.backends.every
    return Surroundings(
        nvidia_gpus=gpus,
        driver=driver,
        packages={name: version for name in PACKAGES if (version := _version(name))},
        libraries={name: path for name in LIBRARIES if (path := _library(name))},
        free_bytes=shutil.disk_usage(existing_parent(plan.data)).free,
        present_bytes=_bytes_in(_model_folders(plan)),
        cannot_write=_write_problem(plan.data),
        models_to_get=missing,
        hub_problem=_hub_problem() if missing and profile.source == "hub" else None,
        backend_problems={
            (name, dtype): _backend_problem(name, machine, dtype) for name in names for dtype in profile.types
        },
        engine_problem=_engine_problem(profile.engine, machine),
        rates_problem=_rates_problem() if profile.on_gpu else "",
    )


def _nvml() -> tuple[tuple[str, ...], str]:
    import pynvml

    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        names = tuple(str(pynvml.nvmlDeviceGetName(pynvml.nvmlDeviceGetHandleByIndex(i))) for i in range(count))
        return names, str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return (), ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _library(name: str) -> str:
    """Path of lib{name}.so: those of the nvidia-* packages first, then what the loader knows."""
    for folder in site.getsitepackages():
        found = sorted(Path(folder).glob(f"nvidia/*/lib/lib{name}.so*"))
        if found:
            return str(found[0])
    return ctypes.util.find_library(name) or ""


def _model_folders(plan: Plan) -> Iterable[Path]:
    profile = plan.profile
    for model in profile.models:
        yield plan.base_folder(model)
        for dtype in profile.dtypes:
            yield plan.prepared_folder(model, dtype)
            for sparsity in profile.sparsity.end_to_end:
                yield plan.converted_folder(model, dtype, sparsity)


def _bytes_in(folders: Iterable[Path]) -> int:
    """Bytes of all files, each counted once however many hard links it has."""
    sizes: dict[tuple[int, int], int] = {}
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                stat = path.stat()
                sizes[stat.st_dev, stat.st_ino] = stat.st_size
    return sum(sizes.values())


def _source_folder(plan: Plan, model: str) -> Path:
    """Where the BF16 model lies: a local one is read in place."""
    local = plan.bench.models[model].local
    if plan.profile.source == "local" and local:
        return Path(local).expanduser()
    return plan.base_folder(model)


def _is_there(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _write_problem(data: Path) -> str:
    parent = existing_parent(data)
    try:
        with tempfile.TemporaryFile(dir=parent) as stream:
            stream.write(b"0")
    except OSError as error:
        return f"{parent}: {error.strerror}"
    return ""


def _hub_problem() -> str:
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE") == "1":
        return "offline mode is set (HF_HUB_OFFLINE)"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S):
            return ""
    except urllib.error.HTTPError as error:
        return "" if error.code < 500 else f"{constants.ENDPOINT} answers {error.code}"
    except (OSError, ValueError) as error:
        return f"{constants.ENDPOINT} cannot be reached ({getattr(error, 'reason', None) or error})"


def _backend_problem(name: str, machine: Machine, dtype: DType) -> str:
    try:
        require(name, machine, dtype)
        if name == "fused":
            from slidesparse.measure.fused_check import problem_here

            wrong = problem_here(dtype)
            return f"wrong on this GPU: {wrong}" if wrong else ""
    except UnsupportedHere as error:
        return str(error)
    except (SlideSparseError, RuntimeError) as error:  # a kernel that crashes leaves torch's own error
        return f"cannot be run on this GPU: {str(error).strip().splitlines()[0]}"
    return ""


def _engine_problem(name: str, machine: Machine) -> str:
    try:
        engine(name).require(machine)
    except UnsupportedHere as error:
        return str(error)
    return ""


def _rates_problem() -> str:
    from slidesparse.kernels import peak_library

    try:
        peak_library.load()
    except SlideSparseError as error:
        return str(error)
    return ""
