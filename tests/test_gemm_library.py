"""csrc/ and its Python side, as far as they go without a GPU: builds, loads, and says what is wrong in one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import build, gemm_library

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
