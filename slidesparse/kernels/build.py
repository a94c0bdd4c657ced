"""`python -m slidesparse.kernels.build`: compile csrc/ into the package.

Needs a C++ compiler, cmake, and the CUDA headers that PyTorch's and NVIDIA's Python packages bring, or CUDA_HOME.
No GPU, no nvcc: csrc/ is host code that loads the CUDA libraries at run time.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from slidesparse import files
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels.gemm_library import LIBRARY

HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h", "cublasLt.h", "cusparse.h", "cusparseLt.h")
"""One of each package that is needed: the runtime's own package lacks crt/, which Triton and CUDA's compiler bring."""


def include_folders(roots: list[Path]) -> list[Path]:
    """Folders that hold the headers, the first root that has one winning.

    Raises UnsupportedHere naming the headers that are nowhere.
    """
    found = {name: next((root for root in roots if (root / name).exists()), None) for name in HEADERS}
    missing = [name for name, root in found.items() if root is None]
    if missing:
        raise UnsupportedHere(
            f"no {', '.join(missing)}: install nvidia-cublas, nvidia-cusparse, nvidia-cuda-runtime and "
            f"nvidia-cusparselt-cu12, or set CUDA_HOME"
        )
    return list(dict.fromkeys(root for root in found.values() if root is not None))


def header_roots() -> list[Path]:
    """Where headers may lie: NVIDIA's Python packages, then CUDA_HOME, then the usual place, then Triton's own copy."""
    roots = [include for package in _folders("nvidia") for include in sorted(package.glob("*/include"))]
    homes = [Path(home) / "include" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return [*roots, *homes, *(package / "backends" / "nvidia" / "include" for package in _folders("triton"))]


def _folders(package: str) -> list[Path]:
    """Folders of a package that may not be installed, without importing it."""
    spec = importlib.util.find_spec(package)
    return [Path(folder) for folder in (spec.submodule_search_locations or ())] if spec else []


def build(source: Path, target: Path) -> Path:
    """Compile csrc/ and put the library at `target`. Raises SlideSparseError with the compiler's own first error."""
    if shutil.which("cmake") is None:
        raise UnsupportedHere("cmake is not installed; install it with a C++ compiler")
    folders = ";".join(str(folder) for folder in include_folders(header_roots()))
    with tempfile.TemporaryDirectory() as room:
        _run(["cmake", "-S", str(source), "-B", room, "-DCMAKE_BUILD_TYPE=Release", f"-DCUDA_INCLUDE_DIRS={folders}"])
        _run(["cmake", "--build", room, "--parallel"])
        with files.atomic_path(target / LIBRARY) as partial:
            shutil.copyfile(Path(room) / LIBRARY, partial)
    return target / LIBRARY


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "error" in line.lower()]
        raise SlideSparseError(f"{' '.join(command[:2])} failed: {lines[0] if lines else done.stderr.strip()[-300:]}")


if __name__ == "__main__":
    package = Path(__file__).parent
    try:
        print(build(package.parent.parent / "csrc", package / "lib"))
    except SlideSparseError as error:
        sys.exit(f"error: {error}")
