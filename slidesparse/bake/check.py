"""`doctor --require-baked`: would a launch of the profile compile anything?"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from slidesparse.bake import require_triton
from slidesparse.bake.cache import INDEX, VARIABLE, Index, baked_folder, holds_file, holds_kernel
from slidesparse.doctor import Finding
from slidesparse.errors import SlideSparseError
from slidesparse.machine import Machine
from slidesparse.plan import Plan

MANAGER = "slidesparse.bake.overlay:BakedCache"
NAME = "Triton cache"


def check_baked(plan: Plan, machine: Machine) -> list[Finding]:
    """For this machine's GPU, or for every architecture that was baked: one finding for each kernel that is missing.

    Nothing is compiled. The cache is the one that the environment names (`overlay`), else Triton's own folder.
    """
    if not plan.profile.on_gpu:
        return [Finding(NAME, "ok", f"profile {plan.profile_name} launches no Triton kernel")]
    try:
        require_triton()
        import triton

        folder = baked_folder() or Path(triton.knobs.cache.dir)
        if not (folder / INDEX).is_file():
            return [Finding(NAME, "missing", f"{folder} holds no baked kernels", f"bake into it, or set {VARIABLE}")]
        index = Index.read(folder)
        architectures = index.architectures
        if machine.gpu is not None:
            major, minor = machine.gpu.compute_capability
            architectures = (10 * major + minor,)
        return [*_in_use(), *(found for one in architectures for found in _check(plan, one, folder, index))]
    except SlideSparseError as error:
        return [Finding(NAME, "missing", str(error))]


def _in_use() -> Iterator[Finding]:
    """Whether Triton looks into the folder that the environment names."""
    if baked_folder() is not None and os.environ.get("TRITON_CACHE_MANAGER") != MANAGER:
        detail = f"{VARIABLE} is set, but Triton does not look there"
        yield Finding(NAME, "missing", detail, f"set TRITON_CACHE_MANAGER={MANAGER}")


def _check(plan: Plan, architecture: int, folder: Path, index: Index) -> Iterator[Finding]:
    from slidesparse.bake.launchers import launchers
    from slidesparse.bake.toolchain import toolchain
    from slidesparse.bake.warm import specialisations

    name, advice = f"{NAME} sm_{architecture}", "bake again with what is installed here (docs/bake.md)"
    differs = index.toolchain.difference(toolchain((architecture,)), architecture)
    if architecture not in index.architectures:
        listed = ", ".join(f"sm_{one}" for one in index.architectures)
        yield Finding(name, "missing", f"{folder} holds {listed} only", f"bake with --architectures {architecture}")
    elif differs:
        yield Finding(name, "missing", f"{folder} was baked with {differs}", advice)
    else:
        wanted = specialisations(plan, architecture)
        modules = launchers(wanted)
        missing = [str(one) for one in wanted if not holds_kernel(folder, one.digest, one.name)]
        missing += [one.filename for one in modules if not holds_file(folder, one.digest, one.filename)]
        for text in missing:
            yield Finding(name, "missing", f"{folder} lacks {text}", advice)
        if not missing:
            yield Finding(name, "ok", f"{folder}: {len(wanted)} kernels, {len(modules)} launchers, nothing to compile")
