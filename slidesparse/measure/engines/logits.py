"""Are an engine's logits those of a reference model? One comparison for every engine."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slidesparse.kernels.verify import Check

GENERATED = 4
"""Tokens generated for the comparison of greedy tokens."""
TOKEN_SLACK = 6.0
"""How far a greedy token's reference logit may be below the best, in units of the allowed error of one logit.

That difference is the sum of two errors of single logits, each of which is the bound times the root mean square of the
logits; more than four standard deviations of the sum.
"""
NOISE_FACTOR, NOISE_FLOOR = 2.0, 0.02
"""Allowed of a bfloat16 engine: its distance from a float32 reference is noise of the same kind as that of a bfloat16
reference, which is measured. Rounding moves activations to the neighbouring 8-bit code, so it grows with the depth."""
USELESS = 0.5
"""A bound above this tells nothing: logits of a wrong model are 1.4 away."""


@dataclass(frozen=True)
class Bound:
    """Largest relative L2 distance of one position's logits, and where it comes from."""

    value: float
    text: str


def noise_bound(rounded: torch.Tensor, expected: torch.Tensor) -> Bound:
    """For a bfloat16 engine: `rounded` are the reference's own logits in bfloat16, `expected` in float32."""
    noise = float(distances(rounded, expected).max())
    value = NOISE_FACTOR * noise + NOISE_FLOOR
    return Bound(value, f"{value:.2g}: {NOISE_FACTOR:g} x {noise:.2g}, the reference in bfloat16, + {NOISE_FLOOR:g}")


def distances(found: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """Relative L2 distance of each position's logits: [..., V] -> [...]."""
    wanted = expected.float()
    distance: torch.Tensor = (found.float() - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return distance


def compare(found: torch.Tensor, expected: torch.Tensor, generated: torch.Tensor, bound: Bound, against: str) -> Check:
    """Logits [S, T, V] and the engine's greedy tokens, int64 [S, G], which follow the last G positions.

    Passes when every position is within the bound and every greedy token is the reference's choice or within
    TOKEN_SLACK errors of it. A bound that any model would keep gives `not_checked`.
    """
    choices = expected[:, -generated.shape[1] :].float()
    best, chosen = choices.max(dim=-1).values, choices.gather(-1, generated.unsqueeze(-1)).squeeze(-1)
    slack = TOKEN_SLACK * bound.value * choices.square().mean(dim=-1).sqrt()
    same, within = int((best == chosen).sum()), bool((best - chosen <= slack).all())
    largest = float(distances(found, expected).max())
    said = (
        f"logits: relative error {largest:.2g} (bound {bound.text}) against {against}, "
        f"greedy tokens {same}/{generated.numel()} equal"
    )
    if same < generated.numel():
        said += ", the others within the slack" if within else ", others beyond the slack"
    if not largest <= bound.value or not within:
        return Check("failed", said)
    if bound.value > USELESS:
        return Check("not_checked", f"{said}; rounding alone moves this model's logits too far for a verdict")
    return Check("exact" if largest == 0 else "within_bound", said)
