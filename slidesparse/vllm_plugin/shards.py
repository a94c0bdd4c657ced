"""What a tensor-parallel rank holds: columns of a linear, whose window groups must survive the cut, and KV heads."""

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


def shared_kv_heads(heads: int, kv_heads: int, ranks: int) -> int:
    """KV heads in all, once repeated so that tensor-parallel ranks can share them evenly.

    vLLM wants KV heads that the ranks divide, or that divide the ranks. BitNet-2B has 5, so on two ranks each of them
    stands twice: rank 0 holds 0 0 1 1 2, rank 1 holds 2 3 3 4 4, for 10 query heads each. The same products; a rank
    holds more keys and values than a half, but query heads stay evenly shared.

    Raises:
        CheckpointError: no number of repetitions serves (the numbers, what to do).
    """
    for total in range(kv_heads, heads + 1, kv_heads):
        if heads % ranks == 0 and heads % total == 0 and (total % ranks == 0 or ranks % total == 0):
            return total
    raise CheckpointError(
        f"{heads} query heads over {kv_heads} KV heads cannot be shared by {ranks} tensor-parallel ranks; "
        f"use another tensor_parallel_size"
    )


def kv_heads_of_rank(heads: int, kv_heads: int, ranks: int) -> int:
    """KV heads that each rank holds. Raises as `shared_kv_heads` does."""
    return max(1, shared_kv_heads(heads, kv_heads, ranks) // ranks)
