"""Opening the libraries that `kernels/build.py` compiles with nvcc: what is wrong with a file is one line."""

from __future__ import annotations

import ctypes
from pathlib import Path

from slidesparse.errors import SlideSparseError

BUILD = "run `python -m slidesparse.kernels.build`"


def open_library(path: Path, prefix: str, source: str, abi_version: int) -> ctypes.CDLL:
    """The library at `path`, compiled from `source`, whose functions begin with `prefix` (`ss_peak`).

    Raises SlideSparseError where the file is another library, or one of another interface version.
    """
    try:
        library = ctypes.CDLL(str(path))
        getattr(library, f"{prefix}_error").restype = ctypes.c_char_p
        found = getattr(library, f"{prefix}_abi_version")()
    except (OSError, AttributeError) as error:
        raise SlideSparseError(f"{path}: not the library of {source} ({error}); {BUILD}") from None
    if found != abi_version:
        raise SlideSparseError(f"{path}: interface version {found}, expected {abi_version}; {BUILD}")
    return library
