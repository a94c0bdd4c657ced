"""A GPU made of Python, for tests of the rates: its tensor cores, its clock that falls, its library."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.peak_library import Form, Loads, Operands
from slidesparse.measure.timer import Call

MULTIPROCESSORS = 10
OPERATIONS_PER_S = 1e12
COPY_S = 1e-3


def form(dtype: DType, sparse: bool, units: int = 2) -> Form:
    """Small, with what the real ones have: several stages, steps and units."""
    k = (128 if sparse else 64) // dtype.torch.itemsize
    return Form(f"mma of {units} units", 0, dtype.torch, sparse, units, 32, 8, k, 2, 3)


def metadata_as_hardware_reads_it(words: torch.Tensor, form: Form) -> torch.Tensor:
    """Registers [k_steps, units, rows / 16, 32] -> places [units, rows, k / 4, 2], thread by thread, bit by bit."""
    groups = form.k // form.k_steps // 4
    places = torch.zeros((form.units, form.rows, form.k // 4, 2), dtype=torch.uint8)
    for step, unit, block, thread in torch.cartesian_prod(*(torch.arange(n) for n in words.shape)).tolist():
        register = int(words[step, unit, block, thread]) % 2**32
        for nibble in range(8):
            pair = register >> 4 * nibble & 0xF
            if form.dtype.itemsize == 1:
                row, group = thread // 4 + 8 * (thread % 2), 8 * (thread % 4 // 2) + nibble
            elif thread % 4 < 2:
                row, group = thread // 4 + 8 * (nibble // 4), 4 * (thread % 4) + nibble % 4
            else:
                continue
            where = unit, 16 * block + row, step * groups + group
            places[where] = torch.tensor([pair & 3, pair >> 2])
    return places


class FakeLibrary:
    """Multiplies on the CPU; a launch takes the time that its operations take at `OPERATIONS_PER_S`."""

    def __init__(self) -> None:
        self.seconds = 0.0
        """Of the launch before."""
        self.wrong: str = ""
        """Instructions that are wrong in one element."""

    def forms(self, capability: tuple[int, int], dtype: torch.dtype, sparse: bool) -> list[Form]:
        if dtype is torch.float8_e4m3fn and capability < (8, 9):
            raise UnsupportedHere("FP8E4M3 needs compute capability 8.9")
        kind = next(kind for kind in DType if kind.torch is dtype)
        return [form(kind, sparse, units) for units in (1, 2)]

    def run(
        self,
        form: Form,
        operands: Operands,
        iterations: int,
        loads: Loads | None = None,
        out: torch.Tensor | None = None,
    ) -> int:
        busy = form.units / 2  # of one unit tensor cores idle half the time
        self.seconds = form.operations * iterations * MULTIPROCESSORS / (OPERATIONS_PER_S * busy)
        if loads is not None:
            loads.loaded.add_(round(self.seconds * 5e9))
        if out is not None:
            out.copy_(self.product(form, operands, iterations))
            if self.wrong and self.wrong in form.instruction:
                out[0, 1, 2] += 1
        return MULTIPROCESSORS

    def product(self, form: Form, operands: Operands, iterations: int) -> torch.Tensor:
        a = operands.values.double()
        if operands.metadata is not None:
            places = metadata_as_hardware_reads_it(operands.metadata, form)
            full = torch.zeros((form.stages, form.units, form.rows, form.k), dtype=torch.float64)
            for group in range(form.k // 4):
                for i in range(2):
                    index = (4 * group + places[:, :, group, i].long())[None, :, :, None].expand(form.stages, -1, -1, 1)
                    full.scatter_(-1, index, a[..., 2 * group + i : 2 * group + i + 1])
            a = full
        b = operands.b.double()
        return sum(a[i % form.stages] @ b[i % form.stages].T for i in range(iterations))  # type: ignore[return-value]


class FakeClock:
    """A GPU that has rested (it does while launches are prepared) runs 25 % faster for 0.2 s of what is timed."""

    batch = 4

    def __init__(self, library: FakeLibrary) -> None:
        self._library, self._now, self._rested = library, 0.0, 0.0

    def now(self) -> float:
        return self._now

    def prepare(self, calls: Sequence[Call], brief: bool = False) -> Call:
        self._rested = self._now
        self._library.seconds = 0.0
        calls[0]()
        seconds = self._library.seconds or COPY_S

        def call() -> float:
            calls[0]() if self._library.seconds else None  # launches that load must count
            return seconds

        return call

    def times(self, calls: Sequence[Call]) -> list[float]:
        taken = []
        for call in calls:
            seconds = float(call()) * (0.8 if self._now < self._rested + 0.2 else 1.0)  # type: ignore[arg-type]
            self._now += seconds
            taken.append(seconds)
        return taken
