"""csrc/device compiles for every architecture and holds the instructions it says; its C interface, without a GPU."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import c_layout
import pytest
import torch

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import build, peak_library, peak_operands
from slidesparse.kernels.peak_library import Form, Loads, PeakLibrary

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
DEVICE_FILES = sorted((CSRC / "device").glob("*.cu"))
CAPABILITY = {"80": (8, 0), "86": (8, 6), "89": (8, 9), "90a": (9, 0), "100": (10, 0), "120": (12, 0), "121": (12, 1)}


@pytest.fixture(scope="module")
def nvcc() -> Path:
    """Fails where there is none: the pinned test packages bring one, so a machine without is set up wrongly."""
    found = build.find_nvcc()
    if found is not None:
        return found
    lock = (ROOT / "requirements" / "dev.lock").read_text()
    if "nvidia-cuda-nvcc" in lock:
        pytest.fail("requirements/dev.lock pins nvidia-cuda-nvcc, but there is no nvcc: `make env-dev`")
    pytest.skip(build.NO_NVCC)


@pytest.fixture(scope="module")
def library(nvcc: Path, tmp_path_factory: pytest.TempPathFactory) -> PeakLibrary:
    """Built for one architecture: what is tested here runs on the host."""
    return PeakLibrary(build.build_device(CSRC, tmp_path_factory.mktemp("lib"), nvcc, ("80",)))


def in_ptx(form: Form) -> str:
    """`wgmma.mma_async.sp m64n256k64 s32.s8.s8, ...` as PTX has it."""
    name, shape, types = re.match(r"(\S+) (\S+) (\S+),", form.instruction).groups()  # type: ignore[union-attr]
    if name.startswith("wgmma"):
        return f"{name}.sync.aligned.{shape}.{types} "
    name = name.replace("mma.sp", "mma.sp::ordered_metadata")
    return f"{name}.aligned.{shape}.row.col.{types}.{types.split('.')[0]} "


def test_all_architectures_are_named() -> None:
    assert set(CAPABILITY) == set(build.ARCHITECTURES)


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
def test_compiles_without_a_warning(nvcc: Path, library: PeakLibrary, architecture: str, tmp_path: Path) -> None:
    """And the code of an architecture holds every instruction that its forms name."""
    code = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
    strict = ["-Werror", "all-warnings", "--keep", "--keep-dir", str(tmp_path)]
    for file in DEVICE_FILES:
        cubin = tmp_path / f"{file.stem}.cubin"
        command = [*build.nvcc_command(nvcc, CSRC), *strict, code, "-cubin", "-o", str(cubin), str(file)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert cubin.stat().st_size > 0
    ptx = "".join(path.read_text() for path in tmp_path.glob("*.ptx"))
    assert f".target sm_{architecture}" in ptx
    for dtype in DType:
        for sparse in (False, True):
            try:
                forms = library.forms(CAPABILITY[architecture], dtype.torch, sparse)
            except UnsupportedHere:
                continue
            for form in forms:
                assert in_ptx(form) in ptx, form.instruction


def test_forms_differ_by_architecture(library: PeakLibrary) -> None:
    def names(capability: tuple[int, int], dtype: DType, sparse: bool) -> set[str]:
        return {form.instruction.split()[0] for form in library.forms(capability, dtype.torch, sparse)}

    for dtype in DType:
        assert names((9, 0), dtype, False) == {"wgmma.mma_async"}
        assert names((9, 0), dtype, True) == {"wgmma.mma_async.sp"}
        for capability in ((8, 9), (12, 0), (12, 1)):
            assert names(capability, dtype, False) == {"mma.sync"}
            assert names(capability, dtype, True) == {"mma.sp.sync"}
    assert names((8, 0), DType.INT8, True) == {"mma.sp.sync"}


@pytest.mark.parametrize(
    ("capability", "dtype", "reason"),
    [
        ((7, 5), DType.INT8, "2:4 tensor cores need compute capability 8.0 (Ampere), this is 7.5"),
        ((8, 6), DType.FP8, "FP8E4M3 needs compute capability 8.9 (Ada), this is 8.6"),
        ((10, 0), DType.INT8, "unmeasured: compute capability 10.0 multiplies by tcgen05 instructions"),
        ((10, 3), DType.FP8, "unmeasured: compute capability 10.3"),
    ],
)
def test_what_a_gpu_lacks_has_a_reason(
    library: PeakLibrary, capability: tuple[int, int], dtype: DType, reason: str
) -> None:
    with pytest.raises(UnsupportedHere, match=re.escape(reason)) as caught:
        library.forms(capability, dtype.torch, False)
    assert "\n" not in str(caught.value)


def test_sizes_of_a_form_are_those_of_its_instruction(library: PeakLibrary) -> None:
    """A rate is these sizes over time: they must be what is issued."""
    for capability in ((8, 9), (9, 0)):
        for dtype in DType:
            for sparse in (False, True):
                for form in library.forms(capability, dtype.torch, sparse):
                    m, n, k = map(int, re.search(r"m(\d+)n(\d+)k(\d+)", form.instruction).groups())  # type: ignore[union-attr]
                    assert form.rows % m == form.cols % n == 0
                    assert form.k == k * form.k_steps
                    assert k * dtype.torch.itemsize == (64 if sparse else 32)
                    units = re.search(r"(\d+) warp", form.instruction)
                    assert units is not None
                    assert form.units == int(units[1])


def test_a_type_without_tensor_cores_is_an_error(library: PeakLibrary) -> None:
    with pytest.raises(SlideSparseError, match="no tensor-core rate of FP32"):
        library.forms((9, 0), torch.float32, False)


def test_operands_are_checked_before_anything_is_launched(
    library: PeakLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: type("Stream", (), {"cuda_stream": 0}))
    form = library.forms((8, 0), torch.int8, True)[0]
    operands = peak_operands.exact_problem(form, 0, "cpu").operands
    with pytest.raises(SlideSparseError, match=r"^mma.sp.sync m16n8k64 .*: 0 iterations; at least 1$"):
        library.run(form, operands, 0)
    with pytest.raises(SlideSparseError, match="an operand is missing"):
        library.run(form, peak_library.Operands(operands.values, operands.b), 1)
    small = Loads(torch.zeros(4096, dtype=torch.uint8), torch.zeros(1, dtype=torch.int64))
    with pytest.raises(SlideSparseError, match="at least 1048576 bytes, it holds 4096"):
        library.run(form, operands, 1, small)


def test_not_built_says_how_to_build(tmp_path: Path) -> None:
    peak_library.load.cache_clear()
    with pytest.raises(UnsupportedHere, match=r"not built; run `python -m slidesparse.kernels.build`"):
        peak_library.load(tmp_path)


def test_a_file_that_is_no_library_is_named(tmp_path: Path) -> None:
    wrong = tmp_path / peak_library.LIBRARY
    wrong.write_text("not a library")
    with pytest.raises(SlideSparseError, match=f"{wrong}: not the library of csrc/device"):
        PeakLibrary(wrong)


def test_another_library_or_version_is_refused(library: PeakLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    libc = Path(next(line for line in Path("/proc/self/maps").read_text().split() if "libc.so" in line))
    with pytest.raises(SlideSparseError, match="not the library of csrc/device"):
        PeakLibrary(libc)
    path = Path(library._c._name)
    version = peak_library.ABI_VERSION
    monkeypatch.setattr(peak_library, "ABI_VERSION", version + 1)
    with pytest.raises(SlideSparseError, match=f"interface version {version}, expected {version + 1}; run `python"):
        PeakLibrary(path)


def test_the_structures_are_those_of_the_header(nvcc: Path, tmp_path: Path) -> None:
    """Sizes and offsets as a C compiler has them."""
    fields = {"ss_peak_form": peak_library._Form, "ss_peak_operands": peak_library._Operands}
    assert c_layout.compiled("slidesparse_peak.h", fields, tmp_path) == c_layout.in_python(fields)
