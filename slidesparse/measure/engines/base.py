"""What an inference engine must offer to be measured. One session a variant serves every M of both phases."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from slidesparse.dtypes import DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels.verify import Check
from slidesparse.machine import Machine
from slidesparse.plan import Phase, Variant
from slidesparse.tuning.store import TuningStore


@dataclass(frozen=True)
class StepResult:
    """One engine step. Counts are taken from the tensors that the model saw, not from what was asked for."""

    seconds: float
    tokens: int
    """Tokens that went into the model."""
    outputs: int
    """Tokens that came out (one a sequence)."""


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
    """Seconds from opening to ready."""
    vocabulary: int
    """Prompts hold tokens 0 to vocabulary - 1."""

    def begin(self) -> None:
        """A cell starts: `path` and `tuning` speak of what runs from here on."""

    def prefill_step(self, tokens: torch.Tensor) -> StepResult:
        """Read prompts, int64 [S, P], in one step; one greedy token a sequence."""

    def decode(self, tokens: torch.Tensor, output_len: int) -> DecodeResult:
        """Read prompts, int64 [S, P], and generate exactly `output_len` greedy tokens each; end tokens are ignored."""

    def check_logits(self, prompts: torch.Tensor) -> Check:
        """Compare logits and greedy tokens on prompts, int64 [S, P], with an independent dense model."""

    def check_step(self, tokens: torch.Tensor, phase: Phase) -> Check:
        """Run one untimed step of the very size that is timed, and check what its linear layers gave."""

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

    def open(self, folder: Path, dtype: DType, variant: Variant, store: TuningStore) -> Session:
        """Load a checkpoint. Raises CheckpointError, MemoryError, UnsupportedHere."""


def engine(name: str) -> Engine:
    """The engine of that name. Raises UnsupportedHere for one that this version does not have."""
    if name == "transformers":
        from slidesparse.measure.engines.transformers_engine import TransformersEngine

        return TransformersEngine()
    raise UnsupportedHere(f"engine {name} needs an NVIDIA GPU and vLLM; this version has the transformers engine only")
