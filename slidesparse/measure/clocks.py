"""Which clock times a backend's work, and on how many sets of buffers."""

from __future__ import annotations

import gc

from slidesparse.kernels.backend import Backend
from slidesparse.measure.timer import Clock, WallClock


def clock_of(side: Backend) -> Clock:
    """CUDA events for a GPU, else the wall clock."""
    if side.device == "cuda":
        from slidesparse.measure.cuda_clock import CudaClock

        return CudaClock()
    return WallClock()


def buffer_sets(side: Backend, bytes_per_set: int) -> int:
    """Sets of buffers that calls take turns with. The CPU backends are timed on one: warm caches, as documented."""
    if side.device == "cuda":
        from slidesparse.measure.cuda_clock import sets_beyond_l2

        return sets_beyond_l2(bytes_per_set)
    return 1


def free_memory(side: Backend) -> None:
    """Give back what a failed or finished cell held, where it ran on a GPU."""
    if side.device == "cuda":
        free_gpu_memory()


def free_gpu_memory() -> None:
    """Give back what nothing uses.

    A traceback keeps buffers alive until cycles are collected; torch keeps the memory of tensors and CUDA graphs that
    are gone.
    """
    import torch

    gc.collect()
    torch.cuda.empty_cache()
