"""Operands of the microbenchmark and their product; the copy kernel; and, on a GPU, every instruction that is timed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from fake_gpu import FakeLibrary, form

from slidesparse.dtypes import DType
from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels import peak_library, peak_operands, triton_copy
from slidesparse.measure import rates

REAL = [(dtype, sparse) for dtype in DType for sparse in (False, True)]


@pytest.mark.parametrize(("dtype", "sparse"), REAL)
def test_the_product_is_that_of_the_expanded_operands(dtype: DType, sparse: bool) -> None:
    """Against an emulation that reads the metadata registers as the hardware does."""
    problem = peak_operands.exact_problem(form(dtype, sparse), 3, "cpu")
    expected = FakeLibrary().product(problem.form, problem.operands, 7)
    assert torch.equal(problem.product(7), expected)
    assert float(problem.product(7).abs().max()) > 0


@pytest.mark.parametrize(("dtype", "sparse"), [case for case in REAL if case[1]])
def test_every_metadata_register_holds_valid_pairs(dtype: DType, sparse: bool) -> None:
    """Two equal places are undefined behaviour, also in registers that should not be read."""
    metadata = peak_operands.random_problem(form(dtype, sparse), 5, "cpu").operands.metadata
    assert metadata is not None
    valid = {first | second << 2 for first in range(4) for second in range(first + 1, 4)}
    registers = {int(word) % 2**32 for word in metadata.flatten()}
    assert {register >> shift & 0xF for register in registers for shift in range(0, 32, 4)} == valid


@pytest.mark.parametrize(("dtype", "sparse"), REAL)
def test_timed_operands_are_random_and_fill_the_types_range(dtype: DType, sparse: bool) -> None:
    problem = peak_operands.random_problem(form(dtype, sparse), 1, "cpu")
    for values in (problem.operands.values.float(), problem.operands.b.float()):
        assert torch.isfinite(values).all()
        assert (values != 0).float().mean() > 0.95
        spread = float(values.std())
        assert spread == pytest.approx(dtype.limit / 4.5 if dtype.quantised else 1.0, rel=0.1)


@pytest.mark.parametrize("launch", triton_copy.LAUNCHES, ids=str)
def test_the_copy_kernel_copies_everything(launch: triton_copy.Launch) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    source = torch.randint(256, (2 * triton_copy.GRAIN,), dtype=torch.uint8, device=device)
    target = source.bitwise_not()
    triton_copy.copy(source, target, launch)
    assert torch.equal(source, target)


def test_the_copy_kernel_refuses_what_it_would_not_cover() -> None:
    source = torch.zeros(triton_copy.GRAIN + 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="multiple of"):
        triton_copy.copy(source, source.clone(), triton_copy.LAUNCHES[0])


# -- on a GPU ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built() -> Iterator[peak_library.PeakLibrary]:
    peak_library.load.cache_clear()
    try:
        yield peak_library.load()
    except UnsupportedHere as error:
        pytest.skip(str(error))


@pytest.mark.gpu
@pytest.mark.parametrize("capability", [None, (8, 9)], ids=["own forms", "mma.sync forms"])
@pytest.mark.parametrize(("dtype", "sparse"), REAL)
@pytest.mark.parametrize("loads", [False, True])
def test_every_form_multiplies_right(
    built: peak_library.PeakLibrary, capability: tuple[int, int] | None, dtype: DType, sparse: bool, loads: bool
) -> None:
    """mma.sync runs on later GPUs too, if slowly: so it is checked where only such a GPU is at hand."""
    here = torch.cuda.get_device_capability()
    rig = rates.Rig.here()
    stream = rates._loads(rig, 0) if loads else None
    try:
        forms = built.forms(capability or here, dtype.torch, sparse)
    except UnsupportedHere as error:
        pytest.skip(str(error))
    for each in forms:
        rates._verify(each, built, stream, "cuda", 11)
    torch.cuda.synchronize()
    assert stream is None or int(stream.loaded) > 0


@pytest.mark.gpu
def test_a_form_of_another_gpu_is_refused(built: peak_library.PeakLibrary) -> None:
    here = torch.cuda.get_device_capability()
    if here[0] == 9:
        pytest.skip("this GPU has wgmma")
    foreign = built.forms((9, 0), torch.int8, False)[0]
    problem = peak_operands.exact_problem(foreign, 0, "cuda")
    with pytest.raises(SlideSparseError, match="not on compute capability"):
        built.run(foreign, problem.operands, 1)
