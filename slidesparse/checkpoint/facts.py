"""What happened to one linear layer under one pattern: kept in its shard, summed up in config.json and records."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from slidesparse.checkpoint.section import Totals
from slidesparse.rows import ConvertLayerRow


class LinearFacts(BaseModel):
    """What happened to one linear layer under one pattern. A resumed run reads it back from the shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: str
    n: int
    k: int
    lifted_k: int
    natural_zeros: int
    weights_removed: int
    energy: float
    """Sum of squares of the original weights whose code was not zero."""
    energy_removed: float
    """Sum, not share."""
    groups: int
    groups_unpruned: int


def sum_up(facts: list[LinearFacts]) -> Totals:
    """Sums over layers."""
    energy = sum(fact.energy for fact in facts)
    return Totals(
        weights=sum(fact.n * fact.k for fact in facts),
        natural_zeros=sum(fact.natural_zeros for fact in facts),
        weights_removed=sum(fact.weights_removed for fact in facts),
        energy_removed=share(sum(fact.energy_removed for fact in facts), energy),
        groups=sum(fact.groups for fact in facts),
        groups_unpruned=sum(fact.groups_unpruned for fact in facts),
    )


def share(part: float, whole: float) -> float:
    """part / whole, 8 digits; 0 of nothing is 0."""
    return round(part / whole, 8) if whole else 0.0


def layer_row(fact: LinearFacts, check: str, common: dict[str, Any]) -> ConvertLayerRow:
    """The record of a layer whose proof succeeded; `common` holds the columns of the whole run."""
    return ConvertLayerRow(
        layer=fact.layer, n=fact.n, k=fact.k, lifted_k=fact.lifted_k,
        natural_zeros=fact.natural_zeros, weights_removed=fact.weights_removed,
        removed_fraction=share(fact.weights_removed, fact.n * fact.k - fact.natural_zeros),
        energy_removed=share(fact.energy_removed, fact.energy),
        groups=fact.groups, groups_unpruned=fact.groups_unpruned,
        verified="exact", check=check, **common,
    )  # fmt: skip
