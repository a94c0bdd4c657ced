"""The `transformers` engine: its own model implementation, our W8A8 linears in place of the decoder's."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import DynamicCache

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import DType
from slidesparse.kernels import verify
from slidesparse.kernels.backend import backend
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.kernels.verify import Check
from slidesparse.machine import Machine, package_versions
from slidesparse.measure.engines.base import DecodeResult, Limits, StepResult
from slidesparse.measure.engines.logits import GENERATED, Bound, compare
from slidesparse.measure.engines.model import bias_of, build, plain_codes, reference_model, require_fits
from slidesparse.plan import Phase, Variant
from slidesparse.tuning.store import TuningStore

LOGITS_BOUND = 0.05
"""Largest relative L2 difference of one position's logits from the dequantised model.

NOTE: the two models add in another order, so now and then an activation that lies within a float32 rounding of a tie
gets the neighbouring code. One such code moved the logits of a small BitNet by 1.2 %; without one they agree to 1e-6.
That is why each layer is checked on its own, exactly, by `check_step`: this check is for what lies between layers.
"""
CHECKED_ROWS = 8
"""Tokens of a step whose layer outputs are compared with the reference, spread over the step."""


class TransformersEngine:
    """Eager PyTorch on the CPU; bfloat16 activations."""

    name = "transformers"

    def require(self, machine: Machine) -> None:
        """Runs everywhere."""

    def versions(self) -> dict[str, str]:
        names = ("torch", "transformers", "numpy", "numba")
        return {name: version for name, version in package_versions().items() if name in names}

    def together(self, folders: Sequence[Path], limits: Limits, machine: Machine) -> int:
        """One: every session takes all cores."""
        return 1

    def open(
        self,
        folder: Path,
        dtype: DType,
        variant: Variant,
        store: TuningStore | None,
        limits: Limits | None = None,
        activations: torch.dtype = torch.bfloat16,
    ) -> TransformersSession:
        """Load a prepared or converted checkpoint; plain weights are lifted here, layer by layer."""
        return TransformersSession(Checkpoint.open(folder), str(folder), dtype, variant, store, activations)


class TransformersSession:
    """See `base.Session`."""

    compile_s = 0.0
    lead_in = 0
    own_process = False

    def __init__(
        self,
        checkpoint: Checkpoint,
        where: str,
        dtype: DType,
        variant: Variant,
        store: TuningStore | None,
        activations: torch.dtype,
    ) -> None:
        started = time.perf_counter()
        require_fits(checkpoint, where, dtype, variant)
        self._checkpoint, self._dtype, self._variant, self._store = checkpoint, dtype, variant, store
        self._activations = activations
        lifted = checkpoint.section is not None and checkpoint.section.layout == "lifted"

        def linear(name: str, empty: nn.Linear) -> nn.Module:
            return W8A8Linear(
                name,
                checkpoint.load(f"{name}.weight"),
                checkpoint.load(f"{name}.weight_scale"),
                bias_of(checkpoint, name),
                k=empty.in_features,
                variant=variant,
                dtype=dtype,
                lifted=lifted,
                store=store,
            )

        self._model = build(checkpoint, activations, linear)
        self._linears = [module for module in self._model.modules() if isinstance(module, W8A8Linear)]
        self._seen = 0
        self._model.get_input_embeddings().register_forward_pre_hook(self._count)
        self.vocabulary = int(self._model.config.vocab_size)
        self.startup_s = time.perf_counter() - started

    def begin(self) -> None:
        for linear in self._linears:
            linear.forget()
        if self._store is not None:
            self._store.reset()

    def prefill_steps(self, tokens: torch.Tensor) -> tuple[StepResult, ...]:
        return tuple(self.prefill_step(batch) for batch in tokens)

    def prefill_step(self, tokens: torch.Tensor) -> StepResult:
        """Prompts, int64 [S, P]."""
        return self._step(tokens, DynamicCache(config=self._model.config))[0]

    def decode(self, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        cache = DynamicCache(config=self._model.config)
        prefill, following = self._step(tokens, cache)
        steps, generated = [], [following]
        for _ in range(output_len - 1):
            step, following = self._step(following, cache)
            steps.append(step)
            generated.append(following)
        return DecodeResult(prefill, tuple(steps), torch.cat(generated, dim=1))

    @torch.inference_mode()
    def logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """float32 [S, P, vocabulary] of prompts, int64 [S, P]."""
        logits: torch.Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits.float()

    @torch.inference_mode()
    def check_logits(self, prompts: torch.Tensor) -> Check:
        """Against `model.reference_model`: transformers with dequantised weights and fake-quantised activations.

        Every position's logits are compared, and the greedy tokens of the cached decode (`logits.compare`).
        """
        generated = self.decode(prompts, GENERATED).tokens
        text = torch.cat([prompts, generated[:, :-1]], dim=1)
        expected = reference_model(self._checkpoint, self._activations)(input_ids=text, use_cache=False).logits.float()
        bound = Bound(LOGITS_BOUND, f"{LOGITS_BOUND:g}")
        return compare(self.logits(text), expected, generated, bound, "the dequantised transformers model")

    @torch.inference_mode()
    def check_step(self, tokens: torch.Tensor, phase: Phase) -> Check:
        """Every decoder linear at the M that is timed, on CHECKED_ROWS of its tokens: same input, reference layer."""
        cache = DynamicCache(config=self._model.config)
        with self._checking() as checks:
            _, following = self._step(tokens, cache)
            if phase == "decode":
                self._step(following, cache)
        found = verify.worst(checks)
        return Check(found.verified, f"{len(checks)} layer outputs: {found.text}")

    def profile_step(self, tokens: torch.Tensor, phase: Phase) -> None:
        """There is no GPU."""

    def path(self) -> str:
        ran = sorted({path for linear in self._linears for path in linear.paths})
        side = backend(self._variant.backend)
        return (
            f"transformers {transformers.__version__} {type(self._model).__name__}, eager, "
            f"{self._model.config._attn_implementation} attention, {str(self._activations).removeprefix('torch.')}; "
            f"{side.name}: {' | '.join(ran)}; q, k, v and gate, up separate"
        )

    def tuning(self) -> str:
        return "no store" if self._store is None else self._store.summary()

    def close(self) -> None:
        self._model = None
        self._linears = []

    # -- inside ------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def _step(self, tokens: torch.Tensor, cache: DynamicCache) -> tuple[StepResult, torch.Tensor]:
        """One forward pass and the greedy token of each sequence, int64 [S, 1]."""
        self._seen = 0
        start = time.perf_counter()
        logits = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        following = logits[:, -1].argmax(dim=-1, keepdim=True)
        seconds = time.perf_counter() - start
        return StepResult(seconds, self._seen, following.numel()), following

    def _count(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._seen += inputs[0].numel()

    @contextmanager
    def _checking(self) -> Iterator[list[Check]]:
        """Collect a check of every linear call inside the block."""
        checks: list[Check] = []

        def check(module: nn.Module, inputs: tuple[Any, ...], y: torch.Tensor) -> None:
            assert isinstance(module, W8A8Linear)
            x, y = inputs[0].reshape(-1, module.k), y.reshape(-1, module.n)
            rows = torch.linspace(0, x.shape[0] - 1, min(CHECKED_ROWS, x.shape[0])).long()
            error, _ = module.backend.accumulation_error(self._dtype, module.weight.k)
            codes = plain_codes(self._checkpoint, module.name, module.k)
            found = verify.check_linear(x[rows], y[rows], codes, module.scale, module.bias, self._dtype, error)
            checks.append(Check(found.verified, found.text if found.ok else f"{module.name}: {found.text}"))

        handles = [linear.register_forward_hook(check) for linear in self._linears]
        try:
            yield checks
        finally:
            for handle in handles:
                handle.remove()
