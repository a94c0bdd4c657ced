"""Baking for another CPU: Triton's keys there, made here.

Compiling under an emulator takes hours, and machine code of a GPU does not depend on the CPU. A key does: it holds a
hash of the compiled library of Triton and what its two assemblers say of themselves, and those are other files in the
package for another CPU. They are read from that package, which must be of the same release: the rest is compared.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.nvidia import compiler
from triton.runtime import cache

from slidesparse.errors import ConfigError

LIBRARY = Path("_C") / "libtriton.so"
TOOLS = Path("backends") / "nvidia" / "bin"
LIBDEVICE = Path("backends") / "nvidia" / "lib" / "libdevice.10.bc"
FROM_BLACKWELL = 100
"""Architectures from here on have an assembler of their own."""
BUILT = re.compile(rb"[A-Z][a-z]{2}_[A-Z][a-z]{2}_\d\d_\d\d:\d\d:\d\d_P[DS]T_\d{4}")
BLOCK = 1 << 20


@dataclass(frozen=True)
class OtherCpu:
    """What goes into keys on that machine."""

    triton: str
    """Triton's own part of every key."""
    ptxas: str
    """What the assembler says of itself."""
    ptxas_blackwell: str

    def take_on(self) -> None:
        """This process makes keys of that machine from now on."""
        cache.triton_key = lambda: self.triton
        compiler.get_ptxas_version = lambda arch=80: self.ptxas_blackwell if arch >= FROM_BLACKWELL else self.ptxas


@contextmanager
def taking_on(other: OtherCpu | None) -> Iterator[None]:
    """As `OtherCpu.take_on`, as long as the block lasts; None: the keys of this machine."""
    before = cache.triton_key, compiler.get_ptxas_version
    if other is not None:
        other.take_on()
    try:
        yield
    finally:
        cache.triton_key, compiler.get_ptxas_version = before


def read(package: Path) -> OtherCpu:
    """package: the folder `triton` of an unpacked wheel. Raises ConfigError when it is not of the release that is
    installed here."""
    here = Path(triton.__file__).parent
    if not (package / LIBRARY).is_file():
        raise ConfigError(f"{package}: no {LIBRARY}; give the folder `triton` of an unpacked wheel")
    for path in (*sorted(here.rglob("*.py")), here / LIBDEVICE):
        other = package / path.relative_to(here)
        if not other.is_file() or other.read_bytes() != path.read_bytes():
            raise ConfigError(f"{other}: not that of Triton {triton.__version__}, which is installed here; unpack that")
    return OtherCpu(
        cache.triton_key().replace(_hash(here / LIBRARY), _hash(package / LIBRARY)),
        _said(package / TOOLS / "ptxas", FROM_BLACKWELL - 1),
        _said(package / TOOLS / "ptxas-blackwell", FROM_BLACKWELL),
    )


def _said(tool: Path, architecture: int) -> str:
    """What `tool --version` would print: what the one here prints, but for the time at which it was built."""
    content, said = tool.read_bytes(), compiler.get_ptxas_version(architecture)
    version = re.search(r"release .*", said)
    built = sorted(set(BUILT.findall(content)))
    if version is None or version[0].encode() not in content or len(built) != 1:
        raise ConfigError(f"{tool}: not {version[0] if version else said}, as here; unpack Triton {triton.__version__}")
    return re.sub(BUILT.pattern.decode(), built[0].decode(), said)


def _hash(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            hashed.update(block)
    return hashed.hexdigest()
