"""Proof, for one layer and pattern, that lifting loses nothing. Done for every layer that is written.

1. The lifted weight is 2:4: no window of four columns holds more than two non-zeros.
2. Un-lifting gives the codes back, every one of them.
3. With random int8 activations x, lift(x) @ lift(W)^T equals x @ W^T bit for bit in int32. Codes of both 8-bit
   types are multiplied as int8: lifting moves bytes, so the equality must hold whatever number they stand for.
"""

from __future__ import annotations

import numpy as np
import torch

from slidesparse.checkpoint.lift import NEGATIVE_ZERO, Codes, count_not_2_4, lift_activation, lift_weight, unlift_weight
from slidesparse.errors import VerificationError
from slidesparse.pattern import Sparsity

_SEED = 20260128
_BLOCK_BYTES = 4 * 2**20
"""Lifted bytes of the rows that are proven together: they stay in the cache between the steps, and the memory
is used again by the next block. With whole layers at once, page faults cost a third of the time."""


class LosslessProof:
    """Random activations [tokens, K], made once for each K and lifted once for each pattern."""

    def __init__(self, tokens: int) -> None:
        self._tokens = tokens
        self._plain: dict[int, torch.Tensor] = {}
        self._lifted: dict[tuple[int, Sparsity], torch.Tensor] = {}

    @property
    def check(self) -> str:
        """What a proven row says in its column `check`."""
        return f"2:4 in every window; un-lifted equal; int32 product equal on {self._tokens} random tokens"

    def lift(self, codes: Codes, sparsity: Sparsity, layer: str, out: Codes | None = None) -> None:
        """Lift a pruned weight [N, K] and prove the result; write it to `out` [N, K'] if given.

        Raises:
            CheckpointError: a group holds too many non-zeros.
            VerificationError: the lifted weight is not 2:4, or not the same weight.
        """
        n, k = codes.shape
        rows = max(1, _BLOCK_BYTES // sparsity.lifted_k(k))
        for first in range(0, n, rows):
            lifted = self._lift_rows(codes[first : first + rows], sparsity, layer, first)
            if out is not None:
                out[first : first + rows] = lifted

    def _lift_rows(self, codes: Codes, sparsity: Sparsity, layer: str, first_row: int) -> Codes:
        lifted = lift_weight(codes, sparsity, layer, first_row)
        where = f"{layer}: rows {first_row} to {first_row + len(codes) - 1}"
        bad = count_not_2_4(lifted)
        if bad:
            raise VerificationError(f"{where}: {bad} windows of the lifted weight ({sparsity}) are not 2:4")
        plain = np.where(codes == NEGATIVE_ZERO, np.int8(0), codes) if codes.min() == NEGATIVE_ZERO else codes
        if not np.array_equal(unlift_weight(lifted, codes.shape[1], sparsity), plain):
            raise VerificationError(f"{where}: un-lifting ({sparsity}) does not give the weight back")
        expected, got = self._products(plain, lifted, sparsity)
        if not torch.equal(expected, got):
            differ = int((expected != got).sum())
            raise VerificationError(f"{where}: lifted product ({sparsity}) differs in {differ} of {got.numel()} values")
        return lifted

    def _products(self, plain: Codes, lifted: Codes, sparsity: Sparsity) -> tuple[torch.Tensor, torch.Tensor]:
        """int32 [tokens, N] of the plain and of the lifted weight."""
        k = plain.shape[1]
        if k not in self._plain:
            random = np.random.default_rng((_SEED, k)).integers(-127, 128, (self._tokens, k), dtype=np.int8)
            self._plain[k] = torch.from_numpy(random)
        if (k, sparsity) not in self._lifted:
            self._lifted[k, sparsity] = torch.from_numpy(lift_activation(self._plain[k].numpy(), sparsity))
        expected = torch._int_mm(self._plain[k], torch.from_numpy(plain).t())
        return expected, torch._int_mm(self._lifted[k, sparsity], torch.from_numpy(lifted).t())
