"""What runs the linears of a model in vLLM: `additional_config={"slidesparse": {...}}`, or the checkpoint's section.

vLLM hashes both into the key of its compile cache, so graphs of two backends never mix. (An environment variable is not
in that key: that is why there is none.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slidesparse.checkpoint.section import SECTION, parse_section
from slidesparse.config import Pattern, Positive
from slidesparse.errors import CheckpointError, ConfigError
from slidesparse.kernels.backend import backend
from slidesparse.plan import AUTO, STOCK, Variant

DEFAULT_SPARSE = "cusparselt"
"""Runs a checkpoint that has a `slidesparse` section when nothing else is said."""


class Settings(BaseModel):
    """The mapping `additional_config["slidesparse"]`."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    backend: Literal["vllm", "cublaslt", "cutlass", "cusparselt", "fused", "auto"] | None = None
    """None: as the checkpoint says."""
    sparsity: Pattern | None = None
    """None: as the checkpoint says. A dense checkpoint may be run with any pattern that its weights keep to."""
    tuning: Path | None = None
    """`winners.json` of a run on this machine; None: the default algorithm of each operation."""
    sizes: Annotated[tuple[Positive, ...], Field(min_length=1)] | None = None
    """Backend auto: M to measure when weights are loaded; None: see `auto.default_sizes`."""
    keep_dense: bool = True
    """Backend auto, checkpoint with a pattern: keep the dense weight as well, and choose from dense backends too."""


@dataclass(frozen=True)
class Selection:
    """How the linears of one model run."""

    variant: Variant
    tuning: Path | None = None
    sizes: tuple[int, ...] | None = None
    keep_dense: bool = True

    @property
    def ours(self) -> bool:
        """False: vLLM's own kernels, untouched."""
        return self.variant.backend != STOCK


def parse(value: object) -> Settings:
    """Raises ConfigError: one line a fault, with its key and what is allowed."""
    try:
        return Settings.model_validate(value)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(fault) for fault in error.errors())) from None


def _explain(fault: Any) -> str:
    key = ".".join(("additional_config", SECTION, *(str(part) for part in fault["loc"])))
    if fault["type"] == "extra_forbidden":
        return f"{key}: unknown key; allowed here: {', '.join(Settings.model_fields)}"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{key}: {message} (got {fault['input']!r})"


def select(additional: object, section: object, where: str) -> Selection | None:
    """What was asked for; None for a model that has nothing to do with us.

    Args:
        additional: vLLM's `additional_config`.
        section: `slidesparse` of the model's config.json, None if there is none.
        where: names the model in errors.

    Raises:
        ConfigError: a setting is wrong, or does not fit the checkpoint.
        CheckpointError: the checkpoint's section is wrong, or its layout is `lifted`.
    """
    value = additional.get(SECTION) if isinstance(additional, Mapping) else None
    if value is None and section is None:
        return None
    settings = parse({} if value is None else value)
    found = None if section is None else parse_section(section, where)
    if found is not None and found.layout == "lifted":
        raise CheckpointError(f"{where}: layout lifted; vLLM lifts at load: convert again with convert.layout: plain")
    name = settings.backend or (DEFAULT_SPARSE if found is not None else None)
    key = f"additional_config.{SECTION}"
    if name is None:
        raise ConfigError(
            f"{key}.backend: missing, and {where} is dense; choose vllm, cublaslt, cutlass, cusparselt, fused or auto"
        )
    if settings.tuning is not None and not settings.tuning.is_file():
        raise ConfigError(f"{key}.tuning: {settings.tuning} is not there; give winners.json of a run, or leave it out")
    if name != AUTO and (given := settings.model_fields_set & {"sizes", "keep_dense"}):
        raise ConfigError(f"{key}.{min(given)}: backend {name} measures nothing; leave it out, or choose {AUTO}")
    if name == STOCK or (name != AUTO and not backend(name).sparse):
        if settings.sparsity is not None:
            raise ConfigError(f"{key}.sparsity: backend {name} is dense; leave it out, or choose {DEFAULT_SPARSE}")
        return Selection(Variant(name), settings.tuning)
    pattern = settings.sparsity or (None if found is None else found.pattern)
    if pattern is None and name != AUTO:
        raise ConfigError(f"{key}.sparsity: missing, and {where} is dense; give a pattern (2:inf takes any weights)")
    if found is not None and pattern != found.pattern:
        raise ConfigError(f"{key}.sparsity: {pattern}, but {where} holds {found.pattern}; leave it out")
    return Selection(Variant(name, pattern), settings.tuning, settings.sizes, settings.keep_dense)
