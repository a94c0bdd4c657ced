"""The `slidesparse` section that a converted checkpoint's `config.json` carries."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slidesparse.config import Pattern
from slidesparse.errors import CheckpointError

SECTION = "slidesparse"
"""Key in `config.json`, and the quant_method of checkpoints whose weights only we can read."""


class Totals(BaseModel):
    """Sums over all linear layers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weights: int
    natural_zeros: int
    weights_removed: int
    energy_removed: float
    """Share of the sum of squares of the original weights with a non-zero code."""
    groups: int
    groups_unpruned: int


class Section(BaseModel):
    """How a checkpoint was pruned, and how its weights lie on disk."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    version: Literal[1] = 1
    pattern: Pattern
    layout: Literal["plain", "lifted"]
    """`plain`: pruned codes [N, K]. `lifted`: [N, K'], to be multiplied with lifted activations."""
    method: Literal["magnitude", "random"]
    seed: int
    """Of `random`; has no effect on `magnitude`."""
    model: str
    source: str
    """Where the base model came from: `hub REPO@COMMIT`, `local FOLDER`, `synthetic seed N`."""
    base: str
    """Fingerprint of the BF16 checkpoint whose magnitudes decided."""
    totals: Totals


def parse_section(value: object, where: str) -> Section:
    """Validate the section of a `config.json`. Raises CheckpointError naming the file and the key."""
    try:
        return Section.model_validate(value)
    except ValidationError as error:
        fault = error.errors()[0]
        key = ".".join(str(part) for part in (SECTION, *fault["loc"]))
        raise CheckpointError(f"{where}: {key}: {fault['msg']}; convert the model again") from None
