"""Compile everything that a profile launches, for several GPU architectures, in parallel, without a GPU."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from slidesparse import files
from slidesparse.bake.cache import Index, holds_file, holds_kernel, size
from slidesparse.bake.launchers import Launcher, compile_missing, launchers
from slidesparse.bake.launches import launch_all
from slidesparse.bake.other_cpu import OtherCpu, read, taking_on
from slidesparse.bake.overlay import BAKING
from slidesparse.bake.specialisation import Specialisation, trace
from slidesparse.bake.toolchain import toolchain
from slidesparse.errors import ConfigError, DiskError, SlideSparseError
from slidesparse.files import describe_os_error
from slidesparse.plan import Plan
from slidesparse.progress import Bar, track


@dataclass(frozen=True)
class Baked:
    """What became of one call."""

    cache: str
    kernels: int
    launchers: int
    compiled: int
    """Of kernels and launchers; the rest was there."""
    bytes: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.cache}: {self.kernels} kernels and {self.launchers} launchers, {self.compiled} of them compiled "
            f"now; {self.bytes / 2**20:.1f} MiB, {self.seconds:.0f} s"
        )


def specialisations(plan: Plan, architecture: int) -> tuple[Specialisation, ...]:
    """What the plan can launch on one architecture (90: compute capability 9.0)."""
    return trace(architecture, lambda: launch_all(plan, architecture))


def bake(
    plan: Plan,
    architectures: Iterable[int],
    cache: Path,
    jobs: int,
    quiet: bool = False,
    triton_package: Path | None = None,
) -> Baked:
    """Compile what is not yet in `cache`, in `jobs` processes. An interrupted bake goes on where it was.

    triton_package: bake for a machine that has this package (see `other_cpu`), all but its C launchers.

    Raises:
        ConfigError: the profile has no kernel to bake, or `triton_package` is no package of the installed release.
        DiskError: `cache` cannot be written.
        SlideSparseError: a kernel cannot be compiled (which, why), or another process bakes into `cache`.
        UnsupportedHere: no C compiler, or kernels go to Triton's interpreter.
    """
    if not plan.profile.on_gpu:
        raise ConfigError(f"profile {plan.profile_name} launches no Triton kernel; bake one with GPU backends")
    started, cache = time.monotonic(), cache.absolute()
    chosen = tuple(sorted(set(architectures)))
    other = None if triton_package is None else read(triton_package)
    with files.exclusive(cache), taking_on(other):
        wanted = [one for architecture in chosen for one in specialisations(plan, architecture)]
        modules = launchers(wanted) if other is None else ()
        missing = [one for one in wanted if not holds_kernel(cache, one.digest, one.name)]
        absent = [one for one in modules if not holds_file(cache, one.digest, one.filename)]
        with track(f"bake {plan.profile_name}", len(missing) + bool(absent), quiet) as bar:
            _compile(missing, absent, cache, jobs, other, bar)
        _verify(wanted, modules, cache)
        index = Index(
            toolchain(chosen),
            (plan.profile_name,),
            chosen,
            {one.digest: str(one) for one in wanted},
            {one.digest: one.filename for one in modules},
        )
        with suppress(SlideSparseError):  # none there, or a damaged one: it gets a new one
            index = Index.read(cache).and_(index)
        index.write(cache)
    compiled, seconds = len(missing) + len(absent), round(time.monotonic() - started, 1)
    return Baked(str(cache), len(wanted), len(modules), compiled, size(cache), seconds)


def _compile(
    kernels: Sequence[Specialisation],
    modules: Sequence[Launcher],
    cache: Path,
    jobs: int,
    other: OtherCpu | None,
    bar: Bar,
) -> None:
    """In processes of their own: Triton's settings are those of a process."""
    if not kernels and not modules:
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context, initializer=_enter, initargs=(str(cache), other)) as pool:
        work = {pool.submit(one.compile): str(one) for one in kernels}
        if modules:
            work[pool.submit(compile_missing, modules, cache)] = "C launchers"
        try:
            for done in as_completed(work):
                done.result()
                bar.advance(note=work[done].partition("(")[0])
        except BaseException as error:
            pool.shutdown(cancel_futures=True)
            if isinstance(error, SlideSparseError) or not isinstance(error, Exception):
                raise
            problem = describe_os_error(error, cache)
            if problem is not None:
                raise DiskError(problem) from None
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise SlideSparseError(f"{work[done]} cannot be compiled: {lines[-1].strip()}") from error


def _enter(cache: str, other: OtherCpu | None) -> None:
    """Settings of a process that compiles: into `cache`, machine code alone, to its end when the user interrupts."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_STORE_BINARY_ONLY": "1", "TRITON_CACHE_MANAGER": BAKING}
    if other is not None:
        other.take_on()


def _verify(kernels: Iterable[Specialisation], modules: Iterable[Launcher], cache: Path) -> None:
    """Raises SlideSparseError when what was compiled is not where a launch will look for it."""
    for one in kernels:
        if not holds_kernel(cache, one.digest, one.name):
            raise SlideSparseError(f"{cache}: {one} was compiled, but not under the key that a launch has")
    for module in modules:
        if not holds_file(cache, module.digest, module.filename):
            raise SlideSparseError(f"{cache}: {module.filename} was compiled, but not under the key that a launch has")
