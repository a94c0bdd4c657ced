"""The `vllm` engine: vLLM, with our plugin, in a process of its own for each session.

One process a variant, all M of both phases in it; several live on one GPU side by side. How a step is made and counted
is in `vllm_worker.py`, the process in `process.py`, memory in `vllm_memory.py`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, cast

import torch

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.checkpoint.section import SECTION
from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.backend import source_hash
from slidesparse.kernels.verify import Check
from slidesparse.machine import Machine, package_versions
from slidesparse.measure.clocks import free_gpu_memory
from slidesparse.measure.engines import vllm_memory as memory
from slidesparse.measure.engines.base import DecodeResult, Limits, StepResult
from slidesparse.measure.engines.model import require_fits
from slidesparse.measure.engines.process import ChildProcess
from slidesparse.measure.step_profile import StepProfile
from slidesparse.plan import STOCK, Phase, Variant
from slidesparse.tuning.store import TuningStore
from slidesparse.vllm_plugin.shards import shared_kv_heads
from slidesparse.vllm_plugin.versions import unsupported

WORKER = "slidesparse.measure.engines.vllm_worker:VllmWorker"
START_S = 900.0
"""Compilation of a large model with a cold cache, several engines at once on few cores."""
CALL_S = 900.0
PACKAGES = (
    "torch", "vllm", "triton", "transformers", "numpy", "compressed-tensors",
    "nvidia-cublas", "nvidia-cusparselt-cu12", "nvidia-cusparselt-cu13",
)  # fmt: skip
"""Whose version can change a step."""
MODEL = (
    "triton_rope", "../vllm_plugin/bitnet", "../vllm_plugin/rope_attention", "../vllm_plugin/fused",
    "../vllm_plugin/linear_op", "../vllm_plugin/auto",
)  # fmt: skip
"""Code of ours that can too, and that no tuned algorithm stands for: which kernels a layer is, and rotary."""
ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine core in the process that calls it, or M is not exact
    "VLLM_USE_V2_MODEL_RUNNER": "0",  # the default depends on the architecture: rows would not be comparable
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
"""Of the child, set before vLLM is imported. Its compile cache stays where the user has it."""
UTILIZATION = 0.01
"""vLLM refuses to start unless this share of the GPU is free. It does nothing else: the KV cache has its own size."""


class VllmEngine:
    """See `base.Engine`."""

    name = "vllm"
    worker: ClassVar[str] = WORKER
    """What the child process makes."""

    def require(self, machine: Machine) -> None:
        if machine.gpu is None:
            raise UnsupportedHere("engine vllm needs an NVIDIA GPU")
        try:
            version = importlib.metadata.version("vllm")
        except importlib.metadata.PackageNotFoundError:
            raise UnsupportedHere("engine vllm: vLLM is not installed; pip install vllm==0.24.0") from None
        problem = unsupported(version)
        if problem is not None:
            raise UnsupportedHere(problem)

    def versions(self) -> dict[str, str]:
        packages = {name: version for name, version in package_versions().items() if name in PACKAGES}
        return packages | {"model": source_hash(*MODEL)}

    def together(self, folders: Sequence[Path], limits: Limits, machine: Machine) -> int:
        """By the largest of them, and the free memory of the fullest GPU.

        What earlier tasks of this process left with torch's allocator, up to half of the GPU after tuning, is given
        back first: engines are other processes.
        """
        free_gpu_memory()
        devices = range(min(limits.tensor_parallel, torch.cuda.device_count()))
        free = min((torch.cuda.mem_get_info(device)[0] for device in devices), default=0)
        turn = max(memory.turn_bytes(memory.Widths.of(Checkpoint.open(folder).config), limits) for folder in folders)
        return memory.fit([need(folder, limits) for folder in folders], turn, free)

    def open(
        self, folder: Path, dtype: DType, variant: Variant, store: TuningStore | None, limits: Limits
    ) -> VllmSession:
        """See `base.Engine`. The store is read again, from its file, by the child."""
        opened = time.monotonic()
        checkpoint = Checkpoint.open(folder)
        require_fits(checkpoint, str(folder), dtype, variant)
        tuning = None if store is None or not store.path.is_file() else store.path
        arguments = engine_arguments(checkpoint, variant, tuning, limits)
        return start(self.worker, arguments, variant, opened, f"{folder.name} {variant}")


def start(worker: str, arguments: dict[str, Any], variant: Variant, opened: float, what: str) -> VllmSession:
    """A session on an engine with these arguments. Raises as `ChildProcess` does."""
    keywords = {"arguments": arguments, "variant": variant, "opened": opened}
    process = ChildProcess(worker, keywords, what=what, environment=environment(), start_s=START_S, call_s=CALL_S)
    try:
        return VllmSession(process)
    except BaseException:
        process.close()
        raise


def environment() -> dict[str, str]:
    """Variables of the child. vLLM imports flashinfer unguarded unless its sampler is turned off."""
    sampler = {} if importlib.util.find_spec("flashinfer") else {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
    return ENVIRONMENT | sampler


def engine_arguments(checkpoint: Checkpoint, variant: Variant, tuning: Path | None, limits: Limits) -> dict[str, Any]:
    """Of `vllm.LLM`: a step holds every token of a cell's step, and its very size is a CUDA graph.

    Raises CheckpointError where the ranks cannot share the heads.
    """
    settings: dict[str, Any] = {"backend": variant.backend}
    if variant.sparsity is not None:
        settings["sparsity"] = str(variant.sparsity)
    if tuning is not None and variant.backend != STOCK:
        settings["tuning"] = str(tuning)
    widths = memory.Widths.of(checkpoint.config)
    shared = shared_kv_heads(widths.heads, widths.kv_heads, limits.tensor_parallel)
    return {
        "model": str(checkpoint.folder),
        "dtype": "bfloat16",
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "max_model_len": memory.positions(limits),
        "max_num_batched_tokens": max(memory.step_tokens(limits), memory.positions(limits)),
        "max_num_seqs": memory.sequences(limits),
        "enable_prefix_caching": False,
        "async_scheduling": True,  # the default where it can be; said, so that no row differs
        "tensor_parallel_size": limits.tensor_parallel,
        "block_size": memory.BLOCK,
        "kv_cache_memory_bytes": memory.cache_bytes(widths, limits),
        "gpu_memory_utilization": UTILIZATION,
        "seed": 0,
        "compilation_config": {"cudagraph_capture_sizes": memory.sizes(limits)},
        "additional_config": {SECTION: settings},
        **({} if shared == widths.kv_heads else {"hf_overrides": {"num_key_value_heads": shared}}),
    }


def need(folder: Path, limits: Limits) -> int:
    """Bytes of one rank of a waiting engine on this checkpoint, from above."""
    checkpoint = Checkpoint.open(folder)
    widths = memory.Widths.of(checkpoint.config)
    return memory.engine_bytes(widths, limits, memory.weight_bytes(folder), checkpoint.section is not None)


class VllmSession:
    """See `base.Session`."""

    lead_in = 1
    own_process = True

    def __init__(self, process: ChildProcess) -> None:
        self._process = process
        facts = process.call("facts")
        self.startup_s = float(facts["startup_s"])
        self.compile_s = float(facts["compile_s"])
        self.vocabulary = int(facts["vocabulary"])

    def begin(self) -> None:
        self._process.call("begin")

    def prefill_steps(self, tokens: torch.Tensor) -> tuple[StepResult, ...]:
        return tuple(self._process.call("prefill_steps", tokens.numpy()))

    def decode(self, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        prefill, steps, generated = self._process.call("decode", tokens.numpy(), output_len)
        return DecodeResult(prefill, tuple(steps), torch.from_numpy(generated))

    def profile_step(self, tokens: torch.Tensor, phase: Phase) -> StepProfile | None:
        return cast("StepProfile | None", self._process.call("profile_step", tokens.numpy(), phase))

    def check_logits(self, prompts: torch.Tensor) -> Check:
        return cast(Check, self._process.call("check_logits", prompts.numpy()))

    def check_step(self, tokens: torch.Tensor, phase: Phase) -> Check:
        return cast(Check, self._process.call("check_step", tokens.numpy(), phase))

    def path(self) -> str:
        return str(self._process.call("path"))

    def tuning(self) -> str:
        return str(self._process.call("tuning"))

    def memory(self) -> dict[str, int]:
        """Bytes that torch holds on the first rank's GPU: `reserved` now, and its `peak`."""
        return dict(self._process.call("memory"))

    def close(self) -> None:
        self._process.close()
