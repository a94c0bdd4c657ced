"""Lifting a weight where it lies, in torch operations: for GPUs, and for 16-bit types.

The same first fit as `checkpoint/lift.py` (windows from left to right, at most 2 non-zeros each), one window of all
groups of all rows at a time: 4 * W steps on [N, groups] tensors.
"""

from __future__ import annotations

import torch

from slidesparse.errors import CheckpointError
from slidesparse.pattern import KEPT, STRIDE, WINDOW, Sparsity


def lift_on_device(codes: torch.Tensor, sparsity: Sparsity, layer: str) -> torch.Tensor:
    """Codes [N, K] of a 1- or 2-byte type -> lifted [N, K'] of the same type, 2:4.

    Raises:
        CheckpointError: a group has more non-zeros than its windows can hold (layer, row, columns).
    """
    n, k = codes.shape
    bits = codes.view(torch.uint8 if codes.itemsize == 1 else torch.int16)
    groups, windows = sparsity.groups(k), sparsity.windows_per_group(k)
    length = sparsity.group_columns(k)
    padded = torch.zeros(n, groups * length, dtype=bits.dtype, device=codes.device)
    padded[:, :k] = bits
    lifted = torch.zeros(n, sparsity.lifted_k(k), dtype=bits.dtype, device=codes.device)
    target = lifted[:, : groups * windows * WINDOW].unflatten(1, (groups, windows, WINDOW))
    if sparsity.l is None:  # window w keeps columns 2w and 2w + 1
        target[:, 0, :, :KEPT] = padded.unflatten(1, (windows, KEPT))
        return lifted.view(codes.dtype)
    source = padded.unflatten(1, (groups, length))
    # -0 of a float type is a zero, as in the lift of checkpoints.
    left = (padded.view(codes.dtype).float() != 0 if codes.dtype.is_floating_point else padded != 0).view_as(source)
    for window in range(windows):
        count = torch.zeros(n, groups, dtype=torch.int8, device=codes.device)
        for lane in range(WINDOW):
            column = STRIDE * window + lane
            take = left[:, :, column] & (count < KEPT)
            target[:, :, window, lane] = source[:, :, column] * take
            left[:, :, column] &= ~take
            count += take
    if bool(left.any()):
        row, group, column = (int(i) for i in left.nonzero()[0])
        raise CheckpointError(
            f"{layer}: row {row}, columns {group * length} to {group * length + length - 1}: more than "
            f"{length - Sparsity.z} non-zeros, so the weight does not keep to {sparsity}; convert the model again"
        )
    return lifted.view(codes.dtype)
