"""What every packing of a 2:4 weight begins with: the two kept values of each window of 4 columns, and their places.

In plain torch, so that it runs where the weight lies. A window with fewer than 2 non-zeros is filled up with zeros in
its lowest free places, so the two places always differ and ascend, as NVIDIA's sparse tensor cores require.
"""

from __future__ import annotations

import torch

from slidesparse.errors import CheckpointError
from slidesparse.pattern import KEPT, WINDOW

EMPTY = 0 | 1 << 2
"""Places of a window without non-zeros: 0 and 1."""
OVERFULL = 0xFF
"""In the table of places: more than 2 non-zeros."""


def keep_two(codes: torch.Tensor, layer: str = "weight") -> tuple[torch.Tensor, torch.Tensor]:
    """Kept values uint8 [N, K'/2] and their places uint8 [N, K'/4], of codes int8 or float8_e4m3fn [N, K'].

    Values 2w and 2w + 1 are those of window w, in column order; its places are `first | second << 2`, first < second.
    K' is any multiple of 4. -0 of FP8 (0x80) is a zero, and kept as 0x00.

    Raises CheckpointError when a window holds more than 2 non-zeros (names the layer, row and columns).
    """
    lanes = codes.view(torch.uint8).unflatten(1, (-1, WINDOW))
    if codes.dtype.is_floating_point:
        lanes = torch.where(lanes == 0x80, 0, lanes)
    full = (lanes != 0).view(torch.uint8)
    which = full[..., 0] | full[..., 1] << 1 | full[..., 2] << 2 | full[..., 3] << 3
    places = _table(codes.device).index_select(0, which.flatten().int()).view(which.shape)
    refuse(places == OVERFULL, layer)
    first, second = places & 3, places >> 2
    one, two, three, four = lanes.unbind(2)
    values = torch.stack(
        [
            torch.where(first == 0, one, torch.where(first == 1, two, three)),
            torch.where(second == 1, two, torch.where(second == 2, three, four)),
        ],
        dim=2,
    )
    return values.flatten(1), places


def refuse(overfull: torch.Tensor, layer: str) -> None:
    """overfull: bool [N, K'/4], windows with more than 2 non-zeros. Raises CheckpointError naming the first, if any."""
    if bool(overfull.any()):
        row, window = (int(i) for i in overfull.nonzero()[0])
        first = window * WINDOW
        raise CheckpointError(
            f"{layer}: row {row}, columns {first} to {first + WINDOW - 1} of the lifted weight: more than {KEPT} "
            f"non-zeros, so it is not 2:4; lift the weight again"
        )


def _table(device: torch.device) -> torch.Tensor:
    """Places by which lanes are non-zero (bit i: lane i), uint8 [16]."""
    entries = []
    for mask in range(1 << WINDOW):
        taken = [lane for lane in range(WINDOW) if mask >> lane & 1]
        free = [lane for lane in range(WINDOW) if lane not in taken]
        kept = sorted(taken + free[: max(0, KEPT - len(taken))])
        entries.append(kept[0] | kept[1] << 2 if len(kept) == KEPT else OVERFULL)
    return torch.tensor(entries, dtype=torch.uint8, device=device)
