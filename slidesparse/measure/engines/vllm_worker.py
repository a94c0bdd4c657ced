"""vLLM in the child process of a session: starts the engine, runs counted steps one by one, checks them.

The engine core lives in this process (no second one schedules behind our back): what a step held and gave is read where
the scheduler learns of it. As vLLM does by default, the host prepares a step while the GPU runs the one before. So the
time of a step is that from the end of the step before to its own, when its tokens are on the host and given out; the
first of a run has nothing to hide behind. Arrays cross the process boundary as NumPy, never as torch tensors.
"""

from __future__ import annotations

import importlib.metadata
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch._C._autograd import DeviceType

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.errors import VerificationError
from slidesparse.kernels import verify
from slidesparse.kernels.verify import Check
from slidesparse.measure.engines import vllm_layers, vllm_rank
from slidesparse.measure.engines.base import PROFILED_DECODE_STEP, StepResult
from slidesparse.measure.engines.logits import GENERATED, compare, noise_bound
from slidesparse.measure.engines.model import reference_model
from slidesparse.measure.step_profile import KernelSpan, StepProfile
from slidesparse.plan import Phase, Variant
from slidesparse.vllm_plugin.buckets import bucket
from slidesparse.vllm_plugin.register import ARCHITECTURE, register, register_class

Tokens = npt.NDArray[np.int64]


class VllmWorker:
    """Made by `child.py`; `VllmSession` calls the public methods."""

    def __init__(self, arguments: dict[str, Any], variant: Variant, opened: float) -> None:
        """Start the engine.

        Args:
            arguments: of `vllm.LLM`.
            opened: `time.monotonic()` when the session was asked for.
        """
        self._checkpoint = Checkpoint.open(Path(arguments["model"]))
        if ARCHITECTURE in self._checkpoint.config.get("architectures", ()):
            register_class()
        register()  # not by the entry point alone: a checkout that is not installed has none
        from vllm import LLM

        self._variant = variant
        self._ranks = int(arguments["tensor_parallel_size"])
        with _when_weights_are_there() as loaded:
            self._llm = LLM(**arguments)
        self._engine = self._llm.llm_engine
        self._core = self._engine.engine_core.engine_core
        self._room = int(self._core.scheduler.max_num_scheduled_tokens)
        self._numbers = count()
        self._ended: list[tuple[int, int]] = []
        """Tokens and outputs of the steps that ended since `_run` last looked."""
        self._sizes: Counter[int] = Counter()
        self._watch_scheduler()
        self._on_ranks(vllm_rank.watch_graphs)
        self._on_ranks(vllm_rank.split_as_without_large_graphs)
        self._startup_s = loaded[0] - opened
        self._compile_s = time.monotonic() - loaded[0]

    def facts(self) -> dict[str, Any]:
        """What a session says of itself."""
        return {
            "startup_s": self._startup_s,
            "compile_s": self._compile_s,
            "vocabulary": int(self._llm.model_config.get_vocab_size()),
        }

    # -- steps -------------------------------------------------------------------------------------------

    def prefill_steps(self, tokens: Tokens) -> list[StepResult]:
        """Prompts [B, S, P] in exactly B steps, back to back. Raises VerificationError when they were cut otherwise."""
        batches, sequences, length = tokens.shape
        with self._nothing_left(), self._steps_of(sequences * length):
            self._add(tokens.reshape(-1, length), 1)
            steps, _ = self._run()
            self._require([step.outputs for step in steps] == [sequences] * batches, tokens, f"{batches} steps", steps)
        return steps

    def decode(self, tokens: Tokens, output_len: int) -> tuple[StepResult, list[StepResult], Tokens]:
        """Prompts [S, P] in one step, then `output_len` - 1 steps of one token a sequence; tokens [S, output_len]."""
        self._on_ranks(vllm_rank.graph_seconds)  # of steps before
        with self._nothing_left():
            numbers = self._add(tokens, output_len)
            steps, finished = self._run()
            given = [step.outputs for step in steps]
            self._require(given == [len(tokens)] * output_len, tokens, f"a step a token, {output_len} in all", steps)
        graphs = self._on_ranks(vllm_rank.graph_seconds)[0]
        if len(graphs) == output_len - 1:  # else some step was none, or the prompts' was one, too: not told apart
            steps[1:] = [replace(step, graph_seconds=own) for step, own in zip(steps[1:], graphs, strict=True)]
        by_number = {output.request_id: output.outputs[0].token_ids for output in finished}
        return steps[0], steps[1:], np.array([by_number[number] for number in numbers], dtype=np.int64)

    def profile_step(self, tokens: Tokens, phase: Phase) -> StepProfile | None:
        """GPU kernels of one step of that size; decode: of step PROFILED_DECODE_STEP after the prompts'.

        None without a GPU, and on several ranks, whose kernels run in other processes.
        """
        if self._ranks > 1 or not torch.cuda.is_available():
            return None
        with self._nothing_left():
            self._add(tokens, 1 if phase == "prefill" else PROFILED_DECODE_STEP + 2)
            if phase == "decode":  # the prompts' step and those before the one asked for; what they began ends here
                for _ in range(PROFILED_DECODE_STEP):
                    self._engine.step()
            torch.cuda.synchronize()
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                start = time.perf_counter()
                self._engine.step()  # begins exactly one step; what it may end has left the GPU already
                torch.cuda.synchronize()
                wall = time.perf_counter() - start
        # CUPTI records the kernels inside a graph's launch one by one. Copies and fills are among them.
        spans = [
            KernelSpan(event.name, event.time_range.start, event.time_range.end)
            for event in profile.events()
            if event.device_type == DeviceType.CUDA  # `is` fails: the binding makes a new object each time
        ]
        return StepProfile.of(spans, wall * 1e6)

    # -- checks ------------------------------------------------------------------------------------------

    def check_logits(self, prompts: Tokens) -> Check:
        """Logits of GENERATED greedy tokens after each prompt, against transformers with dequantised weights.

        The reference reads the engine's own tokens. Its bfloat16 logits, beside its float32 ones, say how far rounding
        alone moves them: that is what the bound is made of.
        """
        self._on_ranks(vllm_rank.keep_logits)
        try:
            tokens = self.decode(prompts, GENERATED)[2]
        finally:
            kept = self._on_ranks(vllm_rank.take_logits)[0]
        found = self._in_prompt_order(kept, len(prompts))
        generated = torch.from_numpy(tokens)
        text = torch.cat([torch.from_numpy(prompts), generated[:, :-1]], dim=1)
        expected, rounded = (self._reference(text, kind)[:, -GENERATED:] for kind in (torch.float32, torch.bfloat16))
        greedy = _sampled_greedily(found, generated)
        if not greedy.ok:
            return greedy
        against = "the dequantised transformers model in float32"
        return compare(found, expected, generated, noise_bound(rounded, expected), against)

    def check_step(self, tokens: Tokens, phase: Phase) -> Check:
        """The linears of a decoder layer at the very M, and that M itself in a step of the engine, untimed."""
        sequences, length = tokens.shape
        m = sequences if phase == "decode" else sequences * length
        if self._ranks > 1:
            found = Check("not_checked", f"not checked layer by layer: {self._ranks} ranks")
        else:
            arguments = (self._checkpoint.folder, self._variant, m)
            checks = self._on_ranks(vllm_layers.check_linears, *arguments)[0]
            worst = verify.worst(checks)
            found = Check(worst.verified, f"{len(checks)} linears of a layer at M={m}: {worst.text}")
        step = self.prefill_steps(tokens[np.newaxis])[0] if phase == "prefill" else self.decode(tokens, 2)[1][-1]
        if step.tokens != m:
            return Check("failed", f"a {phase} step held {step.tokens} tokens, expected {m}")
        return found

    # -- what ran ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A cell starts. What graphs were captured from stays: a replay of a graph calls no operator of ours."""
        self._sizes.clear()
        self._on_ranks(vllm_rank.forget_graphs)

    def path(self) -> str:
        """Model, graphs, attention and linears of the steps since `begin`; linears at the M of most of them."""
        seen = self._on_ranks(vllm_rank.what_runs)[0]
        m = self._sizes.most_common(1)[0][0] if self._sizes else 0
        graphs = seen["graphs"].get(m, "no graph")
        parts = [
            f"vLLM {importlib.metadata.version('vllm')} {seen['model']}, V1 model runner",
            f"M={m}: {graphs}",
            f"attention {'+'.join(seen['attention'])}, {seen['before attention']}",
            "+".join(seen["kernels"]),
        ]
        if self._ranks > 1:
            parts.append(f"{self._ranks} ranks, the first of which is described")
        text = ", ".join(parts)
        if m:
            prefix = f"M={bucket(m)}: "
            ran = {kind: [p for p in paths if p.startswith(prefix)] for kind, paths in seen["paths"].items()}
            text += "".join(f"; {kind}: {' | '.join(paths)}" for kind, paths in sorted(ran.items()) if paths)
        return text

    def tuning(self) -> str:
        """Look-ups of the store since the engine started: algorithms are chosen when graphs are captured."""
        return str(self._on_ranks(vllm_rank.look_ups)[0])

    def memory(self) -> dict[str, int]:
        """Bytes of GPU memory that torch holds in rank 0: now, and at most."""
        found: dict[str, int] = self._on_ranks(vllm_rank.memory)[0]
        return found

    def close(self) -> None:
        """End the ranks."""
        self._engine.engine_core.shutdown()

    # -- inside ------------------------------------------------------------------------------------------

    def _on_ranks(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        answers: list[Any] = self._engine.collective_rpc(function, args=arguments)
        return answers

    def _add(self, tokens: Tokens, outputs: int) -> list[str]:
        """Queue prompts [S, P]; their numbers, in order."""
        from vllm.inputs.engine import tokens_input
        from vllm.sampling_params import RequestOutputKind, SamplingParams

        params = SamplingParams(
            max_tokens=outputs,
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        numbers = []
        for prompt in tokens.tolist():
            numbers.append(str(next(self._numbers)))
            self._engine.add_request(numbers[-1], tokens_input(prompt), params)
        return numbers

    def _run(self) -> tuple[list[StepResult], list[Any]]:
        """Step until no request is left: the steps that ended, in order, and the requests that they finished."""
        self._ended.clear()
        steps: list[StepResult] = []
        finished: list[Any] = []
        since = time.perf_counter()
        while self._engine.has_unfinished_requests():
            finished += self._engine.step()
            if self._ended:
                now = time.perf_counter()
                tokens, outputs = self._ended.pop()
                if self._ended:
                    raise VerificationError("check failed: one call of the engine ended more than one step")
                steps.append(StepResult(now - since, tokens, outputs))
                self._sizes[tokens] += 1
                since = now
        return steps, finished

    def _watch_scheduler(self) -> None:
        """Keep what comes back to it: counts are taken from this. With nothing left to run it may schedule nothing."""
        scheduler = self._core.scheduler
        update = scheduler.update_from_output

        def updating(scheduled: Any, output: Any, *arguments: Any, **keywords: Any) -> Any:
            if scheduled.total_num_scheduled_tokens:
                outputs = sum(len(ids) for ids in output.sampled_token_ids)
                self._ended.append((int(scheduled.total_num_scheduled_tokens), outputs))
            return update(scheduled, output, *arguments, **keywords)

        scheduler.update_from_output = updating

    @contextmanager
    def _steps_of(self, tokens: int) -> Iterator[None]:
        """Inside the block a step holds at most so many tokens, so that prompts that wait are not taken along."""
        self._core.scheduler.max_num_scheduled_tokens = min(tokens, self._room)
        try:
            yield
        finally:
            self._core.scheduler.max_num_scheduled_tokens = self._room

    @contextmanager
    def _nothing_left(self) -> Iterator[None]:
        """However the block ends, neither a request nor a step that was begun is left for the next one."""
        try:
            yield
        finally:
            left = [*self._engine.output_processor.request_states]
            if left:
                self._engine.abort_request(left, internal=True)
            while self._core.batch_queue:
                self._engine.step()

    @staticmethod
    def _require(condition: bool, tokens: Tokens, wanted: str, steps: list[StepResult]) -> None:
        if not condition:
            seen = ", ".join(f"{step.tokens} tokens and {step.outputs} outputs" for step in steps[:3])
            raise VerificationError(
                f"check failed: prompts of {' x '.join(map(str, tokens.shape))} tokens did not take {wanted}: "
                f"{len(steps)} steps, of {seen or 'nothing'}{', ...' * (len(steps) > 3)}"
            )

    @staticmethod
    def _in_prompt_order(kept: list[tuple[list[str], torch.Tensor]], prompts: int) -> torch.Tensor:
        """Logits by step and internal request number -> [S, steps, V]; numbers ascend with the prompts."""
        steps = []
        for names, logits in kept:
            order = sorted(range(len(names)), key=lambda row: int(names[row].partition("-")[0]))
            steps.append(logits[order])
        shapes = {tuple(step.shape) for step in steps}
        if len(steps) != GENERATED or len(shapes) != 1 or steps[0].shape[0] != prompts:
            raise VerificationError(f"check failed: logits came in {len(steps)} pieces of {sorted(shapes)}")
        return torch.stack(steps, dim=1)

    @torch.inference_mode()
    def _reference(self, text: torch.Tensor, kind: torch.dtype) -> torch.Tensor:
        """Logits of the dequantised model, float32 [S, P, V] on the CPU."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = reference_model(self._checkpoint, kind, device=device)
        logits: torch.Tensor = model(input_ids=text.to(device), use_cache=False).logits.float().cpu()
        del model
        if device == "cuda":
            torch.cuda.empty_cache()
        return logits


def _sampled_greedily(found: torch.Tensor, generated: torch.Tensor) -> Check:
    """The tokens are the largest of these very logits: nothing between them and the sampler."""
    chosen = found.gather(-1, generated.unsqueeze(-1)).squeeze(-1)
    wrong = int((chosen != found.max(dim=-1).values).sum())
    if wrong:
        return Check("failed", f"{wrong} of {generated.numel()} tokens are not the largest of the engine's own logits")
    return Check("exact", "greedy")


@contextmanager
def _when_weights_are_there() -> Iterator[list[float]]:
    """Gets the time when every rank has loaded its model: what vLLM does next is compile, warm up and capture."""
    from vllm.v1.engine.core import EngineCore

    genuine = EngineCore._initialize_kv_caches
    times: list[float] = []

    def noting(core: Any, config: Any) -> Any:
        times.append(time.monotonic())
        return genuine(core, config)

    EngineCore._initialize_kv_caches = noting
    try:
        yield times
    finally:
        EngineCore._initialize_kv_caches = genuine
