"""Engine `vllm` where there is neither vLLM nor a GPU: what it asks of vLLM, what it needs, where it refuses; and the
comparisons that its checks rest on.
"""

from __future__ import annotations

import importlib.metadata
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import BITNET
from small_runs import MACHINE

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import UnsupportedHere
from slidesparse.kernels import reference
from slidesparse.machine import Gpu
from slidesparse.measure.engines import vllm_engine
from slidesparse.measure.engines import vllm_memory as memory
from slidesparse.measure.engines.base import Limits, engine
from slidesparse.measure.engines.logits import Bound, compare, noise_bound
from slidesparse.measure.engines.stock_check import check_stock
from slidesparse.measure.engines.vllm_engine import VllmEngine, engine_arguments, environment
from slidesparse.measure.engines.vllm_layers import unlifted
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant

GPU = Gpu("NVIDIA H200", (9, 0), 141 << 30, "580.00")
REFERENCE_RUN = Limits(
    ((1, 512), *((m // 1024, 1024) for m in (1024, 2048, 4096, 8192, 16384, 32768))), (64, 128, 256, 512), 16, 256
)
"""The cells of tasks 4 and 5."""
BITNET_2B = memory.Widths(30, 2560, 6912, 20, 5, 128, 128256, True)
GIB = 1 << 30
prefills = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 300)), max_size=4).map(tuple)
limits = st.builds(
    Limits, prefills, st.lists(st.integers(1, 90), max_size=4).map(tuple), st.integers(1, 40), st.integers(1, 70)
).filter(lambda asked: bool(asked.prefill or asked.decode))


class FakeCheckpoint:
    folder = Path("checkpoints/Tiny-INT8")
    config = BITNET
    section = None


def arguments(variant: Variant, tuning: Path | None = None, asked: Limits = REFERENCE_RUN) -> dict[str, Any]:
    return engine_arguments(FakeCheckpoint(), variant, tuning, asked)  # type: ignore[arg-type]


# -- limits and memory ---------------------------------------------------------------------------------


def test_limits_of_the_reference_run() -> None:
    run = REFERENCE_RUN
    assert run.sizes == (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
    assert (run.step_tokens, run.sequences, run.positions) == (32768, 512, 1025)
    assert run.cached_tokens == 512 * 272
    assert Limits((), (3,), 500, 10).step_tokens == 1500, "prompts of a batch are one step"


@settings(max_examples=60)
@given(asked=limits)
def test_the_cache_holds_every_batch(asked: Limits) -> None:
    """Block by block, as vLLM hands them out; one block is its own."""
    for sequences, prompt in asked.prefill:
        assert memory.blocks(asked) > sequences * len(range(0, prompt + 1, memory.BLOCK))
    for sequences in asked.decode:
        length = asked.decode_prompt + asked.decode_output
        assert memory.blocks(asked) > sequences * len(range(0, length, memory.BLOCK))
    assert memory.blocks(asked) * memory.BLOCK >= asked.cached_tokens
    assert memory.blocks(asked) * memory.BLOCK > memory.positions(asked), "or vLLM does not start"


@settings(max_examples=60)
@given(asked=limits)
def test_every_step_of_a_cell_is_a_graph_and_fits(asked: Limits) -> None:
    sizes = memory.sizes(asked)
    assert sizes == sorted(set(sizes))
    for sequences, prompt in asked.prefill:
        assert sequences * prompt in sizes
    for sequences in asked.decode:
        assert {sequences, sequences * asked.decode_prompt} <= set(sizes)
    assert max(sizes) <= memory.step_tokens(asked)
    assert memory.sequences(asked) >= asked.sequences


def test_widths_are_read_from_either_kind_of_config() -> None:
    own = {key: value for key, value in BITNET.items() if key not in ("head_dim", "num_key_value_heads")}
    widths = memory.Widths.of(own)
    assert widths.kv_heads == widths.heads == BITNET["num_attention_heads"]
    assert widths.head_dim == BITNET["hidden_size"] // BITNET["num_attention_heads"]
    assert memory.Widths.of(own | {"head_dim": 48, "num_key_value_heads": 1}).head_dim == 48


def test_the_cache_of_a_model_is_two_vectors_a_layer_and_head() -> None:
    """BitNet-2B: 30 layers, 5 heads of 128, keys and values, bfloat16: 76,800 bytes a token."""
    per_token = 30 * 5 * 128 * 2 * 2
    assert memory.cache_bytes(BITNET_2B, REFERENCE_RUN) == memory.blocks(REFERENCE_RUN) * 16 * per_token
    whole = memory.cache_bytes(BITNET_2B, REFERENCE_RUN)
    for ranks, held in ((5, 1), (10, 1), (2, 5), (4, 5)):  # on 2 and 4 ranks, heads stand several times
        assert memory.cache_bytes(BITNET_2B, replace(REFERENCE_RUN, tensor_parallel=ranks)) == whole // 5 * held


def test_the_estimate_grows_with_what_it_is_made_of() -> None:
    weights = 1991 << 20
    base = memory.engine_bytes(BITNET_2B, REFERENCE_RUN, weights, sparse=False)
    assert memory.engine_bytes(BITNET_2B, REFERENCE_RUN, weights, sparse=True) == base, "while it loads it has no cache"
    heavy = 40 * GIB
    assert memory.engine_bytes(BITNET_2B, REFERENCE_RUN, heavy, sparse=True) > 1.7 * heavy
    assert 17.0 * GIB < base < 1.04 * 17.0 * GIB, "17.0 GiB an engine, six side by side on an H200"
    small = Limits(((1, 512),), (64,), 16, 256)
    assert memory.engine_bytes(BITNET_2B, small, weights, sparse=False) < base - 8 * GIB
    assert memory.engine_bytes(BITNET_2B, replace(REFERENCE_RUN, tensor_parallel=2), weights, sparse=False) < base


def test_as_many_as_the_largest_allows_but_one_at_least() -> None:
    assert memory.fit([10 * GIB, 20 * GIB], 0, 100 * GIB) == 4
    assert memory.fit([10 * GIB], 0, 100 * GIB) == 9, "some stays free"
    assert memory.fit([10 * GIB], 8 * GIB, 100 * GIB) == 8, "one of them runs a step"
    assert memory.fit([200 * GIB], 0, 100 * GIB) == 1


def test_memory_that_tuning_left_with_the_allocator_counts_as_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found on an H200: after tuning, in one process, four engines fitted where six do."""
    held = [100 * GIB]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "empty_cache", held.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (140 * GIB - sum(held), 140 * GIB))
    monkeypatch.setattr(vllm_engine, "need", lambda folder, limits: 20 * GIB)
    monkeypatch.setattr(memory, "turn_bytes", lambda widths, limits: 0)
    monkeypatch.setattr(Checkpoint, "open", lambda folder: FakeCheckpoint())
    assert VllmEngine().together([tmp_path], REFERENCE_RUN, MACHINE) == 6


# -- what vLLM is told ---------------------------------------------------------------------------------


def test_arguments_of_the_engine() -> None:
    told = arguments(Variant("cusparselt", Sparsity(8)), Path("tuning/winners.json"))
    assert told["additional_config"] == {
        "slidesparse": {"backend": "cusparselt", "sparsity": "2:8", "tuning": "tuning/winners.json"}
    }
    assert told["compilation_config"]["cudagraph_capture_sizes"][-1] == told["max_num_batched_tokens"] == 32768
    assert told["max_num_seqs"] == 512
    assert told["max_model_len"] == 1025
    assert told["enable_prefix_caching"] is False
    json.dumps(told)


def test_heads_that_the_ranks_cannot_share_are_repeated_for_every_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeCheckpoint, "config", BITNET | {"num_attention_heads": 20, "num_key_value_heads": 5})
    for variant in (Variant("vllm"), Variant("fused", Sparsity(8))):
        told = arguments(variant, asked=replace(REFERENCE_RUN, tensor_parallel=2))
        assert told["hf_overrides"] == {"num_key_value_heads": 10}
    assert "hf_overrides" not in arguments(Variant("vllm"))


def test_stock_kernels_get_no_settings_of_ours() -> None:
    told = arguments(Variant("vllm"), Path("tuning/winners.json"))
    assert told["additional_config"] == {"slidesparse": {"backend": "vllm"}}


@settings(max_examples=40)
@given(asked=limits)
def test_a_step_can_hold_the_longest_sequence(asked: Limits) -> None:
    told = arguments(Variant("vllm"), asked=asked)
    assert told["max_num_batched_tokens"] >= max(told["max_model_len"], asked.step_tokens)


def test_the_child_knows_what_makes_rows_comparable() -> None:
    variables = environment()
    assert variables["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0", "or a step holds whatever has arrived"
    assert variables["VLLM_USE_V2_MODEL_RUNNER"] == "0", "the default depends on the architecture"


# -- where it can run ----------------------------------------------------------------------------------


def test_where_it_cannot_run_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    found = engine("vllm")
    assert isinstance(found, VllmEngine)
    with pytest.raises(UnsupportedHere, match="engine vllm needs an NVIDIA GPU"):
        found.require(MACHINE)
    with_gpu = replace(MACHINE, gpu=GPU, gpu_count=1)

    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    installed: str | None = None
    with pytest.raises(UnsupportedHere, match=r"vLLM is not installed; pip install vllm==0\.24\.0"):
        found.require(with_gpu)
    installed = "0.31.0"
    with pytest.raises(UnsupportedHere, match=r"vLLM 0\.31\.0 is not supported, only 0\.24\.x"):
        found.require(with_gpu)
    installed = "0.24.0+cu130"
    found.require(with_gpu)


# -- comparison of logits ------------------------------------------------------------------------------

VOCABULARY = 4096


def noisy(error: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [4, 3, V] `error` away from the expected ones, those, and the greedy tokens of the former."""
    generator = torch.Generator().manual_seed(seed)
    expected = torch.randn(4, 3, VOCABULARY, generator=generator)
    found = expected + error * torch.randn(expected.shape, generator=generator)
    return found, expected, found.argmax(dim=-1)


def test_logits_within_the_bound_pass_and_beyond_it_fail() -> None:
    bound = Bound(0.06, "0.06")
    inside = compare(*noisy(0.05), bound, "a model")
    assert inside.verified == "within_bound"
    assert "bound 0.06" in inside.text
    assert compare(*noisy(0.07), bound, "a model").verified == "failed"
    found, expected, tokens = noisy(0.0)
    exact = compare(found, expected, tokens, bound, "a model")
    assert exact.verified == "exact"
    assert "greedy tokens 12/12 equal" in exact.text
    broken = found.clone()
    broken[1, 2, 7] = float("nan")
    assert compare(broken, expected, tokens, bound, "a model").verified == "failed"


def test_one_bad_position_is_enough() -> None:
    found, expected, tokens = noisy(0.01)
    found[2, 1] += 0.2 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(3))
    assert compare(found, expected, tokens, Bound(0.06, "0.06"), "a model").verified == "failed"


def test_a_token_that_noise_cannot_explain_fails() -> None:
    """However near the logits are. The second best may be the choice of a noisy engine; an average one may not."""
    found, expected, tokens = noisy(0.0)
    bound = Bound(0.06, "0.06")
    near, far = tokens.clone(), tokens.clone()
    order = expected[0, 0].argsort(descending=True)
    near[0, 0], far[0, 0] = order[1], order[VOCABULARY // 2]
    text = compare(found, expected, near, bound, "a model")
    assert text.ok
    assert "11/12 equal, the others within the slack" in text.text
    assert compare(found, expected, far, bound, "a model").verified == "failed"


@pytest.mark.parametrize("error", [0.01, 0.05, 0.1])
def test_noise_as_large_as_the_references_own_always_passes(error: float) -> None:
    """Tokens of noisy logits are within the slack: it is several standard deviations."""
    for seed in range(20):
        found, expected, tokens = noisy(error, seed)
        rounded, _, _ = noisy(error, seed)
        assert compare(found, expected, tokens, noise_bound(rounded, expected), "a model").ok


def test_a_bound_that_tells_nothing_is_no_pass() -> None:
    found, expected, tokens = noisy(0.3)
    bound = noise_bound(found, expected)
    assert bound.value > 0.5
    check = compare(found, expected, tokens, bound, "a model")
    assert check.verified == "not_checked"
    assert "too far" in check.text
    other = torch.randn(expected.shape, generator=torch.Generator().manual_seed(9))
    assert compare(other, expected, other.argmax(dim=-1), bound, "a model").verified == "failed"


# -- layers ------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(length=st.sampled_from([4, 6, 8, 10, None]), k=st.integers(1, 80), seed=st.integers(0, 99))
def test_lifted_activations_are_found_again(length: int | None, k: int, seed: int) -> None:
    sparsity = Sparsity(length)
    x = torch.randn(3, k, generator=torch.Generator().manual_seed(seed))
    for dtype in QUANTISED:
        codes, _ = reference.quantise(x, dtype)
        again = unlifted(reference.lift(codes, sparsity), sparsity, k)
        assert torch.equal(again.view(torch.int8), codes.view(torch.int8))
    assert unlifted(codes, None, k) is codes


# -- stock kernels -------------------------------------------------------------------------------------


def stock_layer(dtype: DType, rows: int = 8, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """x, y, codes, scale, computed as vLLM 0.24 does: scaled_int8_quant and QuantFP8, then cutlass_scaled_mm."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 256, generator=generator).bfloat16()
    x[0] = (x[0] * 4).round() / 4  # a token with many ties
    x[0, 0] = 8.0
    codes, scale = reference.quantise(torch.randn(96, 256, generator=generator), dtype)
    values, largest = x.float(), x.float().abs().amax(dim=1, keepdim=True)
    if dtype is DType.INT8:
        token, inverse = largest / 127.0, 127.0 / largest
        a = (values * inverse).round().clamp(-128, 127).double()
    else:
        token = largest / 448.0
        a = (values * token.reciprocal()).clamp(-448, 448).to(dtype.torch).double()
    acc = (a @ codes.double().T).float()
    y = ((acc * scale.T) * token).bfloat16()
    return x, y, codes, scale


@pytest.mark.parametrize("dtype", QUANTISED)
def test_stock_layers_pass_and_wrong_ones_do_not(dtype: DType) -> None:
    for seed in range(4):
        x, y, codes, scale = stock_layer(dtype, seed=seed)
        found = check_stock(x, y, codes, scale, dtype)
        assert found.verified == "within_bound", found.text
        wrong, largest = codes.clone(), int(codes[5].float().abs().argmax())
        wrong[5, largest] = -codes[5, largest].float()
        assert not check_stock(x, y, wrong, scale, dtype).ok, "one weight"
        assert not check_stock(x, y, codes, scale * 1.02, dtype).ok, "all scales"
        moved = y.clone()
        moved[3, 4] += y.float().std()
        assert not check_stock(x, moved, codes, scale, dtype).ok, "one output"
        moved[3, 4] = float("nan")
        assert not check_stock(x, moved, codes, scale, dtype).ok


def test_ties_get_room_where_they_are_and_nowhere_else() -> None:
    """A quotient in the middle between two codes may become either; any other code must be the reference's."""
    x = torch.zeros(2, 16, dtype=torch.bfloat16)
    x[:, 0] = 127.0  # the scale is 1
    x[0, 1], x[1, 1] = 2.5, 2.25
    codes, scale = torch.ones(4, 16, dtype=torch.int8), torch.ones(4, 1)
    up = torch.tensor([[130.0] * 4, [129.0] * 4], dtype=torch.float64)
    assert check_stock(x, up.bfloat16(), codes, scale, DType.INT8).ok, "2.5 as 3"
    wrong = up.clone()
    wrong[1] += 1
    assert not check_stock(x, wrong.bfloat16(), codes, scale, DType.INT8).ok, "2.25 as 3"
