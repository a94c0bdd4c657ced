"""The C launchers of Triton: small extension modules, one for each list of argument types, and one for the driver.

Triton compiles them with the host's C compiler at the first launch and links them to the GPU driver's library. Here
they are compiled where there may be no driver, against a library of empty functions of the same name.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from triton.backends.nvidia import driver as nvidia
from triton.runtime.build import compile_module_from_src, platform_key

from slidesparse.bake.cache import holds_file
from slidesparse.bake.specialisation import Specialisation
from slidesparse.errors import SlideSparseError, UnsupportedHere

DRIVER_LIBRARY = "libcuda.so.1"


@dataclass(frozen=True)
class Launcher:
    """One extension module."""

    name: str
    source: str

    @property
    def digest(self) -> str:
        """SHA-256 of Triton's cache key, hexadecimal."""
        return hashlib.sha256((self.source + platform_key()).encode()).hexdigest()

    @property
    def filename(self) -> str:
        return f"{self.name}{sysconfig.get_config_var('EXT_SUFFIX')}"


def launchers(specialisations: Iterable[Specialisation]) -> tuple[Launcher, ...]:
    """Those that launching the specialisations takes, each once. None for no specialisations."""
    signatures = dict.fromkeys(one.signature for one in specialisations)
    if not signatures:
        return ()
    utilities = Launcher("cuda_utils", (Path(nvidia.dirname) / "driver.c").read_text())
    return (utilities, *dict.fromkeys(Launcher("__triton_launcher", _source(one)) for one in signatures))


def compile_missing(wanted: Iterable[Launcher], cache: Path) -> None:
    """Compile into Triton's cache, which is `cache`, what is not there.

    Only for a process that never launches anything: the empty driver library stays loaded.

    Raises:
        UnsupportedHere: no C compiler.
        SlideSparseError: it refuses, with its own first line.
    """
    missing = [one for one in wanted if not holds_file(cache, one.digest, one.filename)]
    if not missing:
        return
    with empty_driver_library() as room:
        for one in missing:
            folders = [nvidia.libdevice_dir, str(room)]
            # Triton compiles in a folder of a random name, which __FILE__ would repeat: a bake is the same each time.
            same = ["-Wno-builtin-macro-redefined", f'-D__FILE__="{one.name}.c"']
            compile_module_from_src(one.source, one.name, folders, nvidia.include_dirs, nvidia.libraries, same)


def _source(signature: tuple[str, ...]) -> str:
    source: str = nvidia.make_launcher({}, dict(enumerate(signature)), None)
    return source


@contextmanager
def empty_driver_library() -> Iterator[Path]:
    """Make and load a library with every function that CUDA's header names: linkers and loaders are content with it.

    Gives its folder, which is gone afterwards. Raises as `compile_missing` does.
    """
    compiler = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    if compiler is None:
        raise UnsupportedHere("no C compiler for Triton's launchers; install gcc")
    header = (Path(nvidia.include_dirs[0]) / "cuda.h").read_text(encoding="utf-8", errors="replace")
    names = sorted(set(re.findall(r"\bcu[A-Z]\w*", header)))
    with tempfile.TemporaryDirectory() as room:
        source, library = Path(room) / "driver.c", Path(room) / DRIVER_LIBRARY
        source.write_text("".join(f"void {name}(void) {{}}\n" for name in names))
        command = [compiler, "-shared", "-fPIC", "-w", f"-Wl,-soname,{DRIVER_LIBRARY}", "-o", str(library), str(source)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise SlideSparseError(f"{compiler}: {done.stderr.strip().splitlines()[0]}; repair the C compiler")
        # Loaded under the name of the driver's library, it is what the launchers find when they are loaded in turn.
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
        yield Path(room)
