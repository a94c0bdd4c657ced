"""csrc/fused for the CPU: the Hopper kernel and its host side as they are, on a hostile GPU made of fibers.

tests/emulated_hopper stands in for CUDA's headers and for what the two headers with assembly have between `#ifdef
SS_HAS_WGMMA` and its `#endif`; the rest of them is the kernel's own. Fibers: tests/emulated_cuda.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import torch

from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.fused_library import LIBRARY, Config, Family, FusedLibrary

TESTS = Path(__file__).parent
CSRC = TESTS.parent / "csrc"
GPU, FIBERS = TESTS / "emulated_hopper", TESTS / "emulated_cuda"
CAPABILITY = (9, 0)
SOURCES = ("wgmma_gemm.cu", "wgmma_gemm.cuh", "wgmma_sp.cuh", "fused.cu", "family.h")
OPTIONS = ["-std=c++17", "-fno-strict-aliasing", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-Wno-psabi"]


class EmulatedLibrary(FusedLibrary):
    """Its GPU is at hand: the operands are CPU tensors."""

    def seed(self, seed: int) -> None:
        """Turns of warps, arrival of copies, moments of products."""
        self._c.emulated_seed(ctypes.c_uint(seed))

    def gpu(self, blocks: int) -> None:
        """How many blocks it runs at the same time."""
        self._c.emulated_gpu(ctypes.c_int(blocks))

    def fault(self, number: int) -> None:
        """Of those that it was built with; 0: none."""
        self._c.emulated_fault(ctypes.c_int(number))

    def all_tiles(self, n: int, k: int, dtype: torch.dtype) -> list[Config]:
        """The whole table, each tile without a cluster, whatever it would be offered for."""
        found: dict[int, Config] = {}
        for m in (1, 512, 8192):
            with suppress(UnsupportedHere):  # of a table with few tiles none may fit
                found |= {config.index: config for config in self.configs(CAPABILITY, m, n, k, dtype, Family.WGMMA)}
        return [replace(found[i], cluster_channels=1, cluster_tokens=1, split_k=1) for i in sorted(found)]

    def launched_blocks(self) -> int:
        """Of the last launch."""
        return int(self._c.emulated_launched_blocks())

    def only_read(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies that read anything else fail their launch."""
        self._c.emulated_readable(None, ctypes.c_int64(0))
        for tensor in tensors:
            self._c.emulated_readable(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))


def _compile(source: Path, out: Path, *options: str) -> Path:
    includes = [f"-I{path}" for path in (GPU, FIBERS, CSRC / "include", CSRC / "src", CSRC / "fused")]
    subprocess.run(["g++", *OPTIONS, *options, *includes, "-c", "-o", out, "-x", "c++", source], check=True)
    return out


def build_gpu(folder: Path) -> list[Path]:
    """Objects that every library is linked with: the emulated GPU itself."""

    def compiled(source: Path) -> Path:
        return _compile(source, folder / f"{source.stem}.o", "-O2", "-ftree-vectorize", "-march=native")

    names = "products", "gpu", "copies", "barriers", "interface"
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compiled, [*(GPU / f"{name}.cpp" for name in names), CSRC / "src" / "status.cpp"]))


def _without_assembly(header: Path, instead: Path) -> None:
    start, begin, rest = header.read_text().partition("#ifdef SS_HAS_WGMMA\n")
    _, end, tail = rest.partition("#endif  // SS_HAS_WGMMA\n")
    assert begin, f"{header.name}: no part for wgmma"
    assert end, f"{header.name}: no end of that part"
    header.write_text(f"{start}{begin}{instead.read_text()}{end}{tail}")


Fault = Sequence[tuple[str, str]]
"""Texts of the kernel, each there once, and what stands there instead: an expression or whole statements; or any text
with FAULT, which is true when the fault is on."""


def _with_faults(text: str, faults: Sequence[Fault]) -> str:
    """All of them, to choose while it runs."""
    instead: dict[str, list[tuple[int, str]]] = {}
    for number, changes in enumerate(faults, 1):
        for before, after in changes:
            instead.setdefault(before, []).append((number, after))
    places = []
    for before, choices in instead.items():
        assert text.count(before) == 1, before
        if "FAULT" in choices[0][1]:
            ((number, chosen),) = choices
            new = chosen.replace("FAULT", f"emulated::fault({number})")
        elif before.endswith(";"):
            new = "".join(f"if (emulated::fault({number})) {{ {after} }} else " for number, after in choices)
            new += f"{{ {before} }}"
        else:
            new = "".join(f"emulated::fault({number}) ? ({after}) : " for number, after in choices)
            new = f"({new}({before}))"
        places.append((text.index(before), before, new))
    end = len(text)
    for start, before, new in sorted(places, reverse=True):
        assert start + len(before) <= end, f"two faults overlap: {before}"
        text, end = text[:start] + new + text[start + len(before) :], start
    return text


def build(
    folder: Path,
    gpu: Sequence[Path],
    faults: Sequence[Fault] = (),
    tiles: Sequence[str] | None = None,
) -> EmulatedLibrary:
    """gpu: of `build_gpu`. faults: what `fault(1)`, `fault(2)` and so on turn on. tiles: those of the table to have,
    "1, 64" and the like."""
    fused, device = folder / "fused", folder / "device"
    for path in (fused, device):
        path.mkdir(parents=True)
    for name in SOURCES:
        shutil.copy(CSRC / "fused" / name, fused)
    for name in ("hopper.cuh", "cuda_check.h"):
        shutil.copy(CSRC / "device" / name, device)
    _without_assembly(device / "hopper.cuh", GPU / "hopper.inc")
    _without_assembly(fused / "wgmma_sp.cuh", GPU / "wgmma_sp.inc")
    kernel = fused / "wgmma_gemm.cuh"
    kernel.write_text(_with_faults(kernel.read_text(), faults))
    for path in (kernel, device / "hopper.cuh", fused / "wgmma_sp.cuh"):
        assert "asm volatile" not in path.read_text(), f"{path.name} has assembly that nothing stands in for"
    if tiles is not None:
        table = fused / "wgmma_gemm.cu"
        few = f"all = {{{', '.join(f'entry<{tile}>()' for tile in tiles)}}};"
        text, replaced = re.subn(r"all = \{.*?\};", few, table.read_text(), flags=re.DOTALL)
        assert replaced == 1
        table.write_text(text)
    kernels = _compile(
        fused / "wgmma_gemm.cu", fused / "wgmma_gemm.o", "-O1", "-D__CUDA_ARCH_FEAT_SM90_ALL", f"-I{fused}"
    )
    interface = _compile(fused / "fused.cu", fused / "fused.o", f"-I{fused}")
    out = folder / LIBRARY
    subprocess.run(["g++", "-shared", "-o", out, kernels, interface, *gpu], check=True)
    return EmulatedLibrary(out)
