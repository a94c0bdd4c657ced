"""The real vLLM 0.24 engine on its CPU platform: scheduler, model runner, KV cache and sampler are the package's own.

The wheel for CUDA has no CPU kernels: attention with a paged KV cache and two small operators are written here in
plain PyTorch, and our GPU backends get their doubles. No compilation, no CUDA graphs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from slidesparse.kernels import rope_reference
from slidesparse.measure.engines.vllm_worker import VllmWorker
from slidesparse.plan import Variant


class CpuWorker(VllmWorker):
    """With ways to make it wrong."""

    def __init__(self, arguments: dict[str, Any], variant: Variant, opened: float) -> None:
        _operators()
        _attention()
        _doubles()
        if variant.sparsity is not None:  # the others have vLLM's own rotary embedding and cache
            _one_pass()
        eager = {"enforce_eager": True, "compilation_config": {"custom_ops": ["none"]}}
        super().__init__(arguments | eager, variant, opened)

    def left(self) -> int:
        """Requests and steps that the scheduler still has."""
        return len(self._core.scheduler.running) + len(self._core.scheduler.waiting) + len(self._core.batch_queue or [])

    def limit(self, tokens: int) -> int:
        """From now on a step holds that many tokens, whatever it was started for. Returns what it was."""
        before, self._room = self._room, tokens
        self._core.scheduler.max_num_scheduled_tokens = tokens
        return before

    def spoil(self, what: str, back: bool = False) -> None:
        """Make one row of a layer wrong, or a norm; or right again."""
        self._on_ranks(_spoil, what, back)


def _spoil(worker: Any, what: str, back: bool) -> None:
    model = worker.get_model()
    if what == "layer":
        row = model.get_submodule("model.layers.0.mlp.down_proj").weight.data.view(torch.int8)[3]
        row.copy_(row.flip(0))
    else:  # no linear's check sees it
        weight = model.get_submodule("model.layers.1.mlp.ffn_sub_norm").weight
        weight.data[:60] *= 0.125 if back else 8


def _doubles() -> None:
    import vllm_on_cpu
    from vllm.model_executor.kernels import linear as registry
    from vllm.platforms import PlatformEnum

    from slidesparse.vllm_plugin.register import register

    vllm_on_cpu.use_doubles()
    register()
    for kernels in (registry._POSSIBLE_INT8_KERNELS, registry._POSSIBLE_FP8_KERNELS):
        kernels[PlatformEnum.CPU] = kernels[PlatformEnum.CUDA]  # ours are registered for CUDA


def _one_pass() -> None:
    from vllm import _custom_ops as ops

    from slidesparse.vllm_plugin import rope_attention

    rope_attention.BACKENDS = ("CPU_ATTN",)
    rope_attention.RopeAndCache = _RopeAndCache  # type: ignore[assignment, misc]
    rope_attention._keys_and_values = _pages  # type: ignore[assignment]
    ops.cpu_attn_reshape_and_cache = lambda *_, **__: None  # attention here would write k once more, as it was given


class _RopeAndCache:
    """`triton_rope.RopeAndCache` by the reference."""

    def __init__(self, heads: int, cos_sin: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        self.pages = keys.data_ptr()
        self._where = cos_sin, heads, keys, values

    def __call__(self, qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
        return rope_reference.rope_and_cache(qkv, positions, *self._where, slots)


def _pages(cache: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """CPU_ATTN's [pages, kv_heads, P, 2 D], of which keys have the first half of every head's memory -> both halves,
    [pages, P, kv_heads, D]."""
    pages, kv_heads, size, width = cache.shape
    halves = cache.view(pages, kv_heads, 2 * size, width // 2).chunk(2, dim=2)
    return tuple(half.transpose(1, 2) for half in halves)


def _operators() -> None:
    library = torch.library.Library("_C", "FRAGMENT")
    library.define("init_cpu_memory_env(int[] nodes) -> str")
    library.impl("init_cpu_memory_env", lambda nodes: "", "CompositeExplicitAutograd")
    library.define(
        "compute_slot_mapping_kernel_impl(Tensor starts, Tensor positions, Tensor blocks, Tensor(a!) slots, int size)"
        " -> ()"
    )
    library.impl("compute_slot_mapping_kernel_impl", _slots, "CPU")
    globals()["_library"] = library  # operators live as long as it


def _slots(starts: torch.Tensor, positions: torch.Tensor, blocks: torch.Tensor, slots: torch.Tensor, size: int) -> None:
    """Place in the KV cache of each token of each sequence."""
    for sequence, (first, last) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        own = positions[first:last]
        slots[first:last] = blocks[sequence, own // size].long() * size + own % size


def _attention() -> None:
    from vllm import _custom_ops as ops

    def schedule(**_: Any) -> torch.Tensor:
        return torch.empty(0)

    def cache(
        key: torch.Tensor, value: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, *_: Any,
        **__: Any,
    ) -> None:  # fmt: skip
        """key [M, heads, head] -> keys [blocks, heads, size, head]."""
        size, used = keys.shape[2], slots[: key.shape[0]]
        real = used >= 0
        block, place = used[real] // size, used[real] % size
        keys[block, :, place] = key[: len(used)][real]
        values[block, :, place] = value[: len(used)][real]

    def attend(
        query: torch.Tensor, key_cache: torch.Tensor, value_cache: torch.Tensor, output: torch.Tensor,
        query_start_loc: torch.Tensor, seq_lens: torch.Tensor, scale: float, block_table: torch.Tensor, **_: Any,
    ) -> None:  # fmt: skip
        size, heads = key_cache.shape[2], key_cache.shape[1]
        for i, length in enumerate(seq_lens.tolist()):
            first, last = query_start_loc[i : i + 2].tolist()
            if first == last:
                continue
            blocks = block_table[i, : -(-length // size)].long()
            k, v = (
                whole[blocks].transpose(0, 1).reshape(heads, -1, whole.shape[-1])[:, :length]
                for whole in (key_cache, value_cache)
            )
            seen = torch.arange(length) <= torch.arange(length - (last - first), length).unsqueeze(1)
            q = query[first:last].transpose(0, 1)
            y = scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)
            output[first:last] = y.transpose(0, 1).reshape(output[first:last].shape)

    ops.cpu_attn_get_scheduler_metadata = schedule
    ops.cpu_attn_reshape_and_cache = cache
    ops.cpu_attention_with_kv_cache = attend
