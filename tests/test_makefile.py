"""The Makefile and its scripts, run for real with a made-up Python that writes down what it is asked to do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAKE_PYTHON = """#!/bin/sh
echo "$@" >>"$FAKE_LOG"
case "$*" in
  *"import venv"*) [ -z "$FAKE_NO_VENV" ] ;;
  *"sys.executable"*) echo "$0" ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  *"$FAKE_FAILS_AT"*) [ -z "$FAKE_FAILS_AT" ] ;;
esac
"""
TARGETS = ("prepare", "convert", "tune", "prefill", "decode", "kernel", "report", "all", "plan", "status", "doctor")
TARGETS += ("merge", "bake", "test", "lint", "format", "lock", "clean", "help", "env")


class Checkout:
    """A copy of what the scripts read, and a folder of commands that stand before the real ones."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.log = folder / "checkout", folder / "bin", folder / "log"
        shutil.copytree(ROOT / "requirements", self.root / "requirements")
        shutil.copytree(ROOT / ".ci", self.root / ".ci")
        shutil.copytree(ROOT / "csrc", self.root / "csrc")
        for name in ("Makefile", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root / name)
        for name in ("slidesparse", "tests"):
            (self.root / name).mkdir()
        self.bin.mkdir()
        for name in ("python3", "python3.12", "nvidia-smi"):
            self.command(name, "#!/bin/sh\nexit 127\n")  # there, like a pyenv shim, and of no use
        self.command("python3.11", FAKE_PYTHON)

    def command(self, name: str, text: str) -> None:
        path = self.bin / name
        path.write_text(text)
        path.chmod(0o755)

    def __call__(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Run a command in the checkout."""
        ours = re.compile(
            r"MAKE|MFLAGS|VENV|PYTHON|TORCH|BAKED|SLIDESPARSE|PROFILE|SOURCE|TYPES|FROM|DATA|CONF|ARGS|FLAGS|GNUMAKE"
        )
        kept = {key: value for key, value in os.environ.items() if not ours.match(key)}
        environment = kept | {"PATH": f"{self.bin}:{kept['PATH']}", "FAKE_LOG": str(self.log)} | variables
        return subprocess.run(arguments, cwd=self.root, env=environment, capture_output=True, text=True, timeout=60)

    def asked(self) -> list[str]:
        """What Python was asked since the last call."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line for line in lines if not line.startswith("-c")]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_help_explains_every_target(checkout: Checkout) -> None:
    text = checkout("make").stdout
    for target in TARGETS:
        assert re.search(rf"^  {target} +\w", text, re.M), target
    variables = (
        "PROFILE",
        "SOURCE",
        "TYPES",
        "DATA",
        "CONFIG",
        "PYTHON",
        "TORCH",
        "TORCH_INDEX",
        "ARGS",
        "BAKED",
        "FROM",
    )
    for variable in variables:
        assert re.search(rf"^  {variable} +\w", text, re.M), variable


def test_bake_has_its_folder_and_architectures(checkout: Checkout) -> None:
    done = checkout("make", "bake", "CACHE=/a b", "ARCHITECTURES=90,120", "ARGS=--jobs 1", "PROFILE=paper")
    assert done.returncode == 0, done.stderr
    assert checkout.asked()[-1] == (
        "-m slidesparse --config bench.yaml --profile paper --data . bake --cache /a b --architectures 90,120 --jobs 1"
    )


def test_a_target_calls_the_command_of_its_name(checkout: Checkout) -> None:
    done = checkout("make", "decode", "PROFILE=paper", "SOURCE=local", "DATA=/a b", "FLAGS=--json", "ARGS=--cells")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "", "setup talks on stderr, so that --json stays JSON"
    assert checkout.asked()[-1] == (
        "-m slidesparse --config bench.yaml --profile paper --data /a b --source local --json decode --cells"
    )


def test_types_go_before_the_command_and_a_merge_has_its_folder(checkout: Checkout) -> None:
    assert checkout("make", "all", "TYPES=INT8,BF16").returncode == 0
    assert checkout.asked()[-1] == ("-m slidesparse --config bench.yaml --profile auto --data . --types INT8,BF16 all")
    assert checkout("make", "merge", "DATA=a", "FROM=b c/reports/TAG", "ARGS=d/reports/TAG").returncode == 0
    assert checkout.asked()[-1] == (
        "-m slidesparse --config bench.yaml --profile auto --data a merge b c/reports/TAG d/reports/TAG"
    )


def test_the_exit_code_is_that_of_the_command(checkout: Checkout) -> None:
    assert checkout("make", "all", FAKE_FAILS_AT="-m slidesparse").returncode != 0


def test_environment_is_made_once(checkout: Checkout) -> None:
    assert checkout("make", "all").returncode == 0
    first = checkout.asked()
    assert any(line.startswith("-m venv") for line in first)
    assert any("--require-hashes -r requirements/base.lock" in line for line in first)
    assert not any("dev.lock" in line for line in first), "a run needs no test packages"
    assert checkout("make", "all").returncode == 0
    assert len(checkout.asked()) == 1, "the second time only the command itself"


def test_tests_add_their_packages_to_the_same_environment(checkout: Checkout) -> None:
    checkout("make", "all")
    checkout.asked()
    assert checkout("make", "test", "ARGS=-k x").returncode == 0
    assert [line.split()[-1] for line in checkout.asked()] == ["requirements/dev.lock", "x"]
    checkout("make", "test")
    assert checkout.asked() == ["-m pytest"]


@pytest.mark.parametrize("changed", ["requirements/base.lock", "requirements/torch-cpu.txt"])
def test_a_changed_pin_makes_the_environment_again(checkout: Checkout, changed: str) -> None:
    checkout("make", "env")
    leftover = checkout.root / ".venv" / "leftover"
    leftover.write_text("of an older lock file")
    checkout.asked()
    with (checkout.root / changed).open("a") as stream:
        stream.write("# another pin\n")
    assert checkout("make", "env").returncode == 0
    assert any(line.startswith("-m venv") for line in checkout.asked())
    assert not leftover.exists()


def test_a_moved_checkout_makes_its_own_environment(checkout: Checkout) -> None:
    checkout("make", "env")
    checkout.root = checkout.root.rename(checkout.root.parent / "moved")
    checkout.asked()
    checkout("make", "env")
    assert any(line.startswith("-m venv") for line in checkout.asked())


@pytest.mark.parametrize("step", ["base.lock", "torch-cpu.txt", "--editable", "dev.lock"])
def test_a_half_made_environment_is_not_taken_for_good(checkout: Checkout, step: str) -> None:
    assert checkout("make", "env-dev", FAKE_FAILS_AT=step).returncode != 0
    checkout.asked()
    assert checkout("make", "env-dev").returncode == 0
    assert any(step in line for line in checkout.asked())
    checkout("make", "env-dev")
    assert checkout.asked() == []


def test_torch_is_chosen_by_the_machine_and_stays(checkout: Checkout) -> None:
    checkout.command("nvidia-smi", "#!/bin/sh\nexit 0\n")
    checkout("make", "env")
    assert any(line.endswith("-r requirements/torch-cuda.txt") for line in checkout.asked())
    checkout("make", "env", "TORCH=cpu", "TORCH_INDEX=file:///wheels")
    assert any(
        line.endswith("--extra-index-url file:///wheels -r requirements/torch-cpu.txt") for line in checkout.asked()
    )
    checkout("make", "env")
    assert checkout.asked() == [], "what was asked for by name is not undone by a later call without it"


def test_a_gpu_host_builds_csrc_once_and_again_when_it_changed(checkout: Checkout) -> None:
    checkout("make", "env", "TORCH=cuda")
    asked = checkout.asked()
    assert any(line.endswith("-r requirements/gpu.txt") for line in asked)
    assert asked[-1] == "-m slidesparse.kernels.build"
    checkout("make", "env")
    assert checkout.asked() == []
    with (checkout.root / "csrc" / "src" / "status.cpp").open("a") as stream:
        stream.write("// changed\n")
    checkout("make", "env")
    assert checkout.asked()[-1] == "-m slidesparse.kernels.build"


def test_a_failed_build_of_csrc_is_said_and_tried_again_but_stops_nothing(checkout: Checkout) -> None:
    done = checkout("make", "plan", "TORCH=cuda", FAKE_FAILS_AT="slidesparse.kernels.build")
    assert done.returncode == 0
    assert "warning: csrc/ was not built" in done.stderr
    checkout.asked()
    checkout("make", "plan")
    assert "-m slidesparse.kernels.build" in checkout.asked()


def test_a_cpu_host_builds_nothing(checkout: Checkout) -> None:
    checkout("make", "env", "TORCH=cpu")
    assert not any("kernels.build" in line or "gpu.txt" in line for line in checkout.asked())


@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="this machine has a GPU")
def test_torch_for_the_cpu_without_a_gpu(checkout: Checkout) -> None:
    checkout("make", "env")
    assert any(line.endswith("-r requirements/torch-cpu.txt") for line in checkout.asked())


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"PYTHON": "/bin/false"}, "PYTHON=/bin/false is not a working Python 3.11 or 3.12"),
        ({"TORCH": "rocm"}, "TORCH=rocm: allowed are auto, cpu, cuda"),
    ],
)
def test_wrong_variables_are_one_line(checkout: Checkout, variables: dict[str, str], message: str) -> None:
    done = checkout("make", "env", **variables)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert len(ours) == 1
    assert message in ours[0]


def test_python_without_venv_says_what_to_install(checkout: Checkout) -> None:
    done = checkout("make", "env", "PYTHON=python3.11", FAKE_NO_VENV="1")
    assert done.returncode != 0
    assert (
        "python3.11 lacks the modules venv and ensurepip; on Debian and Ubuntu: apt-get install python3-venv"
        in done.stderr
    )


def test_a_folder_that_is_not_ours_is_left_alone(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    (checkout.root / ".venv" / "mine").write_text("precious")
    done = checkout("make", "env")
    assert done.returncode != 0
    assert "was not made by this script" in done.stderr
    checkout("make", "clean")
    assert (checkout.root / ".venv" / "mine").read_text() == "precious"


def test_a_baked_environment_is_used_as_it_is(checkout: Checkout, tmp_path: Path) -> None:
    (tmp_path / "baked" / "bin").mkdir(parents=True)
    shutil.copy(checkout.bin / "python3.11", tmp_path / "baked" / "bin" / "python")
    assert checkout("make", "all", SLIDESPARSE_BAKED=str(tmp_path / "baked")).returncode == 0
    assert [line.split()[1] for line in checkout.asked()] == ["slidesparse"]
    assert not (checkout.root / ".venv").exists()


def test_a_baked_environment_that_is_not_there(checkout: Checkout) -> None:
    done = checkout("make", "all", "BAKED=/nowhere")
    assert done.returncode != 0
    assert "BAKED=/nowhere holds no bin/python" in done.stderr


@pytest.mark.parametrize(
    ("fails", "code"), [("none", 0), ("check", 2), ("format", 2), ("mypy", 2), ("hadolint", 2), ("shellcheck", 2)]
)
def test_lint_runs_every_tool_and_tells_the_truth(checkout: Checkout, fails: str, code: int) -> None:
    checkout("make", "env-dev")
    for name in ("ruff", "mypy", "hadolint", "shellcheck"):
        tool = checkout.root / ".venv" / "bin" / name
        tool.write_text(f'#!/bin/sh\ncase "${{0##*/}} $*" in *{fails}*) exit 1;; esac\n')
        tool.chmod(0o755)
    done = checkout("make", "lint")
    assert done.returncode == code
    tools = [line.partition(" ")[0] for line in done.stdout.splitlines()]
    assert tools == ["ruff", "ruff", "mypy", "hadolint", "shellcheck"]


def test_clean_keeps_models_and_results(checkout: Checkout) -> None:
    checkout("make", "env")
    kept = ["checkpoints", "checkpoints_slidesparse", "reports"]
    for name in (*kept, ".pytest_cache", "slidesparse/__pycache__"):
        (checkout.root / name).mkdir()
    done = checkout("make", "clean")
    assert done.returncode == 0, done.stderr
    assert all((checkout.root / name).is_dir() for name in kept)
    gone = [".venv", ".pytest_cache", "slidesparse/__pycache__"]
    assert not any((checkout.root / name).exists() for name in gone)
    checkout("make", "clean", "CONFIRM=checkpoints")
    assert [name for name in kept if (checkout.root / name).exists()] == ["reports"]
    assert checkout("make", "clean", "CONFIRM=all").returncode != 0
    assert (checkout.root / "reports").is_dir()


@pytest.mark.parametrize(("fails", "code"), [("none", 0), ("lint", 1), ("test", 1)])
def test_ci_runs_both_and_tells_the_truth(checkout: Checkout, fails: str, code: int) -> None:
    checkout.command("make", f'#!/bin/sh\necho "ran $1"\nif [ "$1" = {fails} ]; then exit 2; fi\n')
    done = checkout("bash", ".ci/run", CI="true")
    assert done.returncode == code
    assert done.stdout.splitlines() == ["ran lint", "ran test"]


def test_nothing_of_this_project_is_ignored_by_git() -> None:
    """A rule meant for results must not hide sources."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "--ignored", "--cached", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    assert (listed.returncode, listed.stdout) == (0, "")
