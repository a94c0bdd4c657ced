"""A driver for Triton that stands for a GPU of any architecture: kernels are bound and compiled for it, never run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

WARP = 32


class StubDriver:
    """What Triton's JIT asks of a driver before it launches. The device's number is its architecture: Triton keeps what
    it has compiled by device."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, WARP)


@contextmanager
def standing_for(architecture: int) -> Iterator[None]:
    """Triton compiles for `architecture` (90: compute capability 9.0) as long as the block lasts."""
    # Its public way back makes a real driver, which cannot be had without a GPU.
    before = driver._active
    driver.set_active(StubDriver(architecture))
    try:
        yield
    finally:
        driver.set_active(before)
