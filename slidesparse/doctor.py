"""What this machine can and cannot run of a plan, and why: judged from facts, so that it can be tested anywhere."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from slidesparse.config import Backend
from slidesparse.dtypes import DType
from slidesparse.machine import Machine
from slidesparse.model_size import BF16, checkpoint_bytes, kv_cache_bytes, parameter_count
from slidesparse.plan import CalibrateCell, Cell, KernelCell, LinearCell, Plan, Task, ThroughputCell, TuneCell
from slidesparse.surroundings import Surroundings, look

PYTHONS = ("3.11", "3.12")
SPARSE_CAPABILITY = (8, 0)
"""The first with 2:4 sparse tensor cores (Ampere)."""
DRIVER_FOR_CUDA = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""Oldest Linux driver for each CUDA major version, minor-version compatibility included (CUDA compatibility guide)."""
GPU_BACKENDS = tuple(name for name in get_args(Backend) if not name.startswith("cpu_"))
LIBRARY_OF = {"cublaslt": "cublasLt", "cusparselt": "cusparseLt"}
DISK_MARGIN = 1.1
"""Records, tokenisers, caches: below this multiple of the models' bytes there is a warning."""

Status = Literal["ok", "warning", "missing"]


@dataclass(frozen=True)
class Finding:
    """One fact about this machine. `missing`: the profile cannot run; `warning`: part of it will be skipped."""

    name: str
    status: Status
    detail: str
    advice: str = ""


def diagnose(plan: Plan, machine: Machine, seen: Surroundings | None = None) -> list[Finding]:
    """Findings on the machine, then one for each task of the plan. `seen` None: look around first.

    Raises:
        CheckpointError: a model of the profile has a config whose size cannot be computed.
    """
    seen = look(plan, machine) if seen is None else seen
    host = [
        *_software(plan, machine, seen),
        *_gpu(plan, machine, seen),
        *_libraries(plan, seen),
        *_backends(plan, seen),
        _memory(plan, machine),
        *_disk(plan, seen),
        *_source(plan, seen),
    ]
    return [*host, *(_task(plan, task, machine, seen, host) for task in plan.tasks)]


def exit_code(findings: Iterable[Finding]) -> int:
    """0 if the profile can run (parts may be skipped), else 1."""
    return 1 if any(finding.status == "missing" for finding in findings) else 0


def disk_need(plan: Plan) -> int:
    """Bytes of all checkpoints of a plan. Converted ones share everything but their codes with hard links; a local
    base model stays where it is."""
    profile = plan.profile
    lifted = profile.convert.layout == "lifted"
    total = 0
    for name in profile.models:
        model = plan.bench.models[name]
        size = checkpoint_bytes(model)
        patterns = [
            checkpoint_bytes(model, sparsity if lifted else None).converted for sparsity in profile.sparsity.end_to_end
        ]
        base = 0 if profile.source == "local" else size.base
        total += base + len(profile.dtypes) * (size.prepared + sum(patterns))
    return total


def memory_need(plan: Plan) -> tuple[str, int]:
    """The model of the plan that needs most memory, and how much: its weights and the largest KV cache.

    8-bit codes (sparse ones with their indices), everything else in BF16, keys and values of every token of the
    largest cell. Activations and the runtime itself come on top.
    """
    profile = plan.profile
    prefill = max((m for m in profile.prefill.m), default=0)
    decode = max(profile.decode.m, default=0) * (profile.decode.prompt_len + profile.decode.output_len)
    needs = {}
    for name in profile.models:
        model = plan.bench.models[name]
        count = parameter_count(model)
        shapes = model.linear_shapes().values()
        dense = sum(n * k for n, k in shapes)
        sparse = max((sum(s.weight_bytes(n, k) for n, k in shapes) for s in profile.sparsity.end_to_end), default=0)
        codes = count.linear * max(dense, sparse) // dense
        needs[name] = codes + count.other * BF16 + kv_cache_bytes(model, max(prefill, decode))
    largest = max(needs, key=lambda name: needs[name])
    return largest, needs[largest]


# -- the machine --------------------------------------------------------------------------------------


def _software(plan: Plan, machine: Machine, seen: Surroundings) -> Iterator[Finding]:
    known = ".".join(machine.python.split(".")[:2]) in PYTHONS
    yield Finding(
        "Python",
        "ok" if known else "missing",
        machine.python,
        "" if known else f"use Python {' or '.join(PYTHONS)}: make clean, then make PYTHON=/path/to/python3.12 env",
    )
    build = f"CUDA {machine.cuda}" if machine.cuda else "CPU build"
    cpu_only = _wants_gpu(plan) and bool(seen.nvidia_gpus) and not machine.cuda
    yield Finding(
        "torch",
        "missing" if cpu_only else "ok",
        f"{machine.torch} ({build})",
        "this build cannot use the GPU: make TORCH=cuda env" if cpu_only else "",
    )


def _gpu(plan: Plan, machine: Machine, seen: Surroundings) -> Iterator[Finding]:
    wanted = _wants_gpu(plan)
    driver = _driver(machine, seen)
    if machine.gpu is None:
        if seen.nvidia_gpus:
            detail, advice = f"{seen.nvidia_gpus[0]}, but torch cannot use it", "see torch and driver"
        else:
            detail = "no NVIDIA GPU, or no driver"
            advice = "run on a GPU host (containers: docker run --gpus all), or use --profile smoke"
        detail += "" if wanted else "; this profile needs none"
        yield Finding("GPU", "missing" if wanted else "ok", detail, advice if wanted else "")
        if seen.nvidia_gpus:
            yield driver
        return
    count = f"{machine.gpu_count} x " if machine.gpu_count > 1 else ""
    yield Finding("GPU", "ok", f"{count}{machine.gpu.name}, {_gib(machine.gpu.memory_bytes)}")
    yield driver
    major, minor = machine.gpu.compute_capability
    sparse = machine.gpu.compute_capability >= SPARSE_CAPABILITY
    yield Finding(
        "compute capability",
        "ok" if sparse or not wanted else "missing",
        f"{major}.{minor}: {'has' if sparse else 'no'} 2:4 sparse tensor cores",
        "" if sparse else "sparse tensor cores came with Ampere (8.0): use a newer GPU",
    )
    if DType.FP8 in plan.profile.dtypes:
        fp8 = machine.supports_fp8()
        yield Finding(
            "FP8",
            "ok" if fp8 or not wanted else "warning",
            "tensor cores support it" if fp8 else f"needs compute capability 8.9, this is {major}.{minor}",
            "" if fp8 else "FP8 cells are skipped",
        )


def _driver(machine: Machine, seen: Surroundings) -> Finding:
    version = seen.driver or (machine.gpu.driver if machine.gpu else "")
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if not machine.cuda:
        return Finding("driver", "ok", version or "unknown")
    needed = DRIVER_FOR_CUDA.get(int(machine.cuda.split(".")[0]))
    if needed is None or not numbers:
        return Finding("driver", "ok", f"{version or 'unknown'} (CUDA {machine.cuda}: no minimum known)")
    text = ".".join(map(str, needed))
    if numbers < needed:
        advice = f"install driver {text} or newer, or run the image whose CUDA your driver supports"
        return Finding("driver", "missing", f"{version}; torch with CUDA {machine.cuda} needs {text}", advice)
    return Finding("driver", "ok", f"{version} (CUDA {machine.cuda} needs {text})")


def _libraries(plan: Plan, seen: Surroundings) -> Iterator[Finding]:
    names = plan.profile.backends.every
    wanted = {LIBRARY_OF[name] for name in names if name in LIBRARY_OF}
    cuda_torch = "make TORCH=cuda env" if seen.nvidia_gpus else "comes with the CUDA build of torch"
    for library in sorted(set(LIBRARY_OF.values())):
        yield _present(f"lib{library}", seen.libraries.get(library, ""), library in wanted, cuda_torch)
    gpu = any(name in GPU_BACKENDS for name in names)
    yield _present("triton", seen.packages.get("triton", ""), gpu, cuda_torch)
    vllm = plan.profile.engine == "vllm" or "vllm" in names
    advice = "use the image, which holds it, or install it into the environment (docs/install.md)"
    yield _present("vLLM", seen.packages.get("vllm", ""), vllm, advice)


def _present(name: str, found: str, wanted: bool, advice: str) -> Finding:
    if found or not wanted:
        return Finding(name, "ok", found or "not installed; this profile needs none")
    return Finding(name, "missing", "not found", advice)


def _backends(plan: Plan, seen: Surroundings) -> Iterator[Finding]:
    profile = plan.profile
    for name in profile.backends.every:
        problems = {dtype: seen.backend_problems[name, dtype] for dtype in profile.types}
        yield _combined(f"backend {name}", {dtype.value: problem for dtype, problem in problems.items()})
    yield _combined(f"engine {profile.engine}", {"all": seen.engine_problem})


def _combined(name: str, problems: dict[str, str]) -> Finding:
    """Everything blocked: missing. A part (a type that the hardware lacks): a warning."""
    blocked = {part: problem for part, problem in problems.items() if problem}
    if not blocked:
        return Finding(name, "ok", "can run")
    part, problem = next(iter(blocked.items()))
    if len(blocked) == len(problems):
        return Finding(name, "missing", problem)
    return Finding(name, "warning", f"{part}: {problem}", "these cells are skipped")


def _memory(plan: Plan, machine: Machine) -> Finding:
    model, need = memory_need(plan)
    gpu = machine.gpu if _wants_gpu(plan) else None
    have, where = (machine.memory_bytes, "RAM") if gpu is None else (gpu.memory_bytes, "GPU memory")
    detail = f"{_gib(have)} {where}; {model} needs {_gib(need)} for weights and KV cache"
    if need > have:
        return Finding("memory", "missing", detail, "take a machine with more, or a profile with smaller models or M")
    if need > 0.8 * have:
        return Finding("memory", "warning", detail, "large cells may fail for want of memory")
    return Finding("memory", "ok", detail)


def _disk(plan: Plan, seen: Surroundings) -> Iterator[Finding]:
    need = max(0, disk_need(plan) - seen.present_bytes)
    detail = f"{_gib(seen.free_bytes)} free in {plan.data.absolute()}; models still to be made need {_gib(need)}"
    if need > seen.free_bytes:
        yield Finding("disk", "missing", detail, "free some space, or choose another folder with --data")
    elif need * DISK_MARGIN > seen.free_bytes:
        yield Finding("disk", "warning", detail, "nothing else should write there during the run")
    else:
        yield Finding("disk", "ok", detail)
    if seen.cannot_write:
        yield Finding("data folder", "missing", seen.cannot_write, "choose a folder that you can write to with --data")
    else:
        yield Finding("data folder", "ok", "can be written")


def _source(plan: Plan, seen: Surroundings) -> Iterator[Finding]:
    source, models = plan.profile.source, ", ".join(seen.models_to_get)
    if not models:
        yield Finding("models", "ok", "all base models are there")
    elif source == "hub":
        problem = seen.hub_problem
        without = [name for name in seen.models_to_get if plan.bench.models[name].hub is None]
        if without:
            problem = f"{', '.join(without)}: no hub repository in the bench file"
        if problem:
            advice = "use --source local (a folder you have) or --source synthetic (seeded random weights)"
            yield Finding("models", "missing", problem, advice)
        else:
            yield Finding("models", "ok", f"{models}: from the hub")
    elif source == "local":
        detail = f"no local folder with config.json and safetensors for {models}"
        yield Finding("models", "missing", detail, "set key models.NAME.local of the bench file")
    else:
        yield Finding("models", "ok", f"{models}: synthetic, seed {plan.profile.seed}")


# -- the tasks ----------------------------------------------------------------------------------------


def _task(plan: Plan, task: Task, machine: Machine, seen: Surroundings, host: list[Finding]) -> Finding:
    """Can this task run? Names what stands in its way."""
    needs = {
        "prepare": ("disk", "data folder", "models"),
        "convert": ("disk", "data folder", "models"),
        "calibrate": ("GPU", "torch", "compute capability", "data folder"),
    }
    blocking = needs.get(task.stage, ("data folder",))
    if task.stage in ("prefill", "decode"):
        blocking = (*blocking, f"engine {plan.profile.engine}", "memory")
    name = f"task {task.number}, {task.title}"
    for finding in host:
        if finding.name in blocking and finding.status == "missing":
            return Finding(name, "missing", f"cannot run: {finding.detail}")
    reasons = [_in_the_way(plan, cell, machine, seen) for cell in task.cells]
    blocked = [reason for reason in reasons if reason]
    if blocked and len(blocked) == len(reasons):
        return Finding(name, "missing", f"cannot run: {blocked[0]}")
    if blocked:
        return Finding(name, "warning", f"{len(blocked)} of {len(reasons)} cells will be skipped: {blocked[0]}")
    return Finding(name, "ok", f"{len(task.cells)} cells can run")


def _in_the_way(plan: Plan, cell: Cell, machine: Machine, seen: Surroundings) -> str:
    """Why a cell cannot run although its stage can; empty if nothing is in the way."""
    match cell:
        case TuneCell() | ThroughputCell() | KernelCell():
            return seen.backend_problems[cell.variant.backend, cell.dtype]
        case LinearCell():
            # A row is a comparison: without its dense side there is none.
            sides = (cell.variant.backend, plan.profile.backends.dense[0])
            return next((problem for side in sides if (problem := seen.backend_problems[side, cell.dtype])), "")
        case CalibrateCell(dtype=DType.FP8) if not machine.supports_fp8():
            return "FP8E4M3 needs compute capability 8.9 (Ada)"
        case CalibrateCell(quantity="tensor cores"):
            return seen.rates_problem
        case _:
            return ""


def _wants_gpu(plan: Plan) -> bool:
    names = plan.profile.backends.every
    return plan.profile.engine == "vllm" or any(name in GPU_BACKENDS for name in names)


def _gib(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
