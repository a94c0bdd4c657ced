"""Python side of `csrc/device`: a library that issues matrix instructions and does nothing else with them.

One run: every multiprocessor's units (warps or warpgroups) compute
    out[unit] = sum over i < iterations of a[i % stages, unit] @ b[i % stages].T
on operands that lie ready in shared memory or registers. Every error is one line.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from slidesparse.errors import SlideSparseError, UnsupportedHere
from slidesparse.kernels.gemm_library import TYPES
from slidesparse.kernels.native import open_library

ABI_VERSION = 1
LIBRARY = "libslidesparse_peak.so"
MAX_FORMS = 16


class _Form(ctypes.Structure):
    _fields_ = (
        ("instruction", ctypes.c_char * 120),
        *((name, ctypes.c_int32) for name in ("family", "type", "sparse", "units", "rows", "cols")),
        *((name, ctypes.c_int32) for name in ("k", "k_steps", "stages")),
    )


class _Operands(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("a", "b", "metadata", "source")),
        ("source_bytes", ctypes.c_size_t),
        *((name, ctypes.c_void_p) for name in ("loaded", "out")),
    )


@dataclass(frozen=True)
class Form:
    """One way to issue the instruction. Sizes in elements; `k` counts the zeros of a sparse operand too."""

    instruction: str
    family: int
    dtype: torch.dtype
    sparse: bool
    units: int
    """Warps or warpgroups of one block."""
    rows: int
    cols: int
    """Of one unit's tile."""
    k: int
    """Of one stage; an iteration multiplies one."""
    k_steps: int
    """Instructions along it."""
    stages: int

    @property
    def operations(self) -> float:
        """2*M*N*K of one iteration on one multiprocessor."""
        return 2.0 * self.units * self.rows * self.cols * self.k

    @property
    def sum_dtype(self) -> torch.dtype:
        return torch.int32 if self.dtype is torch.int8 else torch.float32


@dataclass(frozen=True)
class Operands:
    """Tensors on one GPU, contiguous. `values` and `b` are of the form's type."""

    values: torch.Tensor
    """[stages, units, rows, k]; sparse: the kept ones, [..., k / 2]."""
    b: torch.Tensor
    """[stages, cols, k]."""
    metadata: torch.Tensor | None = None
    """Sparse: int32 [k_steps, units, rows / 16, 32] (`peak_operands.metadata_words`)."""


@dataclass(frozen=True)
class Loads:
    """What other threads of each block load into shared memory all the while."""

    source: torch.Tensor
    """Bytes, uint8, small enough for the L2 cache."""
    loaded: torch.Tensor
    """int64 [1]: bytes loaded are added."""


class PeakLibrary:
    """The loaded library. Use `load()`."""

    def __init__(self, path: Path) -> None:
        self._c = open_library(path, "ss_peak", "csrc/device", ABI_VERSION)

    def forms(self, capability: tuple[int, int], dtype: torch.dtype, sparse: bool) -> list[Form]:
        """What is worth trying on a GPU of this compute capability. Needs no GPU.

        Raises UnsupportedHere where such a GPU lacks the type, or no microbenchmark of its instructions is written.
        """
        room, found = (_Form * MAX_FORMS)(), ctypes.c_int(0)
        number = capability[0] * 10 + capability[1]
        self._call("ss_peak_forms", number, TYPES[dtype], int(sparse), room, MAX_FORMS, ctypes.byref(found))
        if not found.value:
            raise UnsupportedHere(self._error())
        return [_form(entry, dtype) for entry in room[: found.value]]

    def run(
        self,
        form: Form,
        operands: Operands,
        iterations: int,
        loads: Loads | None = None,
        out: torch.Tensor | None = None,
    ) -> int:
        """Launch on torch's current device and stream; returns the number of multiprocessors that work on it.

        `out` [units, rows, cols] of `form.sum_dtype` takes the first multiprocessor's sums. Raises SlideSparseError.
        """
        arguments = _Operands(
            a=operands.values.data_ptr(),
            b=operands.b.data_ptr(),
            metadata=None if operands.metadata is None else operands.metadata.data_ptr(),
            out=None if out is None else out.data_ptr(),
        )
        if loads is not None:
            arguments.source, arguments.source_bytes = loads.source.data_ptr(), loads.source.nbytes
            arguments.loaded = loads.loaded.data_ptr()
        multiprocessors = ctypes.c_int(0)
        self._call(
            "ss_peak_run", ctypes.byref(_c_form(form)), ctypes.byref(arguments), torch.cuda.current_device(),
            iterations, ctypes.byref(multiprocessors), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        )  # fmt: skip
        return multiprocessors.value

    def _call(self, name: str, *arguments: object) -> None:
        if getattr(self._c, name)(*arguments) != 0:
            raise SlideSparseError(self._error())

    def _error(self) -> str:
        return str(self._c.ss_peak_error().decode())


@lru_cache(maxsize=1)
def load(folder: Path | None = None) -> PeakLibrary:
    """The library built from csrc/device.

    Raises:
        UnsupportedHere: not built (says what to do).
        SlideSparseError: the file there is another library, or of another version.
    """
    path = (folder or Path(__file__).parent / "lib") / LIBRARY
    if not path.exists():
        raise UnsupportedHere(f"{path}: not built; run `python -m slidesparse.kernels.build` where there is an nvcc")
    return PeakLibrary(path)


def _form(c: _Form, dtype: torch.dtype) -> Form:
    sizes = c.units, c.rows, c.cols, c.k, c.k_steps, c.stages
    return Form(c.instruction.decode(), c.family, dtype, bool(c.sparse), *sizes)


def _c_form(form: Form) -> _Form:
    sizes = form.units, form.rows, form.cols, form.k, form.k_steps, form.stages
    return _Form(form.instruction.encode(), form.family, TYPES[form.dtype], int(form.sparse), *sizes)
