"""csrc/fused for the CPU: the mma.sp kernel and its host side as they are, on a hostile GPU made of fibers.

tests/emulated_cuda stands in for CUDA's headers and for csrc/device/mma_sync.cuh, the one file with assembly.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import torch

from slidesparse.kernels.fused_library import LIBRARY, Config, Family, FusedLibrary

CSRC = Path(__file__).parent.parent / "csrc"
STANDINS = Path(__file__).parent / "emulated_cuda"
CAPABILITY = (12, 0)
"""That the emulation says it has."""


class EmulatedLibrary(FusedLibrary):
    """Its GPU is at hand: the operands are CPU tensors."""

    def conflicts(self) -> int:
        """16-byte rows of ldmatrix that met another one in their banks, of all launches so far."""
        self._c.emulated_conflicts.restype = ctypes.c_longlong
        return int(self._c.emulated_conflicts())

    def wavefronts(self) -> int:
        """8 rows each: what the conflicts are out of."""
        self._c.emulated_wavefronts.restype = ctypes.c_longlong
        return int(self._c.emulated_wavefronts())

    def seed(self, seed: int) -> None:
        """Order of warps and blocks, arrival of copies."""
        self._c.emulated_seed(ctypes.c_uint(seed))

    def only_read(self, tensors: Iterable[torch.Tensor]) -> None:
        """Copies that read anything else fail their launch."""
        self._c.emulated_readable(None, ctypes.c_int64(0))
        for tensor in tensors:
            self._c.emulated_readable(ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(tensor.nbytes))

    def all_configs(self, n: int, k: int, dtype: torch.dtype) -> list[Config]:
        """Every tile, whatever it would be offered for."""
        found: dict[str, Config] = {}
        for m in (1, 64, 512, 1024, 8192):
            found |= {config.name: config for config in self.configs(CAPABILITY, m, n, k, dtype, Family.MMA)}
        return list(found.values())


def build(folder: Path, changed: tuple[str, str] | None = None) -> EmulatedLibrary:
    """changed: text of the kernel and what stands there instead, to see that it is noticed: a few INT8 tiles do."""
    for name in ("fused/mma_sp.cu", "fused/mma_sp.cuh", "fused/fused.cu", "fused/family.h", "device/cuda_check.h"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(CSRC / name, folder / name)
    shutil.copy(STANDINS / "device" / "mma_sync.cuh", folder / "device")
    if changed is not None:
        kernel = folder / "fused" / "mma_sp.cuh"
        before = kernel.read_text()
        assert before.count(changed[0]) == 1, changed[0]
        kernel.write_text(before.replace(*changed))
        table = folder / "fused" / "mma_sp.cu"
        tiles = re.findall(r"entry<[\d, ]+>\(\)", table.read_text())
        few = ", ".join(tiles[i] for i in (0, 4, 9))  # one, two and four warps along K
        start, _, rest = table.read_text().partition("all = {")
        start = start.replace("sparse_gemm<Fp8>", "nullptr")
        table.write_text(f"{start}all = {{{few}}};{rest.partition('};')[2]}")
    includes = [f"-I{path}" for path in (STANDINS, CSRC / "include", CSRC / "src", folder / "fused")]
    options = [
        "-std=c++17",
        "-O1" if changed is None else "-O0",
        "-fno-strict-aliasing",
        "-ffp-contract=off",
        "-fPIC",
        "-fvisibility=hidden",
    ]
    sources = [folder / "fused" / "mma_sp.cu", folder / "fused" / "fused.cu", STANDINS / "emulation.cpp"]
    out = folder / LIBRARY
    command = ["g++", *options, *includes, "-shared", "-o", out, "-x", "c++", *sources, CSRC / "src" / "status.cpp"]
    subprocess.run(command, check=True)
    return EmulatedLibrary(out)
