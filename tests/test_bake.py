"""The baked Triton cache: kernels are compiled by programs of their own, since these tests run Triton's interpreter."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

import slidesparse
from slidesparse import files
from slidesparse.bake import counts
from slidesparse.bench_file import load_bench
from slidesparse.cli import main
from slidesparse.errors import ConfigError
from slidesparse.plan import Plan
from slidesparse.runner import open_run

pytest.importorskip("triton.backends.nvidia")
import triton

from slidesparse.bake import other_cpu

ROOT = Path(slidesparse.__file__).parents[1]
HERE = Path(__file__).parent
FEW = 5
"""Kernels that `baked_few.py` launches."""
OVERLAY = {"TRITON_CACHE_MANAGER": "slidesparse.bake.overlay:BakedCache"}


def program(name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run one of the programs beside this file, without Triton's interpreter and without a GPU."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TRITON_", "SLIDESPARSE_"))}
    kept |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / name), *arguments]
    return subprocess.run(command, cwd=ROOT, env=kept | variables, capture_output=True, text=True, timeout=300)


def doctor(cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    variables = {"SLIDESPARSE_TRITON_CACHE": str(cache), **OVERLAY, **variables}
    return program("baked_few.py", "doctor", "--require-baked", **variables)


def bake(cache: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return program("baked_few.py", "--json", "bake", "--architectures", "90a", "--cache", str(cache), **variables)


@pytest.fixture(scope="module")
def baked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("baked") / "cache"
    done = bake(cache)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kernels"], told["compiled"]) == (FEW, FEW + told["launchers"])
    assert told["bytes"] == sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    return cache


@pytest.fixture
def own(baked: Path, tmp_path: Path) -> Path:
    """A copy elsewhere: Triton's files name the folder that they were made in, which then holds nothing."""
    hidden = baked.with_name("hidden")
    shutil.copytree(baked, tmp_path / "copy")
    assert not hidden.exists()
    return tmp_path / "copy"


def kernels(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.cubin"))


def test_two_bakes_make_the_same_code(baked: Path, tmp_path: Path) -> None:
    """Machine code and C launchers; else two builds of an image would differ."""
    assert bake(tmp_path / "again").returncode == 0

    def code(cache: Path) -> dict[Path, bytes]:
        built = (path for path in cache.rglob("*") if path.suffix in (".cubin", ".so"))
        return {path.relative_to(cache): path.read_bytes() for path in built}

    first, second = code(baked), code(tmp_path / "again")
    assert len(first) > FEW
    assert [path.name for path in first.keys() | second.keys() if first.get(path) != second.get(path)] == []


def launched(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == FEW
    return dict(lines)


def test_real_launches_find_what_was_baked(own: Path, baked: Path, tmp_path: Path) -> None:
    """Through Triton's whole launch path, with a driver that runs nothing: same keys, nothing compiled, neither kernels
    nor launchers, though the cache was moved and Triton's own folder is another one, as vLLM has it."""
    elsewhere = tmp_path / "engine"
    away = baked.rename(baked.with_name("away"))  # paths inside Triton's files lead nowhere now
    try:
        log = tmp_path / "log"
        done = program(
            "baked_few.py", "launch", SLIDESPARSE_TRITON_CACHE=str(own), TRITON_CACHE_DIR=str(elsewhere),
            TRITON_LIBCUDA_PATH=str(tmp_path), SLIDESPARSE_TRITON_LOG=str(log), **OVERLAY,
        )  # fmt: skip
    finally:
        away.rename(baked)
    index = files.read_json(own / "slidesparse-index.json")
    assert launched(done) == dict.fromkeys(index["kernels"], "hit")
    assert not elsewhere.exists()
    assert counts.read(log) == counts.Counts(hits=FEW)


def test_a_launch_that_was_not_baked_is_compiled_beside(own: Path, tmp_path: Path) -> None:
    """One kernel lost half of itself: it alone is a miss, and what is compiled does not go into the baked folder."""
    kernels(own)[0].unlink()
    before = sorted(own.rglob("*"))
    log = tmp_path / "log"
    done = program(
        "baked_few.py", "launch", SLIDESPARSE_TRITON_CACHE=str(own), TRITON_CACHE_DIR=str(tmp_path / "engine"),
        TRITON_LIBCUDA_PATH=str(tmp_path), SLIDESPARSE_TRITON_LOG=str(log), **OVERLAY,
    )  # fmt: skip
    assert sorted(launched(done).values()) == ["hit"] * (FEW - 1) + ["miss"]
    assert sorted(own.rglob("*")) == before
    assert len(kernels(tmp_path / "engine")) == 1
    told = counts.read(log)
    assert (told.hits, told.misses, len(told.compiled)) == (FEW - 1, 1, 1)
    assert told.compiled[0].startswith("slidesparse.kernels.triton_")


def test_baking_again_compiles_what_is_missing(own: Path) -> None:
    kept = {path: path.stat().st_mtime_ns for path in kernels(own)}
    lost = kernels(own)[1]
    content = lost.read_bytes()
    lost.unlink()
    done = bake(own)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["compiled"] == 1
    assert lost.read_bytes() == content  # the same machine code each time
    del kept[lost]
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())


def test_doctor_is_content_with_a_whole_cache(own: Path) -> None:
    done = doctor(own)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith(f"ok: Triton cache sm_90: {own}: {FEW} kernels, ")


def test_doctor_names_each_kernel_and_launcher_that_is_missing(own: Path) -> None:
    """Whatever is gone of an entry: its machine code, its folder, a C launcher."""
    first, second = kernels(own)[:2]
    first.unlink()
    shutil.rmtree(second.parent)
    next(own.glob("*/cuda_utils*")).unlink()
    done = doctor(own)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all(line.startswith(f"missing: Triton cache sm_90: {own} lacks ") for line in lines)
    for kernel in (first, second):
        assert sum(f".{kernel.stem}(" in line for line in lines) >= 1
    assert "cuda_utils" in lines[-1]


def test_doctor_says_what_another_toolchain_is(own: Path) -> None:
    index = files.read_json(own / "slidesparse-index.json")
    index["toolchain"] |= {"triton": "3.5.1", "ptxas": {"90": "12.4.1"}}
    files.write_json(own / "slidesparse-index.json", index)
    done = doctor(own)
    assert done.returncode == 1
    assert len(done.stdout.splitlines()) == 1
    assert "was baked with Triton 3.5.1, here 3." in done.stdout
    assert "ptxas for sm_90 12.4.1, here " in done.stdout


def test_doctor_says_when_there_is_nothing_or_nothing_looks_there(own: Path, tmp_path: Path) -> None:
    done = doctor(tmp_path / "none")
    assert done.returncode == 1
    assert done.stdout.count("\n") == 1
    assert "holds no baked kernels" in done.stdout
    done = doctor(own, TRITON_CACHE_MANAGER="triton.runtime.cache:FileCacheManager")
    assert done.returncode == 1
    assert "set TRITON_CACHE_MANAGER=slidesparse.bake.overlay:BakedCache" in done.stdout


def test_every_launch_is_among_the_baked_ones() -> None:
    done = program("bake_coverage.py")
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("ok ") == 8


@pytest.fixture
def other_triton(tmp_path: Path) -> Path:
    """Triton as on another CPU: it works, but its library has another hash, its assemblers another time of building."""
    here, there = Path(triton.__file__).parent, tmp_path / "site" / "triton"
    changed = {other_cpu.LIBRARY, *(other_cpu.TOOLS / name for name in ("ptxas", "ptxas-blackwell"))}
    for path in here.rglob("*"):
        place = path.relative_to(here)
        if path.is_dir() or "__pycache__" in place.parts:
            continue
        (there / place).parent.mkdir(parents=True, exist_ok=True)
        if place not in changed:
            (there / place).symlink_to(path)
        elif place == other_cpu.LIBRARY:
            (there / place).write_bytes(path.read_bytes() + b"\0")
        else:
            content = path.read_bytes()
            (built,) = set(other_cpu.BUILT.findall(content))
            (there / place).write_bytes(content.replace(built, b"Wed_Jan_01_12:34:56_PST_2025"))
            (there / place).chmod(0o755)
    return there


def test_what_is_baked_for_another_cpu_is_found_there(other_triton: Path, tmp_path: Path) -> None:
    cache, there = tmp_path / "cache", f"{other_triton.parent}{os.pathsep}{ROOT}"
    options = ("--architectures", "90,100", "--cache", str(cache))
    done = program("baked_few.py", "--json", "bake", *options, "--triton-package", str(other_triton))
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kernels"], told["launchers"], told["compiled"]) == (2 * FEW, 0, 2 * FEW)
    done = program("baked_few.py", "--json", "bake", *options, PYTHONPATH=there)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["kernels"], told["compiled"]) == (2 * FEW, told["launchers"])
    assert told["launchers"] > 0


def test_another_release_of_triton_is_no_other_cpu(tmp_path: Path) -> None:
    package = tmp_path / "triton"
    shutil.copytree(Path(triton.__file__).parent / "runtime", package / "runtime")
    (package / "_C").mkdir()
    (package / "_C" / "libtriton.so").write_bytes(b"another")
    with pytest.raises(ConfigError, match=f"not that of Triton {triton.__version__}"):
        other_cpu.read(package)
    with pytest.raises(ConfigError, match="give the folder `triton`"):
        other_cpu.read(tmp_path)


def test_interpreted_kernels_cannot_be_baked(tmp_path: Path) -> None:
    done = bake(tmp_path / "cache", TRITON_INTERPRET="1")
    assert done.returncode == 1
    assert done.stderr == "error: TRITON_INTERPRET is set, so no kernel is compiled; unset it\n"


def test_a_profile_of_the_cpu_has_nothing_to_bake(tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["--profile", "smoke", "bake", "--cache", str(tmp_path)])
    assert done.exit_code == 2
    assert "error: profile smoke launches no Triton kernel" in done.output
    done = CliRunner().invoke(main, ["--profile", "smoke", "doctor", "--require-baked"])
    assert (done.exit_code, done.output) == (0, "ok: Triton cache: profile smoke launches no Triton kernel\n")


@pytest.mark.parametrize("given", ["70", "90,sm_80", ","])
def test_unknown_architectures_are_refused(given: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(main, ["bake", "--architectures", given, "--cache", str(tmp_path)])
    assert done.exit_code == 2
    assert "allowed are all, 80, 86, 89, 90, 100, 120, 121" in done.output


def test_a_run_notes_the_counts_of_all_its_processes(tmp_path: Path) -> None:
    plan = Plan(load_bench(ROOT / "bench.yaml"), "smoke", tmp_path)
    child = (
        "import os\n"
        "with open(os.environ['SLIDESPARSE_TRITON_LOG'], 'a') as log:\n"
        "    log.write('hit slidesparse.kernels.a._a\\nmiss slidesparse.kernels.b._b\\nmiss vllm.c.d\\n')\n"
    )
    with open_run(plan, quiet=True) as run:
        for _ in range(2):
            subprocess.run([sys.executable, "-c", child], check=True)
    noted = files.read_json(run.tree.environment)["runs"][-1]["triton_cache"]
    assert noted["hits"] == 2
    assert noted["misses"] == 2
    assert noted["others_misses"] == 2
    log = (run.tree.logs / f"{run.run_id}.log").read_text()
    assert "triton cache: 2 hits, 2 misses (2 x slidesparse.kernels.b._b); of other packages 0 hits, 2 misses" in log
    assert counts.VARIABLE not in os.environ
    assert not list(run.tree.logs.glob("*.triton"))
    with open_run(plan, quiet=True) as run:
        pass
    assert "triton_cache" not in files.read_json(run.tree.environment)["runs"][-1]
