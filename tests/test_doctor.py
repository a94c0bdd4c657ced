"""What `doctor` concludes from facts: machines and surroundings are made up here, the judgement is ours."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

import pytest

from slidesparse import surroundings
from slidesparse.bench_file import load_bench
from slidesparse.doctor import Finding, diagnose, disk_need, exit_code, memory_need
from slidesparse.dtypes import DType
from slidesparse.machine import Gpu, Machine, detect
from slidesparse.plan import Plan
from slidesparse.surroundings import Surroundings, look

BENCH = load_bench(Path(__file__).parent.parent / "bench.yaml")
GIB = 2**30
CPU = Machine(None, 0, "Xeon", 8, 16 * GIB, "x86_64", "3.11.7", "2.13.0+cpu", "")
H100 = replace(
    CPU, gpu=Gpu("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, "580.95.05"), gpu_count=1, torch="2.11.0+cu130", cuda="13.0"
)
A100 = replace(H100, gpu=Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, "580.95.05"))
BACKENDS = ("cpu_dense", "cpu_sparse", "cublaslt", "cusparselt", "fused", "vllm", "auto")
READY = Surroundings(
    nvidia_gpus=("NVIDIA H100 80GB HBM3",),
    driver="580.95.05",
    packages={"triton": "3.6.0", "vllm": "0.20.0"},
    libraries={"cublasLt": "/lib/libcublasLt.so.13", "cusparseLt": "/lib/libcusparseLt.so.0"},
    free_bytes=500 * GIB,
    models_to_get=("BitNet-2B",),
    hub_problem="",
    backend_problems={(name, dtype): "" for name in BACKENDS for dtype in DType},
)
"""A host where nothing is in the way of the reference run."""


def plan(profile: str, source: str | None = None, **changes: object) -> Plan:
    changed = BENCH.profile(profile).model_copy(update=({"source": source} if source else {}) | changes)
    return Plan(BENCH.model_copy(update={"profiles": {profile: changed}}), profile, Path("/somewhere"))


REFERENCE = plan("bitnet-2b")


def finding(findings: list[Finding], name: str) -> Finding:
    (found,) = (f for f in findings if f.name == name)
    return found


def test_a_ready_host_runs_all_tasks() -> None:
    findings = diagnose(REFERENCE, H100, READY)
    assert {f.status for f in findings} == {"ok"}
    assert exit_code(findings) == 0
    tasks = [f for f in findings if f.name.startswith("task ")]
    assert [f.detail for f in tasks][3:5] == ["84 cells can run", "48 cells can run"]
    assert [f.detail for f in tasks][8:] == ["64 cells can run", "17 cells can run"]


def test_smoke_needs_no_gpu_and_says_so() -> None:
    findings = diagnose(plan("smoke"), CPU, Surroundings(free_bytes=GIB, backend_problems=READY.backend_problems))
    assert exit_code(findings) == 0
    assert finding(findings, "GPU").detail.endswith("this profile needs none")


@pytest.mark.parametrize(
    ("machine", "changes", "name", "detail", "advice"),
    [
        (replace(CPU, python="3.13.1"), {}, "Python", "3.13.1", "use Python 3.11 or 3.12"),
        (CPU, {"nvidia_gpus": (), "driver": ""}, "GPU", "no NVIDIA GPU", "--gpus all"),
        (CPU, {}, "torch", "CPU build", "make TORCH=cuda env"),
        (H100, {"driver": "570.86.10"}, "driver", "CUDA 13.0 needs 580.65", "install driver 580.65 or newer"),
        (replace(H100, gpu=None, gpu_count=0), {"driver": "535.104.05"}, "driver", "535.104.05", "580.65"),
        (H100, {"libraries": {}}, "libcusparseLt", "not found", "make TORCH=cuda env"),
        (H100, {"packages": {"triton": "3.6.0"}}, "vLLM", "not found", "docs/install.md"),
        (H100, {"free_bytes": 20 * GIB}, "disk", "need 25.2 GiB", "--data"),
        (H100, {"cannot_write": "/somewhere: Read-only file system"}, "data folder", "Read-only", "--data"),
        (H100, {"hub_problem": "cannot be reached"}, "models", "cannot be reached", "--source local"),
        (replace(H100, gpu=Gpu("NVIDIA T1000", (7, 5), 80 * GIB, "")), {}, "compute capability", "7.5", "Ampere"),
        (replace(H100, gpu=Gpu("NVIDIA X", (9, 0), 8 * GIB, "")), {}, "memory", "8.0 GiB GPU memory", "smaller models"),
    ],
)
def test_what_is_missing_is_named_with_advice(
    machine: Machine, changes: dict[str, object], name: str, detail: str, advice: str
) -> None:
    findings = diagnose(REFERENCE, machine, replace(READY, **changes))  # type: ignore[arg-type]
    found = finding(findings, name)
    assert found.status == "missing"
    assert detail in found.detail
    assert advice in found.advice
    assert exit_code(findings) == 1


@pytest.mark.parametrize(
    ("version", "cuda", "status"),
    [
        ("525.60.13", "12.9", "ok"),
        ("520.61.05", "12.9", "missing"),
        ("580.65.06", "13.0", "ok"),
        ("575.57.08", "13.0", "missing"),
        ("1000.1", "99.0", "ok"),
    ],
)
def test_driver_for_the_cuda_of_torch(version: str, cuda: str, status: str) -> None:
    findings = diagnose(REFERENCE, replace(H100, cuda=cuda), replace(READY, driver=version))
    assert finding(findings, "driver").status == status


def test_an_a100_skips_fp8_and_runs_the_rest() -> None:
    no_fp8 = {key: "FP8 needs 8.9" if key[1] is DType.FP8 else "" for key in READY.backend_problems}
    findings = diagnose(REFERENCE, A100, replace(READY, backend_problems=no_fp8))
    assert finding(findings, "FP8").status == "warning"
    assert finding(findings, "backend cublaslt").status == "warning"
    assert finding(findings, "task 4, prefill benchmark").detail == "42 of 84 cells will be skipped: FP8 needs 8.9"
    assert exit_code(findings) == 0


def test_a_backend_that_cannot_run_stops_only_tasks_that_use_it() -> None:
    without = {key: "no cuSPARSELt" if key[0] == "cusparselt" else "" for key in READY.backend_problems}
    findings = diagnose(REFERENCE, H100, replace(READY, backend_problems=without))
    status = {f.name[5:].partition(",")[0]: f.status for f in findings if f.name.startswith("task ")}
    assert status == {
        "1": "ok", "2": "ok", "3": "warning", "4": "ok", "5": "ok", "6": "ok", "7": "missing", "8": "missing",
        "9": "missing", "10": "ok",
    }  # fmt: skip
    assert exit_code(findings) == 1


def test_whole_linear_layers_need_the_dense_side_too() -> None:
    without = {key: "no cuBLASLt" if key[0] == "cublaslt" else "" for key in READY.backend_problems}
    found = finding(diagnose(REFERENCE, H100, replace(READY, backend_problems=without)), "task 9, whole linear layers")
    assert (found.status, found.detail) == ("missing", "cannot run: no cuBLASLt")


def test_calibration_needs_a_gpu_and_nothing_of_the_backends() -> None:
    name = "task 10, what this machine can do"
    nothing = dict.fromkeys(READY.backend_problems, "not built")
    assert finding(diagnose(REFERENCE, H100, replace(READY, backend_problems=nothing)), name).status == "ok"
    found = finding(diagnose(REFERENCE, A100, READY), name)
    assert found.detail == "4 of 17 cells will be skipped: FP8E4M3 needs compute capability 8.9 (Ada)"
    found = finding(diagnose(REFERENCE, CPU, replace(READY, nvidia_gpus=(), driver="")), name)
    assert (found.status, found.detail) == ("missing", "cannot run: no NVIDIA GPU, or no driver")
    found = finding(diagnose(REFERENCE, H100, replace(READY, rates_problem="not built; run build")), name)
    assert (found.status, found.detail) == ("warning", "16 of 17 cells will be skipped: not built; run build")


def test_16_bit_types_are_judged_where_the_profile_has_them() -> None:
    without = {key: "no BF16" if key == ("cusparselt", DType.BF16) else "" for key in READY.backend_problems}
    seen = replace(READY, backend_problems=without)
    assert finding(diagnose(REFERENCE, H100, seen), "backend cusparselt").status == "ok"
    findings = diagnose(plan("kernels"), H100, seen)
    assert finding(findings, "backend cusparselt").detail == "BF16: no BF16"
    assert finding(findings, "task 7, kernel, sparse high").detail.startswith(f"{4 * 41} of {4 * 4 * 41} cells")
    assert finding(findings, "task 9, whole linear layers").status == "ok", "that task is in 8-bit types"


def test_an_engine_that_cannot_run_stops_prefill_and_decode() -> None:
    findings = diagnose(REFERENCE, H100, replace(READY, engine_problem="vLLM is broken"))
    blocked = [f.name for f in findings if f.status == "missing"]
    assert blocked == ["engine vllm", "task 4, prefill benchmark", "task 5, decode benchmark"]


@pytest.mark.parametrize(
    ("source", "models_to_get", "status", "detail"),
    [
        ("hub", (), "ok", "all base models are there"),
        ("hub", ("BitNet-2B",), "ok", "from the hub"),
        ("local", ("BitNet-2B",), "missing", "no local folder .* for BitNet-2B"),
        ("local", (), "ok", "all base models are there"),
        ("synthetic", ("BitNet-2B",), "ok", "synthetic, seed 0"),
    ],
)
def test_where_models_come_from(source: str, models_to_get: tuple[str, ...], status: str, detail: str) -> None:
    findings = diagnose(plan("bitnet-2b", source), H100, replace(READY, models_to_get=models_to_get))
    found = finding(findings, "models")
    assert found.status == status
    assert re.search(detail, found.detail)


def test_a_model_without_a_repository_cannot_come_from_the_hub() -> None:
    hub_smoke = plan("smoke", "hub")
    findings = diagnose(hub_smoke, CPU, replace(READY, models_to_get=("BitNet-tiny",)))
    assert finding(findings, "models").detail == "BitNet-tiny: no hub repository in the bench file"


def test_models_already_made_need_no_disk() -> None:
    need = disk_need(REFERENCE)
    seen = replace(READY, free_bytes=GIB, present_bytes=need)
    assert finding(diagnose(REFERENCE, H100, seen), "disk").status == "ok"
    tight = replace(READY, free_bytes=need + 1)
    assert finding(diagnose(REFERENCE, H100, tight), "disk").status == "warning"


def test_disk_need_of_the_reference_run() -> None:
    """BF16 model, two 8-bit ones, eight pruned ones that add codes and scales only."""
    linear = 30 * (3840 * 2560 + 2560 * 2560 + 13824 * 2560 + 2560 * 6912)
    scales = 4 * 30 * (3840 + 2560 + 13824 + 2560)
    other = 128256 * 2560 + 30 * (3 * 2560 + 6912) + 2560
    assert disk_need(REFERENCE) == 2 * (linear + other) + 2 * (linear + scales + 2 * other) + 8 * (linear + scales)


def test_a_local_model_is_read_in_place(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "config.json").write_text("{}")
    model = BENCH.models["BitNet-2B"].model_copy(update={"local": str(tmp_path / "mine")})
    local = plan("bitnet-2b", "local")
    local = replace(local, bench=local.bench.model_copy(update={"models": BENCH.models | {"BitNet-2B": model}}))
    assert look(local, CPU).models_to_get == ("BitNet-2B",), "no weights there"
    (tmp_path / "mine" / "model.safetensors").write_text("")
    assert look(local, CPU).models_to_get == ()
    assert disk_need(REFERENCE) - disk_need(local) == 2 * 2_412_820_480  # parameters of the model in BF16


def test_lifted_layout_needs_more_disk() -> None:
    lifted = plan("bitnet-2b", convert=REFERENCE.profile.convert.model_copy(update={"layout": "lifted"}))
    linear = 30 * (3840 * 2560 + 2560 * 2560 + 13824 * 2560 + 2560 * 6912)
    more = (disk_need(lifted) - disk_need(REFERENCE)) / (2 * linear)
    assert more == pytest.approx(0 + 1 / 3 + 1 / 2 + 3 / 5, rel=3e-3)  # expansions less 1; K' is padded to 32


def test_memory_need_takes_the_largest_model() -> None:
    name, need = memory_need(plan("paper"))
    assert name == "Qwen2.5-14B"
    codes = 48 * (7168 * 5120 + 5120 * 5120 + 2 * 13824 * 5120 + 5120 * 13824)
    tokens = 512 * (16 + 256)  # the largest decode cell holds more than the largest prefill step
    cache = 2 * 48 * 8 * 128 * 2 * tokens
    assert codes + cache < need < codes + cache + 2 * 2 * 152064 * 5120 + 2**24


# -- looking around ----------------------------------------------------------------------------------


def test_looking_around_here(tmp_path: Path) -> None:
    here = Plan(BENCH, "smoke", tmp_path / "new")
    seen = look(here, detect())
    assert seen.free_bytes > 0
    assert seen.present_bytes == 0
    assert seen.cannot_write == ""
    assert seen.models_to_get == ("BitNet-tiny",)
    assert seen.hub_problem is None
    both = (DType.INT8, DType.FP8)
    assert set(seen.backend_problems) == {(name, dtype) for name in ("cpu_dense", "cpu_sparse") for dtype in both}
    assert not any(seen.backend_problems.values())
    assert not (tmp_path / "new").exists(), "a look leaves nothing behind"
    assert exit_code(diagnose(here, detect())) == 0


def test_hard_links_are_counted_once(tmp_path: Path) -> None:
    here = Plan(BENCH, "smoke", tmp_path)
    prepared = here.prepared_folder("BitNet-tiny", DType.INT8)
    converted = here.converted_folder("BitNet-tiny", DType.INT8, BENCH.profile("smoke").sparsity.end_to_end[0])
    prepared.mkdir(parents=True)
    converted.mkdir(parents=True)
    (prepared / "a.safetensors").write_bytes(b"x" * 1000)
    os.link(prepared / "a.safetensors", converted / "a.safetensors")
    (converted / "b.safetensors").write_bytes(b"x" * 10)
    assert look(here, detect()).present_bytes == 1010


def test_a_folder_that_is_a_file_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert "Not a directory" in look(Plan(BENCH, "smoke", tmp_path / "file"), detect()).cannot_write


def test_the_hub_is_asked_only_when_a_model_is_to_come_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(surroundings, "_hub_problem", lambda: asked.append(1) or "unreachable")
    hub = replace(plan("bitnet-2b"), data=tmp_path)
    assert look(hub, CPU).hub_problem == "unreachable"
    base = hub.base_folder("BitNet-2B")
    base.mkdir(parents=True)
    (base / "config.json").write_text("{}")
    (base / "model.safetensors").write_text("")
    assert look(hub, CPU).hub_problem is None
    assert len(asked) == 1


def test_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("TRANSFORMERS_OFFLINE", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # the discard port: refused
    assert "http://127.0.0.1:9 cannot be reached" in surroundings._hub_problem()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in surroundings._hub_problem()
