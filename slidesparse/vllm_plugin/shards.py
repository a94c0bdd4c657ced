"""Which columns of a linear a tensor-parallel rank holds, and whether its window groups survive the cut."""

from __future__ import annotations

from slidesparse.errors import CheckpointError
from slidesparse.pattern import Sparsity


def require_whole_groups(layer: str, k: int, k_rank: int, sparsity: Sparsity | None) -> None:
    """A rank lifts its own k_rank of the layer's k columns: a cut must not go through a group of L.

    A rank's columns start at a multiple of k_rank, so every group is whole if k_rank is a multiple of L. Then the
    ranks' lifted products add up to the product of the whole layer. 2:inf has no groups to cut.

    Raises:
        CheckpointError: a group would be split (layer, sizes, what to do).
    """
    if sparsity is None or sparsity.l is None or k_rank == k or k_rank % sparsity.l == 0:
        return
    fits = [str(Sparsity(length)) for length in range(4, 17, 2) if k_rank % length == 0]
    raise CheckpointError(
        f"{layer}: tensor parallelism gives each rank {k_rank} of {k} columns, which is no multiple of "
        f"{sparsity.l}: a {sparsity} group would lie on two ranks; use another tensor_parallel_size, or a pattern "
        f"that fits ({', '.join([*fits, '2:inf'])})"
    )
