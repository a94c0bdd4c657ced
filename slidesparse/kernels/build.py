"""`python -m slidesparse.kernels.build [ARCHITECTURE...]`: compile csrc/ into the package, for all GPUs or those named.

The GEMM library (csrc/src) needs a C++ compiler, cmake, and the CUDA headers that PyTorch's and NVIDIA's Python
packages bring, or CUDA_HOME; no nvcc: it is host code that loads the CUDA libraries at run time. The tensor-core
microbenchmark (csrc/device) and our own GEMM (csrc/fused) need nvcc; without one they are left out, and a line for each
says so. None needs a GPU.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from slidesparse import files
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import fused_library, peak_library
from slidesparse.kernels.gemm_library import LIBRARY

HEADERS = ("cuda_runtime_api.h", "crt/host_defines.h", "cublasLt.h", "cusparse.h", "cusparseLt.h")
"""One of each package that is needed: the runtime's own package lacks crt/, which Triton and CUDA's compiler bring."""

ARCHITECTURES = ("80", "86", "89", "90a", "100", "120", "121")
"""What device code is compiled for: Ampere, Ada, Hopper with its own instructions, Blackwell large and small."""
DEVICE_SOURCES = ("device/peak.cu", "device/peak_wgmma.cu", "device/peak_mma_sync.cu", "src/status.cpp")
HOPPER = "90a"
FUSED_SOURCES = {
    "fused/mma_sp.cu": ARCHITECTURES,
    "fused/wgmma_gemm.cu": (HOPPER,),
    "fused/fused.cu": (),
    "src/status.cpp": (),
}
"""And the architectures that each has device code for."""
NO_NVCC = (
    "no nvcc; install nvidia-cuda-nvcc, nvidia-cuda-crt, nvidia-nvvm, nvidia-cuda-runtime and nvidia-cuda-cccl of one "
    "CUDA release, or set CUDA_HOME"
)


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


def find_nvcc() -> Path | None:
    """CUDA_HOME's, else the PATH's, else that of the Python package nvidia-cuda-nvcc."""
    home = os.environ.get("CUDA_HOME")
    on_path = shutil.which("nvcc")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    places += [Path(on_path)] if on_path else []
    places += [place for package in _folders("nvidia") for place in sorted(package.glob("*/bin/nvcc"))]
    return next((place for place in places if os.access(place, os.X_OK)), None)


def known_architectures(nvcc: Path) -> tuple[str, ...]:
    """Those of `ARCHITECTURES` that this nvcc has code for."""
    listed = _run([str(nvcc), "--list-gpu-code"]).split()
    return tuple(name for name in ARCHITECTURES if f"sm_{name.rstrip('a')}" in listed)


def nvcc_command(nvcc: Path, source: Path) -> list[str]:
    """What every call of nvcc has in common."""
    folders = [f"-I{source / folder}" for folder in ("include", "src")]
    return [str(nvcc), "-std=c++17", "-O3", "-Xcompiler", "-Wall,-fPIC,-fvisibility=hidden", *folders]


def build_device(source: Path, target: Path, nvcc: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Compile csrc/device, CUDA runtime included. Raises SlideSparseError with the compiler's own first error."""
    sources = [str(source / name) for name in DEVICE_SOURCES]
    with files.atomic_path(target / peak_library.LIBRARY) as partial:
        _run([*_shared_library(nvcc, source), *_codes(architectures), "-o", str(partial), *sources])
    return target / peak_library.LIBRARY


def build_fused(source: Path, target: Path, nvcc: Path, architectures: tuple[str, ...] = ARCHITECTURES) -> Path:
    """Compile csrc/fused, CUDA runtime included, each source for its own architectures and all at the same time.

    Without Hopper among the architectures its kernels are empty. Raises SlideSparseError with the compiler's own first
    error.
    """
    with tempfile.TemporaryDirectory() as room:

        def compiled(name: str) -> str:
            wanted = [each for each in FUSED_SOURCES[name] if each in architectures] or list(architectures[:1])
            out = str(Path(room) / f"{Path(name).stem}.o")
            options = ["--threads", "0", *_codes(tuple(wanted)), "-c", "-o", out]
            _run([*nvcc_command(nvcc, source), *options, str(source / name)])
            return out

        with ThreadPoolExecutor() as pool:
            objects = list(pool.map(compiled, FUSED_SOURCES))
        with files.atomic_path(target / fused_library.LIBRARY) as partial:
            _run([*_shared_library(nvcc, source), *_codes(architectures), "-o", str(partial), *objects])
    return target / fused_library.LIBRARY


def _codes(architectures: tuple[str, ...]) -> list[str]:
    return [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]


def _shared_library(nvcc: Path, source: Path) -> list[str]:
    # NOTES: the packages' nvcc looks for the runtime in lib64/, where toolkits have it; the packages have lib/.
    runtime = ["-cudart", "static", f"-L{nvcc.parent.parent / 'lib'}"]
    return [*nvcc_command(nvcc, source), "-shared", "--threads", "0", *runtime]


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise SlideSparseError(f"{command[0]} cannot be run: {error.strerror}") from None
    if done.returncode != 0:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if re.search("error|fatal", line.lower())]
        raise SlideSparseError(f"{' '.join(command[:2])} failed: {lines[0] if lines else done.stderr.strip()[-300:]}")
    return done.stdout


def main(*named: str) -> int:
    """Build all libraries, one whatever becomes of the others; say where they are and what was left out.

    Args:
        named: architectures such as 80 and 90a, all of which must be built; none: all that nvcc knows.

    Returns the exit code: 1 when one could not be built (one that needs nvcc where there is none is no failure, unless
    architectures were named).
    """
    package, failed = Path(__file__).parent, 0
    said: set[str] = set()  # what one nvcc does not know, no library has: one line
    for part in (_gemm_library, _device_library, _fused_library):
        try:
            for line in part(package.parent.parent / "csrc", package / "lib", named):
                if line not in said:
                    print(line)
                said.add(line)
        except SlideSparseError as error:
            print(f"error: {error}", file=sys.stderr)
            failed = 1
    return failed


def _gemm_library(source: Path, target: Path, named: tuple[str, ...]) -> list[str]:
    return [str(build(source, target))]


def _device_library(source: Path, target: Path, named: tuple[str, ...]) -> list[str]:
    purpose = "the tensor-core rates of `slidesparse calibrate`"
    return _by_nvcc(build_device, source, target, named, peak_library.LIBRARY, purpose)


def _fused_library(source: Path, target: Path, named: tuple[str, ...]) -> list[str]:
    return _by_nvcc(build_fused, source, target, named, fused_library.LIBRARY, "backend fused")


def _by_nvcc(
    build_it: Callable[[Path, Path, Path, tuple[str, ...]], Path],
    source: Path,
    target: Path,
    named: tuple[str, ...],
    name: str,
    purpose: str,
) -> list[str]:
    nvcc = find_nvcc()
    if nvcc is None and named:
        raise UnsupportedHere(f"{name}: {NO_NVCC}")
    if nvcc is None:
        return [f"left out: {name}, for {purpose}: {NO_NVCC}"]
    known = known_architectures(nvcc)
    if strange := [one for one in named if one not in known]:
        raise SlideSparseError(f"{name}: no architecture {strange[0]} for {nvcc}; it has {', '.join(known)}")
    chosen = tuple(one for one in known if not named or one in named)
    lines = [str(build_it(source, target, nvcc, chosen))]
    if unknown := [f"sm_{one}" for one in ARCHITECTURES if one not in known]:
        lines.append(f"left out: {', '.join(unknown)}, which {nvcc} does not know")
    return lines


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
