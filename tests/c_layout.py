"""Structures of a C header as a C compiler lays them out."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Mapping
from pathlib import Path

CSRC = Path(__file__).parent.parent / "csrc"


def compiled(header: str, structures: Mapping[str, type[ctypes.Structure]], folder: Path) -> dict[str, int]:
    """`name.field`: offset of every field that Python's side has, `name`: size. Runs `cc` in `folder`."""
    lines = [
        f'printf("{name}.{field} %zu\\n", offsetof({name}, {field}));'
        for name, structure in structures.items()
        for field, *_ in structure._fields_
    ]
    lines += [f'printf("{name} %zu\\n", sizeof({name}));' for name in structures]
    source, program = folder / "layout.c", folder / "layout"
    head = f'#include <stddef.h>\n#include <stdio.h>\n#include "{header}"\n'
    source.write_text(head + "int main(void) {\n" + "\n".join(lines) + "\nreturn 0;\n}\n")
    subprocess.run(["cc", f"-I{CSRC / 'include'}", "-o", program, source], check=True)
    seen = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(seen[::2], map(int, seen[1::2]), strict=True))


def in_python(structures: Mapping[str, type[ctypes.Structure]]) -> dict[str, int]:
    """The same, of ctypes."""
    offsets = {f"{n}.{field}": getattr(s, field).offset for n, s in structures.items() for field, *_ in s._fields_}
    return offsets | {name: ctypes.sizeof(structure) for name, structure in structures.items()}
