"""Operands of the tensor-core microbenchmark: random 2:4 ones, their metadata registers, and what their product is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from slidesparse.kernels.peak_library import Form, Operands

PAIRS = torch.tensor([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], dtype=torch.uint8)
"""Places of the two kept values in a group of four: ascending, as the instruction wants them."""
LARGEST = 4.5
"""Standard deviations that the largest INT8 or FP8 code stands for, so that random data fills the type's range."""
UNUSED = 0x44444444
"""Metadata of threads that are not read: valid pairs (0, 1), as every register must hold."""


@dataclass(frozen=True)
class Problem:
    """Operands as the library takes them, and the places of the kept values behind their metadata."""

    form: Form
    operands: Operands
    places: torch.Tensor | None
    """Sparse: uint8 [units, rows, k / 4, 2]; the same for all stages."""

    def product(self, iterations: int) -> torch.Tensor:
        """float64 [units, rows, cols]: what a run of so many iterations must give."""
        form = self.form
        a, b = self.operands.values.double(), self.operands.b.double()
        if self.places is not None:
            a = expand(a, self.places)
        total = torch.zeros((form.units, form.rows, form.cols), dtype=torch.float64, device=a.device)
        for stage in range(form.stages):
            times = len(range(stage, iterations, form.stages))
            total += times * (a[stage] @ b[stage].T)
        return total


def random_problem(form: Form, seed: int, device: str) -> Problem:
    """Normal random values (zeros would draw less power), every group of a sparse operand with two kept places."""
    generator = torch.Generator().manual_seed(seed)
    return _problem(form, lambda shape: _normal(torch.randn(shape, generator=generator), form.dtype), generator, device)


def exact_problem(form: Form, seed: int, device: str) -> Problem:
    """Integers whose products and short sums every accumulator holds exactly: INT8's whole range, -2 to 2 elsewhere.

    FP8 tensor cores keep about 13 bits below the largest term: exact up to 2**13 / 4 = 2048 products.
    """
    generator = torch.Generator().manual_seed(seed)
    limit = 127 if form.dtype is torch.int8 else 2

    def integers(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).float().to(form.dtype)

    return _problem(form, integers, generator, device)


def expand(values: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Kept values [stages, units, rows, k / 2] at their places [units, rows, k / 4, 2] -> [stages, units, rows, k]."""
    stages, units, rows, kept = values.shape
    full = values.new_zeros((stages, units, rows, kept // 2, 4))
    index = places.long().expand(stages, units, rows, kept // 2, 2)
    full.scatter_(-1, index, values.reshape(stages, units, rows, kept // 2, 2))
    return full.reshape(stages, units, rows, 2 * kept)


def metadata_words(places: torch.Tensor, form: Form) -> torch.Tensor:
    """Places [units, rows, k / 4, 2] -> int32 [k_steps, units, rows / 16, 32], one register a thread of a warp.

    Quad q of a warp's threads has rows q and q + 8 of 16. A group's two places take 4 bits, the first the lower two,
    groups ascending with the bits (PTX ISA, "Matrix fragments ... with sparse matrix A"):
        8-bit types (16 groups a step): thread 0 has row q, groups 0 to 7; thread 1 row q + 8, groups 0 to 7; threads 2
        and 3 the same rows, groups 8 to 15.
        16-bit types (8 groups a step): thread 0 has groups 0 to 3, of row q in its low half, of row q + 8 in its high
        half; thread 1 groups 4 to 7; threads 2 and 3 are not read.
    """
    units, rows, groups, _ = places.shape
    nibbles = places[..., 0].long() | places[..., 1].long() << 2
    # [units, blocks, high row, quad, step, part, group]: a part is what one register (or half of one) holds of a row.
    wide = form.dtype.itemsize == 2
    part = 4 if wide else 8
    nibbles = nibbles.reshape(units, rows // 16, 2, 8, form.k_steps, groups // form.k_steps // part, part)
    bits = (nibbles << 4 * torch.arange(part, device=places.device)).sum(-1)
    bits = bits.permute(4, 0, 1, 3, 5, 2)  # [step, unit, block, quad, part, high row]
    if wide:
        pair = bits[..., 0] | bits[..., 1] << 16
        words = torch.cat([pair, torch.full_like(pair, UNUSED)], dim=-1)
    else:
        words = bits.flatten(-2)
    words = words.reshape(form.k_steps, units, rows // 16, 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _problem(
    form: Form, draw: Callable[[tuple[int, ...]], torch.Tensor], generator: torch.Generator, device: str
) -> Problem:
    kept = form.k // 2 if form.sparse else form.k
    values = draw((form.stages, form.units, form.rows, kept)).to(device)
    b = draw((form.stages, form.cols, form.k)).to(device)
    if not form.sparse:
        return Problem(form, Operands(values, b), None)
    choice = torch.randint(0, len(PAIRS), (form.units, form.rows, form.k // 4), generator=generator)
    places = PAIRS[choice].to(device)
    return Problem(form, Operands(values, b, metadata_words(places, form)), places)


def _normal(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype is torch.int8:
        return (values * (127 / LARGEST)).round().clamp(-127, 127).to(dtype)
    if dtype is torch.float8_e4m3fn:
        return (values * (448 / LARGEST)).clamp(-448, 448).to(dtype)
    return values.to(dtype)
