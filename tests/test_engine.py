"""The transformers engine: same logits as the dequantised model, exact counts, and checks that catch wrong layers.

Bounds shown here, on a synthetic BitNet, LLaMA and Qwen2 with the same dequantised weights:
(a) activations fake-quantised in the reference, float32 throughout: relative L2 error of a position's logits at most
    1e-5 (seen: 5e-7) at most positions, and 5 % where an activation within a float32 rounding of a tie got the
    neighbouring code (seen: 1.2 %);
(b) activations left unquantised in the reference: at most 8 % (INT8) and 20 % (FP8), the price of 8-bit activations.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from small_models import BITNET, LLAMA, QWEN2, FakeCheckpoint, checkpoint, float_model
from torch import nn

from slidesparse.dtypes import QUANTISED, DType
from slidesparse.errors import CheckpointError, UnsupportedHere
from slidesparse.kernels import reference
from slidesparse.kernels.linear import W8A8Linear
from slidesparse.measure.engines.base import engine
from slidesparse.measure.engines.model import plain_codes
from slidesparse.measure.engines.transformers_engine import TransformersSession
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant
from slidesparse.tuning.store import TuningStore

DENSE = Variant("cpu_dense")
VARIANTS = [DENSE, *(Variant("cpu_sparse", Sparsity(length)) for length in (4, 8, 10))]
INF = Variant("cpu_sparse", Sparsity(None))
PROMPTS = torch.randint(0, 128, (3, 9), generator=torch.Generator().manual_seed(0))


def session(
    held: FakeCheckpoint, variant: Variant, kind: torch.dtype = torch.bfloat16, store: TuningStore | None = None
) -> TransformersSession:
    assert held.dtype is not None
    return TransformersSession(held, "memory", held.dtype, variant, store, kind)  # type: ignore[arg-type]


def transformers_logits(config: dict[str, Any], held: FakeCheckpoint, quantise: bool) -> torch.Tensor:
    """Stock transformers, float32, its own nn.Linear with dequantised weights; optionally fake-quantised inputs."""
    model = float_model(config)
    state = {name: tensor.float() for name, tensor in held.tensors.items() if "_scale" not in name}
    for name, module in model.model.named_modules():
        if isinstance(module, nn.Linear):
            codes = plain_codes(held, f"model.{name}", module.in_features)  # type: ignore[arg-type]
            state[f"model.{name}.weight"] = codes.float() * held.tensors[f"model.{name}.weight_scale"]
            if quantise:
                module.register_forward_pre_hook(fake_quantise(held.dtype))
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    with torch.inference_mode():
        return model(input_ids=PROMPTS).logits.float()


def fake_quantise(dtype: DType | None) -> Any:
    def hook(module: nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        assert dtype is not None
        codes, scale = reference.quantise(inputs[0].reshape(-1, inputs[0].shape[-1]), dtype)
        return ((codes.float() * scale).reshape(inputs[0].shape),)

    return hook


def errors(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return ((a - b).norm(dim=-1) / b.norm(dim=-1)).flatten()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(errors(a, b).max())


def same_but_for_ties(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bound (a)."""
    found = errors(a, b)
    return bool(found.median() <= 1e-5 and found.max() <= 0.05)


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_bitnet_gives_the_logits_of_transformers_with_dequantised_weights(variant: Variant, dtype: DType) -> None:
    held = checkpoint(BITNET, dtype, variant.sparsity)
    ours = session(held, variant, torch.float32).logits(PROMPTS)
    assert same_but_for_ties(ours, transformers_logits(BITNET, held, quantise=True))
    unquantised = relative(ours, transformers_logits(BITNET, held, quantise=False))
    assert 1e-4 < unquantised <= (0.08 if dtype is DType.INT8 else 0.2), "8-bit activations cost this much, not less"


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("config", [LLAMA, QWEN2], ids=lambda config: str(config["model_type"]))
def test_other_families(config: dict[str, Any], dtype: DType) -> None:
    for variant in (DENSE, Variant("cpu_sparse", Sparsity(6))):
        held = checkpoint(config, dtype, variant.sparsity)
        ours = session(held, variant, torch.float32).logits(PROMPTS)
        assert same_but_for_ties(ours, transformers_logits(config, held, quantise=True))


def test_a_2_inf_conversion_changes_nothing() -> None:
    """INT8: the same bits, in logits and in generated tokens."""
    dense = session(checkpoint(BITNET, DType.INT8), DENSE)
    for held in (checkpoint(BITNET, DType.INT8), checkpoint(BITNET, DType.INT8, Sparsity(None))):
        sparse = session(held, INF)
        assert torch.equal(dense.logits(PROMPTS), sparse.logits(PROMPTS))
        assert torch.equal(dense.decode(PROMPTS, 6).tokens, sparse.decode(PROMPTS, 6).tokens)
    fp8 = checkpoint(BITNET, DType.FP8)
    logits = [session(fp8, variant, torch.float32).logits(PROMPTS) for variant in (INF, DENSE)]
    assert same_but_for_ties(*logits)


def test_plain_and_lifted_layouts_are_the_same_model() -> None:
    variant = Variant("cpu_sparse", Sparsity(8))
    plain, lifted = (checkpoint(BITNET, DType.INT8, Sparsity(8), layout) for layout in ("plain", "lifted"))
    assert torch.equal(session(plain, variant).logits(PROMPTS), session(lifted, variant).logits(PROMPTS))
    assert session(lifted, variant).check_step(PROMPTS, "prefill").verified == "exact"


# -- steps and counts ----------------------------------------------------------------------------------


def test_prefill_counts_what_the_embedding_saw() -> None:
    step = session(checkpoint(BITNET, DType.INT8), DENSE).prefill_step(PROMPTS)
    assert (step.tokens, step.outputs) == (27, 3)
    assert step.seconds > 0


def test_decode_gives_exactly_the_tokens_asked_for_even_past_the_end_token() -> None:
    held = checkpoint(BITNET, DType.INT8)
    found = session(held, DENSE).decode(PROMPTS, 5)
    assert found.tokens.shape == (3, 5)
    assert (found.prefill.tokens, found.prefill.outputs) == (27, 3)
    assert [(step.tokens, step.outputs) for step in found.steps] == [(3, 3)] * 4
    assert found.seconds == pytest.approx(found.prefill.seconds + sum(step.seconds for step in found.steps))
    ending = int(found.tokens[0, 1])
    held.config = held.config | {"eos_token_id": ending}
    assert torch.equal(session(held, DENSE).decode(PROMPTS, 5).tokens, found.tokens)


def test_cached_decode_is_greedy_decoding() -> None:
    """Against the whole text without a cache, float32."""
    run = session(checkpoint(BITNET, DType.INT8), DENSE, torch.float32)
    tokens = run.decode(PROMPTS, 4).tokens
    text = PROMPTS
    for column in range(4):
        following = run.logits(text)[:, -1].argmax(dim=-1, keepdim=True)
        assert torch.equal(following[:, 0], tokens[:, column])
        text = torch.cat([text, following], dim=1)


def test_tokens_without_memory_of_the_batch_before() -> None:
    run = session(checkpoint(BITNET, DType.INT8), DENSE)
    first = run.decode(PROMPTS, 3).tokens
    run.decode(PROMPTS.flip(0), 3)
    assert torch.equal(run.decode(PROMPTS, 3).tokens, first)


# -- checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", QUANTISED)
@pytest.mark.parametrize("variant", [DENSE, VARIANTS[2]], ids=str)
def test_a_right_model_passes_its_checks(variant: Variant, dtype: DType) -> None:
    run = session(checkpoint(BITNET, dtype, variant.sparsity), variant)
    logits = run.check_logits(PROMPTS)
    assert logits.ok
    assert "bound 0.05" in logits.text
    assert "greedy tokens" in logits.text
    step = run.check_step(PROMPTS, "decode")
    assert step.verified == ("exact" if dtype is DType.INT8 else "within_bound")
    assert step.text.startswith("28 layer outputs"), "14 layers, prompt step and decode step"


def test_one_wrong_layer_is_caught_and_named() -> None:
    run = session(checkpoint(BITNET, DType.INT8), DENSE)
    layer = next(module for module in run._linears if module.name == "model.layers.1.mlp.up_proj")
    layer.scale[:40].mul_(4)  # not all channels: ffn_sub_norm would take a common factor out again
    check = run.check_logits(PROMPTS)
    assert check.verified == "failed"
    layer.scale[:40].div_(4)
    layer.weight.data[5, 3] += 1
    step = run.check_step(PROMPTS, "prefill")
    assert step.verified == "failed"
    assert "model.layers.1.mlp.up_proj" in step.text


def test_checking_leaves_no_hooks_behind() -> None:
    run = session(checkpoint(BITNET, DType.INT8), DENSE)
    run.check_step(PROMPTS, "prefill")
    assert not any(module._forward_hooks for module in run._linears)


# -- what the row says -----------------------------------------------------------------------------------


def test_path_and_look_ups_are_those_of_the_cell(tmp_path: Any) -> None:
    run = session(checkpoint(BITNET, DType.INT8), DENSE, store=TuningStore(tmp_path / "none.json"))
    run.prefill_step(PROMPTS)
    run.begin()
    run.prefill_step(PROMPTS[:1])
    assert run.tuning() == "hits 0, nearest 0, missed 42, stale 0", "3 operations in each of 14 layers"
    for part in ("BitNetForCausalLM", "eager", "cpu_dense", "fused > int_mm > fused", "q, k, v and gate, up separate"):
        assert part in run.path()


def test_bitnet_keeps_its_activation_and_both_sub_norms() -> None:
    """Published runs relabelled BitNet as Llama and lost them."""
    held = checkpoint(BITNET, DType.INT8)
    right = session(held, DENSE, torch.float32).logits(PROMPTS)
    for norm in ("self_attn.attn_sub_norm", "mlp.ffn_sub_norm"):
        changed = checkpoint(BITNET, DType.INT8)
        changed.tensors[f"model.layers.0.{norm}.weight"] = changed.tensors[f"model.layers.0.{norm}.weight"] * 3
        assert relative(session(changed, DENSE, torch.float32).logits(PROMPTS), right) > 0.01


# -- refusals ------------------------------------------------------------------------------------------


def test_refusals() -> None:
    held = checkpoint(BITNET, DType.INT8, Sparsity(8))
    with pytest.raises(CheckpointError, match=r"memory: holds pattern 2:8, but cpu_sparse 2:6"):
        session(held, Variant("cpu_sparse", Sparsity(6)))
    with pytest.raises(CheckpointError, match="memory: holds INT8 weights, expected FP8E4M3"):
        TransformersSession(held, "memory", DType.FP8, DENSE, None, torch.bfloat16)  # type: ignore[arg-type]
    broken = checkpoint(BITNET, DType.INT8)
    del broken.tensors["model.norm.weight"]
    with pytest.raises(CheckpointError, match=r"tensor model\.norm\.weight is missing"):
        session(broken, DENSE)
    unknown = checkpoint(BITNET, DType.INT8)
    unknown.config = BITNET | {"model_type": "nonsense"}
    with pytest.raises(CheckpointError, match="model_type 'nonsense'"):
        session(unknown, DENSE)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj: row 0, columns 0 to 3"):
        session(checkpoint(LLAMA, DType.INT8), Variant("cpu_sparse", Sparsity(4)))
    with pytest.raises(UnsupportedHere, match="engine sglang is not in this version"):
        engine("sglang")


def test_only_decoder_linears_are_replaced() -> None:
    run = session(checkpoint(LLAMA, DType.INT8), DENSE)
    assert isinstance(run._model.lm_head, nn.Linear)
    assert sum(isinstance(module, W8A8Linear) for module in run._model.modules()) == 14
    assert sum(isinstance(module, nn.Linear) for module in run._model.modules()) == 1
