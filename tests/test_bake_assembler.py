"""torch.compile brings another assembler into a process: keys of the Triton cache must not follow it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton")

DIGESTS = """
import os, sys
from slidesparse.bake import assembler, launches
from slidesparse.bake.specialisation import trace
from slidesparse.dtypes import DType
if "settle" in sys.argv:
    assembler.settle({architecture})
if "other" in sys.argv:
    os.environ["TRITON_PTXAS_PATH"] = {other!r}  # as torch.compile does
    from triton import knobs
    assert knobs.nvidia.ptxas.path == {other!r}
for one in trace({architecture}, lambda: launches.quantise(DType.INT8, None, 64, (64,))):
    print(one.digest)
"""


@pytest.fixture
def digests(tmp_path: Path) -> Callable[..., list[str]]:
    """Digests of some launches in a new process, after the words given."""
    other = tmp_path / "ptxas"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 99.9, V99.9.99'\n")
    other.chmod(0o755)
    program = DIGESTS.format(architecture=90, other=str(other))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", program, *words], env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    return run


def test_keys_stay_when_torch_brings_its_own(digests: Callable[..., list[str]]) -> None:
    first = digests()
    assert first
    assert not set(digests("other")) & set(first), "else there is nothing to guard against"
    assert digests("settle", "other") == first
