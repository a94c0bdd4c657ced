"""A Triton cache made without a GPU: every kernel that a profile launches, compiled before it is first launched."""

from __future__ import annotations

import importlib.util

from slidesparse.errors import UnsupportedHere


def require_triton() -> None:
    """Raises UnsupportedHere where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        raise UnsupportedHere("triton is not installed; install it with the CUDA build of torch (make TORCH=cuda env)")
