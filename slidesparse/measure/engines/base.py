"""What an inference engine must offer to be measured. One session a variant serves every M of both phases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.verify import Check
from slidesparse.machine import Machine
from slidesparse.measure.step_profile import StepProfile
from slidesparse.plan import Phase, Variant
from slidesparse.tuning.store import TuningStore

PROFILED_DECODE_STEP = 2
"""Which step after the prompts' a decode profile is of: sequences attend to so many tokens beyond their prompts."""


@dataclass(frozen=True)
class Limits:
    """What a session will be asked for: an engine sizes its buffers and captures its graphs by it."""

    prefill: tuple[tuple[int, int], ...]
    """Sequences and prompt length of each prefill step."""
    decode: tuple[int, ...]
    """Sequences of each decode batch."""
    decode_prompt: int
    decode_output: int
    tensor_parallel: int = 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Tokens of every step that will be timed, ascending."""
        return tuple(sorted({s * p for s, p in self.prefill} | set(self.decode)))

    @property
    def step_tokens(self) -> int:
        """Tokens of the largest step, timed or not."""
        return max([*self.sizes, *(s * self.decode_prompt for s in self.decode)])

    @property
    def sequences(self) -> int:
        return max([*(s for s, _ in self.prefill), *self.decode])

    @property
    def positions(self) -> int:
        """Tokens of the longest sequence, prompt and output."""
        return max([*(p + 1 for _, p in self.prefill), *(self.decode_prompt + self.decode_output for _ in self.decode)])

    @property
    def cached_tokens(self) -> int:
        """Tokens of the largest batch, over all its sequences: what the KV cache must hold."""
        decode = max((s * (self.decode_prompt + self.decode_output) for s in self.decode), default=0)
        return max([decode, *(s * (p + 1) for s, p in self.prefill)])


@dataclass(frozen=True)
class StepResult:
    """One engine step. Counts are taken from the tensors that the model saw, not from what was asked for."""

    seconds: float
    tokens: int
    """Tokens that went into the model."""
    outputs: int
    """Tokens that came out (one a sequence)."""
    graph_seconds: float = -1.0
    """GPU time of the model, where it ran as one CUDA graph; -1 elsewhere."""


@dataclass(frozen=True)
class DecodeResult:
    """A batch from its prompts to its last token."""

    prefill: StepResult
    """Reads the prompts and gives the first token of each sequence."""
    steps: tuple[StepResult, ...]
    """output_len - 1 steps of one token a sequence."""
    tokens: torch.Tensor
    """Generated tokens, int64 [S, output_len]."""

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + sum(step.seconds for step in self.steps)


class Session(Protocol):
    """A loaded model. Not thread-safe; times are the engine's own, of complete steps."""

    startup_s: float
    """Seconds from opening to a model in memory."""
    compile_s: float
    """Seconds of compilation and graph capture, after that."""
    vocabulary: int
    """Prompts hold tokens 0 to vocabulary - 1."""
    own_process: bool
    """It has a process of its own, whose memory is not seen from here."""

    def begin(self) -> None:
        """A cell starts: `path` and `tuning` speak of what runs from here on."""

    lead_in: int
    """Steps at the start of a run that do not yet overlap with the one before, as all others do."""

    def prefill_steps(self, tokens: torch.Tensor) -> tuple[StepResult, ...]:
        """Read prompts, int64 [B, S, P], in B steps back to back; one greedy token a sequence."""

    def decode(self, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        """Read prompts, int64 [S, P], and generate exactly `output_len` greedy tokens each; end tokens are ignored."""

    def check_logits(self, prompts: torch.Tensor) -> Check:
        """Compare logits and greedy tokens on prompts, int64 [S, P], with an independent dense model."""

    def check_step(self, tokens: torch.Tensor, phase: Phase) -> Check:
        """Run one untimed step of the very size that is timed, and check what its linear layers gave.

        `not_checked` where the engine cannot look at them.
        """

    def profile_step(self, tokens: torch.Tensor, phase: Phase) -> StepProfile | None:
        """The GPU kernels of one step; decode: see PROFILED_DECODE_STEP. None where there is no GPU to profile."""

    def path(self) -> str:
        """The code path that ran since `begin`."""

    def tuning(self) -> str:
        """Look-ups of the tuning store since `begin`."""

    def close(self) -> None:
        """Free the model."""


class Engine(Protocol):
    """Opens sessions."""

    name: str

    def require(self, machine: Machine) -> None:
        """Raises UnsupportedHere, with the reason, where the engine cannot run."""

    def versions(self) -> dict[str, str]:
        """Packages whose version can change what is measured."""

    def together(self, folders: Sequence[Path], limits: Limits, machine: Machine) -> int:
        """How many sessions of these checkpoints fit into the machine's memory side by side, at least 1."""

    def open(self, folder: Path, dtype: DType, variant: Variant, store: TuningStore, limits: Limits) -> Session:
        """Load a checkpoint; several threads may do so at once.

        Raises CheckpointError, MemoryError, UnsupportedHere.
        """


def engine(name: str) -> Engine:
    """The engine of that name. Raises UnsupportedHere for one that this version does not have."""
    if name == "transformers":
        from slidesparse.measure.engines.transformers_engine import TransformersEngine

        return TransformersEngine()
    if name == "vllm":
        from slidesparse.measure.engines.vllm_engine import VllmEngine

        return VllmEngine()
    raise UnsupportedHere(f"engine {name} is not in this version, which has transformers and vllm")
