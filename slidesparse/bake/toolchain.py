"""The tools of this process that kernels are compiled with."""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterable

import triton
from triton.backends.nvidia import compiler
from triton.runtime import cache

from slidesparse.bake.cache import Toolchain


def toolchain(architectures: Iterable[int]) -> Toolchain:
    """Triton, Python, and ptxas for each architecture (two of them come with Triton)."""
    return Toolchain(
        triton.__version__,
        hashlib.sha256(cache.triton_key().encode()).hexdigest()[:8],
        str(sysconfig.get_config_var("EXT_SUFFIX")),
        {str(architecture): _ptxas(architecture) for architecture in sorted(architectures)},
    )


def _ptxas(architecture: int) -> str:
    told = compiler.get_ptxas_version(architecture)
    version = re.search(r"\bV(\d+\.\d+\.\d+)", told)
    return version[1] if version else told.strip()
