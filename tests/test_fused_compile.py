"""csrc/fused compiles for every architecture without a warning, keeps its sums in registers, and is one library."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import c_layout
import pytest
import torch
from test_device_code import CSRC, nvcc  # noqa: F401 - a fixture

from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import build, fused_library
from slidesparse.kernels.fused_library import Family, FusedLibrary

INSTRUCTION = "mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col"
INT8, FP8 = f"{INSTRUCTION}.s32.s8.s8.s32", f"{INSTRUCTION}.f32.e4m3.e4m3.f32"
WITHOUT_FP8 = ("80", "86")
EMULATED_FP8 = ("90a", "100")
"""The instruction is there, made of others that want many registers: correct, slow, and no family of choice."""


@pytest.fixture(scope="module")
def library(nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> FusedLibrary:  # noqa: F811
    """For one architecture: what is tested here runs on the host."""
    return FusedLibrary(build.build_fused(CSRC, tmp_path_factory.mktemp("lib"), nvcc, ("80",)))


Tile = tuple[int, ...]
"""Type, Channels, Tokens, warps along channels, tokens and K, Stages: what a kernel's template was given."""


def compiled(nvcc: Path, name: str, architecture: str, folder: Path) -> tuple[str, dict[Tile, tuple[int, int]]]:  # noqa: F811
    """PTX, and by kernel how many bytes it spills and how many registers it has."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    strict = ["-Werror", "all-warnings", "-Xptxas", "-v", "--keep", "--keep-dir", str(folder)]
    command = [*build.nvcc_command(nvcc, CSRC), *strict, code, "-cubin", "-o", str(folder / "code.cubin")]
    done = subprocess.run([*command, str(CSRC / "fused" / f"{name}.cu")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = re.findall(
        r"Compiling entry function '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers",
        done.stderr,
        re.DOTALL,
    )
    kernels = {
        tuple(map(int, re.findall(r"Li(\d+)E", kernel))): (int(stores) + int(loads), int(registers))
        for kernel, stores, loads, registers in found
    }
    return (folder / f"{name}.ptx").read_text(), kernels


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_mma_kernels_compile_and_spill_nothing(nvcc: Path, architecture: str, tmp_path: Path) -> None:  # noqa: F811
    ptx, kernels = compiled(nvcc, "mma_sp", architecture, tmp_path)
    assert f".target sm_{architecture}" in ptx
    assert INT8 in ptx
    assert (FP8 in ptx) == (architecture not in WITHOUT_FP8)
    int8 = {tile: use for tile, use in kernels.items() if tile[0] == 0}
    assert len(int8) == len(kernels) - len(int8) == 12
    looked_at = int8 if architecture in EMULATED_FP8 else kernels
    assert {tile: use for tile, use in looked_at.items() if use[0]} == {}, "kernels that spill"
    # Those that split K are of 128 or 256 threads: two blocks of either share the 65536 registers of a multiprocessor.
    splitting = [registers for tile, (_, registers) in int8.items() if tile[5] > 1]
    assert max(splitting) <= 128


def test_the_c_interface_compiles(nvcc: Path, tmp_path: Path) -> None:  # noqa: F811
    compiled(nvcc, "fused", "80", tmp_path)


# -- the library, without a GPU --------------------------------------------------------------------------------------


def test_families_answer_for_their_own_gpus(library: FusedLibrary) -> None:
    size = 4096, 2560, 2560
    for capability in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0), (12, 1)):
        assert library.configs(capability, *size, torch.int8, Family.MMA)
        if capability[0] == 9:
            assert library.configs(capability, *size, torch.int8, Family.WGMMA)
        else:
            with pytest.raises(UnsupportedHere, match="Hopper"):
                library.configs(capability, *size, torch.int8, Family.WGMMA)


def test_a_family_that_does_not_exist_is_an_error(library: FusedLibrary) -> None:
    with pytest.raises(SlideSparseError, match=r"no family of number 7$"):
        library.configs((8, 0), 16, 64, 64, torch.int8, 7)  # type: ignore[arg-type]


def test_a_list_that_is_too_short_is_cut(library: FusedLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [config.name for config in library.configs((8, 0), 64, 64, 64, torch.int8, Family.MMA)]
    monkeypatch.setattr(fused_library, "MAX_CONFIGS", 2)
    assert [config.name for config in library.configs((8, 0), 64, 64, 64, torch.int8, Family.MMA)] == names[:2]


def test_a_launch_without_a_gpu_is_one_line(library: FusedLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    config = library.configs((8, 0), 16, 64, 64, torch.int8, Family.MMA)[0]
    x, out = torch.zeros(16, 64, dtype=torch.int8), torch.zeros(16, 64, dtype=torch.bfloat16)
    scale, packed = torch.ones(64), torch.zeros(1 << 20, dtype=torch.uint8)
    with pytest.raises(SlideSparseError, match=r"^CUDA cudaGetDevice: ") as caught:
        library.gemm(config, x, packed, scale, scale, None, out, family=Family.MMA, n=64, k=64)
    assert "\n" not in str(caught.value)


def test_not_built_says_how_to_build(tmp_path: Path) -> None:
    fused_library.load.cache_clear()
    with pytest.raises(UnsupportedHere, match=r"not built; run `python -m slidesparse.kernels.build`"):
        fused_library.load(tmp_path)


def test_another_library_or_version_is_refused(
    library: FusedLibrary, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / fused_library.LIBRARY
    wrong.write_text("not a library")
    with pytest.raises(SlideSparseError, match=f"{wrong}: not the library of csrc/fused"):
        FusedLibrary(wrong)
    version = fused_library.ABI_VERSION
    monkeypatch.setattr(fused_library, "ABI_VERSION", version + 1)
    with pytest.raises(SlideSparseError, match=f"interface version {version}, expected {version + 1}; run `python"):
        FusedLibrary(Path(library._c._name))


def test_the_structures_are_those_of_the_header(tmp_path: Path) -> None:
    """Sizes and offsets as a C compiler has them."""
    fields = {
        "ss_fused_problem": fused_library._Problem,
        "ss_fused_config": fused_library._Config,
        "ss_fused_operands": fused_library._Operands,
    }
    assert c_layout.compiled("slidesparse_fused.h", fields, tmp_path) == c_layout.in_python(fields)
