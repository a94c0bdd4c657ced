"""csrc/ and its Python side, as far as they go without a GPU: builds, loads, and says what is wrong in one line."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import build, fused_library, gemm_library, peak_library
from slidesparse.kernels.cublaslt import CublasLt

CSRC = Path(__file__).parent.parent / "csrc"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library built from csrc/; skipped where compiler or CUDA headers are missing."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    try:
        build.include_folders(build.header_roots())
    except UnsupportedHere as error:
        pytest.skip(str(error))
    return build.build(CSRC, tmp_path_factory.mktemp("lib"))


def test_loads_without_any_cuda_library(library: Path) -> None:
    loaded = gemm_library.GemmLibrary(library, None, None)
    assert loaded.versions() == {}
    assert loaded.plans_cached() == 0


def test_a_path_that_is_no_library_is_named(library: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "libcublasLt.so.13"
    wrong.write_text("not a library")
    with pytest.raises(SlideSparseError, match=str(wrong)):
        gemm_library.GemmLibrary(library, wrong, None)


def test_a_library_that_cannot_be_loaded_stops_only_what_needs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Built for another architecture: converting a checkpoint has no use for it."""
    path = tmp_path / gemm_library.LIBRARY
    path.write_text("another machine's")
    load = gemm_library.load.__wrapped__
    monkeypatch.setattr(gemm_library, "load", lambda: load(tmp_path))
    monkeypatch.setattr(gemm_library, "cublaslt_path", lambda: None)
    monkeypatch.setattr(gemm_library, "cusparselt_path", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SlideSparseError, match=rf"{path}.*run `python -m slidesparse.kernels.build`"):
        gemm_library.load()
    assert gemm_library.loaded_versions() == {}


FAKE_CUBLASLT = """
#include <stddef.h>
#include <stdlib.h>
int cublasLtCreate(void** made) { *made = &cublasLtCreate; return 0; }
size_t cublasLtGetVersion(void) { return 130100; }
const char* cublasLtGetStatusString(int status) { return status == 15 ? "not supported" : "broken"; }
#define MAKE(name) int name(void** made) { *made = &cublasLtCreate; return 0; }
MAKE(cublasLtMatmulDescCreate) MAKE(cublasLtMatrixLayoutCreate) MAKE(cublasLtMatmulPreferenceCreate)
#define PASS(name) int name(void) { return 0; }
PASS(cublasLtMatmulDescDestroy) PASS(cublasLtMatmulDescSetAttribute) PASS(cublasLtMatrixLayoutDestroy)
PASS(cublasLtMatmulPreferenceDestroy) PASS(cublasLtMatmulPreferenceSetAttribute)
PASS(cublasLtMatmulAlgoConfigGetAttribute) PASS(cublasLtMatmulAlgoCheck) PASS(cublasLtMatmul)
int cublasLtMatmulAlgoGetHeuristic(void) { return atoi(getenv("FAKE_CUBLASLT_STATUS")); }
"""
"""Knows no algorithm, for the reason that an environment variable gives."""
NOT_SUPPORTED, INTERNAL_ERROR = 15, 14


@pytest.fixture
def without_algorithms(
    library: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> gemm_library.GemmLibrary:
    folder = tmp_path_factory.getbasetemp() / "fake"  # one path: a process can use one build only
    folder.mkdir(exist_ok=True)
    built = folder / "libcublasLt.so.13"
    if not built.exists():
        (folder / "fake.c").write_text(FAKE_CUBLASLT)
        subprocess.run(["cc", "-w", "-shared", "-fPIC", "-o", built, folder / "fake.c"], check=True)
    loaded = gemm_library.GemmLibrary(library, built, None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(gemm_library, "load", lambda: loaded)
    CublasLt._listed.cache_clear()
    return loaded


@pytest.mark.usefixtures("without_algorithms")
def test_a_gpu_that_fuses_no_scales_has_layers_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUBLASLT_STATUS", str(NOT_SUPPORTED))
    assert CublasLt().scaled_algorithms(DType.FP8, 64, 128, 256, bias=True) == ()
    with pytest.raises(UnsupportedHere, match=r"cuBLASLt MatmulAlgoGetHeuristic M=64 N=128 K=256 INT8.*not supported"):
        CublasLt().algorithms(DType.INT8, 64, 128, 256)


@pytest.mark.usefixtures("without_algorithms")
def test_an_error_of_a_library_is_no_lack_of_support(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUBLASLT_STATUS", str(INTERNAL_ERROR))
    with pytest.raises(SlideSparseError, match="broken") as caught:
        CublasLt().scaled_algorithms(DType.FP8, 64, 128, 256, bias=True)
    assert not isinstance(caught.value, UnsupportedHere)


def touch_headers(folder: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_missing_headers_are_named(tmp_path: Path) -> None:
    touch_headers(tmp_path, build.HEADERS[:3])
    with pytest.raises(UnsupportedHere, match=r"no cusparse.h, cusparseLt.h: install"):
        build.include_folders([tmp_path])


def test_the_first_folder_with_a_header_wins(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, names in ((first, build.HEADERS[:2]), (second, build.HEADERS)):
        touch_headers(folder, names)
    assert build.include_folders([first, second]) == [first, second]
    assert build.include_folders([second, first]) == [second]


def test_not_built_says_how_to_build(tmp_path: Path) -> None:
    gemm_library.load.cache_clear()
    with pytest.raises(UnsupportedHere, match=r"not built; run `python -m slidesparse.kernels.build`"):
        gemm_library.load(tmp_path)


# -- python -m slidesparse.kernels.build ---------------------------------------------------------------


def fake_nvcc(folder: Path, codes: str, script: str = "exit 0") -> Path:
    """A program that lists architectures as nvcc does and otherwise runs `script`."""
    path = folder / "nvcc"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo "{codes}" && exit 0\n{script}\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`main` writes into this folder; the GEMM library builds."""
    monkeypatch.setattr(build, "__file__", str(tmp_path / "slidesparse" / "kernels" / "build.py"))
    monkeypatch.setattr(build, "build", lambda source, target: target / gemm_library.LIBRARY)
    return tmp_path / "slidesparse" / "kernels" / "lib"


def test_without_nvcc_a_line_each_says_what_is_left_out(
    libraries: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "find_nvcc", lambda: None)
    assert build.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(libraries / gemm_library.LIBRARY)
    assert lines[1].startswith("left out: libslidesparse_peak.so, for the tensor-core rates of `slidesparse calibrate`")
    assert lines[2].startswith("left out: libslidesparse_fused.so, for backend fused: no nvcc")
    assert all("install nvidia-cuda-nvcc" in line for line in lines[1:])
    assert len(lines) == 3


def test_with_nvcc_all_are_built_and_unknown_architectures_named_once(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An older CUDA than the newest GPU serves the GPUs that it knows."""
    called = tmp_path / "called"
    script = f'echo "$@" >> {called}; while [ "$1" != -o ]; do shift; done; echo code > "$2"'
    nvcc = fake_nvcc(tmp_path / "bin", "sm_80 sm_86 sm_89 sm_90 sm_100 sm_120", script)
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert build.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == str(libraries / peak_library.LIBRARY)
    assert lines[2] == f"left out: sm_121, which {nvcc} does not know"
    assert lines[3:] == [str(libraries / fused_library.LIBRARY)]
    assert (libraries / peak_library.LIBRARY).read_text() == "code\n"
    assert (libraries / fused_library.LIBRARY).read_text() == "code\n"
    calls = called.read_text().splitlines()
    assert not any("sm_121" in call for call in calls)
    linked = [call for call in calls if "-shared" in call]
    assert len(linked) == 2
    assert all("code=sm_90a" in call and "-cudart static" in call for call in linked)
    (hopper,) = [call for call in calls if call.endswith("fused/wgmma_gemm.cu")]
    assert re.findall(r",code=(\w+)", hopper) == ["sm_90a"], "no other GPU has these instructions"
    (common,) = [call for call in calls if call.endswith("fused/mma_sp.cu")]
    assert re.findall(r",code=(\w+)", common) == ["sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120"]


def test_named_architectures_are_all_that_is_built(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An image has code for the GPUs of its machines, and for all of them."""
    called = tmp_path / "called"
    script = f'echo "$@" >> {called}; while [ "$1" != -o ]; do shift; done; echo code > "$2"'
    nvcc = fake_nvcc(tmp_path / "bin", "sm_80 sm_90 sm_121", script)
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert build.main("121", "80") == 0
    assert set(re.findall(r",code=(\w+)", called.read_text())) == {"sm_80", "sm_121"}
    for found, named, said in ((nvcc, "75", "no architecture 75 for"), (None, "80", "no nvcc; install")):
        monkeypatch.setattr(build, "find_nvcc", lambda found=found: found)
        capsys.readouterr()
        assert build.main(named) == 1
        assert said in capsys.readouterr().err


def test_a_failing_nvcc_gives_its_first_error_and_leaves_no_library(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    nvcc = fake_nvcc(tmp_path / "bin", "sm_80", 'echo "a.cu(3): error: no such thing" >&2; exit 2')
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert build.main() == 1
    seen = capsys.readouterr()
    assert seen.out.splitlines() == [str(libraries / gemm_library.LIBRARY)], "the other library is built all the same"
    assert seen.err.splitlines() == [f"error: {nvcc} -std=c++17 failed: a.cu(3): error: no such thing"] * 2
    assert not (libraries / peak_library.LIBRARY).exists()
    assert not (libraries / fused_library.LIBRARY).exists()


def test_nvcc_is_looked_for_in_cuda_home_then_path_then_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, on_path = fake_nvcc(tmp_path / "home" / "bin", ""), fake_nvcc(tmp_path / "path", "")
    packaged = fake_nvcc(tmp_path / "nvidia" / "cu13" / "bin", "")
    monkeypatch.setattr(build, "_folders", lambda package: [tmp_path / package])
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PATH", str(tmp_path / "path"))
    assert build.find_nvcc() == home
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    assert build.find_nvcc() == on_path
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert build.find_nvcc() == packaged
    packaged.chmod(0o644)
    assert build.find_nvcc() is None, "a file that cannot be run is none"


def test_a_header_less_machine_still_builds_what_needs_nvcc(
    libraries: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(source: Path, target: Path) -> Path:
        raise UnsupportedHere("no cublasLt.h: install nvidia-cublas")

    monkeypatch.setattr(build, "build", fails)
    nvcc = fake_nvcc(tmp_path / "bin", "sm_80", 'while [ "$1" != -o ]; do shift; done; echo code > "$2"')
    monkeypatch.setattr(build, "find_nvcc", lambda: nvcc)
    assert build.main() == 1
    seen = capsys.readouterr()
    assert seen.out.splitlines()[0] == str(libraries / peak_library.LIBRARY)
    assert seen.out.splitlines()[-1] == str(libraries / fused_library.LIBRARY)
    assert seen.err == "error: no cublasLt.h: install nvidia-cublas\n"
