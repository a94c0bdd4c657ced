"""Engine `vllm` with the real vLLM 0.24 on its CPU platform (`vllm_cpu_worker.py`): what a step holds, what a batch
gives, and that the checks see what is wrong.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from prepared_models import model_run, run_convert, run_prepare
from small_models import BITNET

from slidesparse.checkpoint.checkpoint import Checkpoint
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, SlideSparseError, VerificationError
from slidesparse.measure.engines.base import Limits
from slidesparse.measure.engines.model import reference_model
from slidesparse.measure.engines.vllm_engine import VllmEngine, VllmSession
from slidesparse.pattern import Sparsity
from slidesparse.plan import Variant

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
]

SIZES = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}
LIMITS = Limits(prefill=((1, 8), (2, 16)), decode=(3, 6), decode_prompt=4, decode_output=5)
CASES = {
    "INT8": ("checkpoints/Tiny-INT8", DType.INT8, Variant("cublaslt")),
    "FP8 2:8": ("checkpoints_slidesparse/Tiny-FP8-SlideSparse-2_8", DType.FP8, Variant("cusparselt", Sparsity(8))),
}
"""Checkpoint, type and variant."""
Sessions = Callable[[str], VllmSession]


class CpuEngine(VllmEngine):
    worker = "vllm_cpu_worker:CpuWorker"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints, and an installed platform plugin."""
    root = tmp_path_factory.mktemp("vllm")
    run = model_run(root, BITNET | SIZES, sparsity={"end_to_end": ["2:8"], "kernel_high": [], "kernel_low": []})
    assert not run_prepare(run).failed
    assert not run_convert(run).failed
    info = root / "site/slidesparse_tests-0.0.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: slidesparse-tests\nVersion: 0.0.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\ncpu_engine = vllm_checks:cpu_platform\n")
    return root


@pytest.fixture(scope="module")
def sessions(folder: Path) -> Iterator[Sessions]:
    """Of all cases, started side by side."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder / "site"), str(Path(__file__).parent)]))
        patch.setenv("VLLM_CACHE_ROOT", str(folder / "cache"))
        patch.setenv("VLLM_PLUGINS", "cpu_engine")
        patch.setenv("TORCHDYNAMO_DISABLE", "1")
        patch.setattr("slidesparse.measure.engines.vllm_engine.CALL_S", 60.0)

        def open_one(name: str) -> VllmSession | Exception:
            place, dtype, variant = CASES[name]
            try:
                return CpuEngine().open(folder / place, dtype, variant, None, LIMITS)
            except Exception as error:
                return error

        with ThreadPoolExecutor(len(CASES)) as pool:
            opened = dict(zip(CASES, pool.map(open_one, CASES), strict=True))

        def get(name: str) -> VllmSession:
            session = opened[name]
            if isinstance(session, Exception):
                raise session
            return session

        yield get
        for session in opened.values():
            if isinstance(session, VllmSession):
                session.close()


def prompts(sequences: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (sequences, length), generator=torch.Generator().manual_seed(seed))


def test_the_model_is_looked_at_in_the_engines_own_process(sessions: Sessions, folder: Path) -> None:
    """vLLM would start another one, which imports everything again, and keep its answer in this folder."""
    assert sessions("INT8").vocabulary == BITNET["vocab_size"]
    assert [*(folder / "cache").glob("modelinfos/*")] == []


# -- steps ---------------------------------------------------------------------------------------------


def test_a_prefill_step_holds_all_prompts_and_nothing_else(sessions: Sessions) -> None:
    session = sessions("INT8")
    for size in LIMITS.prefill:
        for seed in range(2):
            step = session.prefill_steps(prompts(*size, seed=seed)[None])[0]
            assert (step.tokens, step.outputs) == (size[0] * size[1], size[0])
            assert step.seconds > 0


def test_steps_run_back_to_back_and_none_takes_another_ones_prompts(sessions: Sessions) -> None:
    session = sessions("INT8")
    steps = session.prefill_steps(torch.stack([prompts(2, 8, seed=seed) for seed in range(5)]))
    assert [(step.tokens, step.outputs) for step in steps] == [(16, 2)] * 5


def test_a_batch_is_one_step_for_the_prompts_and_one_a_token(sessions: Sessions) -> None:
    found = sessions("INT8").decode(prompts(6, 4), 5)
    assert found.tokens.shape == (6, 5)
    assert found.tokens.dtype is torch.int64
    assert (found.prefill.tokens, found.prefill.outputs) == (24, 6)
    assert [(step.tokens, step.outputs) for step in found.steps] == [(6, 6)] * 4
    assert found.seconds == pytest.approx(found.prefill.seconds + sum(step.seconds for step in found.steps))


@torch.inference_mode()
def test_its_tokens_are_the_greedy_ones_of_transformers(sessions: Sessions, folder: Path) -> None:
    """In the order of the prompts; against the dequantised model in float32, without a cache."""
    text = prompts(3, 12, seed=5)
    reference = reference_model(Checkpoint.open(folder / "checkpoints/Tiny-INT8"), torch.float32)
    whole = text
    for _ in range(4):
        following = reference(input_ids=whole, use_cache=False).logits[:, -1].argmax(dim=-1, keepdim=True)
        whole = torch.cat([whole, following], dim=1)
    session = sessions("INT8")
    session.decode(prompts(6, 4), 3)  # leaves nothing behind
    assert torch.equal(session.decode(text, 4).tokens, whole[:, 12:])
    assert torch.equal(session.decode(text.flip(0), 4).tokens, whole[:, 12:].flip(0))


def test_one_token_a_sequence_is_a_batch_too(sessions: Sessions) -> None:
    found = sessions("INT8").decode(prompts(3, 4), 1)
    assert found.tokens.shape == (3, 1)
    assert found.steps == ()


def test_prompts_that_do_not_fit_into_one_step_are_an_error(sessions: Sessions) -> None:
    session = sessions("INT8")
    before = session._process.call("limit", 64)
    try:
        with pytest.raises(VerificationError, match=r"1 x 8 x 16 tokens did not take 1 steps: 2 steps, of 64 tok"):
            session.prefill_steps(prompts(8, 16)[None])
        assert session._process.call("left") == 0
        with pytest.raises(VerificationError, match=r"8 x 16 tokens did not take a step a token"):
            session.decode(prompts(8, 16), 3)
        assert session._process.call("left") == 0
        assert session.prefill_steps(prompts(4, 16)[None])[0].tokens == 64, "the session lives on"
    finally:
        session._process.call("limit", before)


def test_an_error_leaves_no_request_behind(sessions: Sessions) -> None:
    session = sessions("INT8")
    with pytest.raises(SlideSparseError, match="maximum"):
        session.prefill_steps(prompts(2, 100)[None])
    assert session._process.call("left") == 0
    assert session.prefill_steps(prompts(1, 8)[None])[0].tokens == 8


# -- checks --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["INT8", "FP8 2:8"])
def test_a_right_engine_passes_its_checks(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    logits = session.check_logits(prompts(4, 12))
    assert logits.verified == "within_bound", logits.text
    found = re.search(r"relative error ([\d.]+) \(bound ([\d.]+): 2 x ([\d.]+), the reference in bfloat16", logits.text)
    assert found is not None, logits.text
    assert 0 < float(found[1]) <= float(found[2]) < 0.4
    assert "greedy tokens" in logits.text
    for phase, sequences, length, m in (("prefill", 2, 16, 32), ("decode", 6, 4, 6)):
        step = session.check_step(prompts(sequences, length), phase)  # type: ignore[arg-type]
        assert step.verified == ("exact" if name == "INT8" else "within_bound"), step.text
        assert step.text.startswith(f"4 linears of a layer at M={m}")


@pytest.mark.parametrize("name", ["INT8", "FP8 2:8"])
def test_one_wrong_row_is_caught_by_the_layers_check(sessions: Sessions, name: str) -> None:
    session = sessions(name)
    session._process.call("spoil", "layer")
    try:
        step = session.check_step(prompts(2, 16), "prefill")
    finally:
        session._process.call("spoil", "layer", True)
    assert step.verified == "failed"
    assert "model.layers.0.mlp.down_proj" in step.text


def test_a_wrong_norm_is_caught_by_the_logits_check(sessions: Sessions) -> None:
    session = sessions("INT8")
    session._process.call("spoil", "norm")
    try:
        assert session.check_step(prompts(2, 16), "prefill").ok, "no linear is wrong"
        assert session.check_logits(prompts(4, 12)).verified == "failed"
    finally:
        session._process.call("spoil", "norm", True)


# -- what it says of itself ----------------------------------------------------------------------------


def test_path_and_times(sessions: Sessions) -> None:
    session = sessions("FP8 2:8")
    session.begin()
    session.prefill_steps(prompts(2, 16)[None])[0]
    path = session.path()
    for part in (
        "vLLM 0.24", "BitNetForCausalLM", "V1 model runner", "M=32: no CUDA graph",
        "attention CPU_ATTN, rotary and KV-cache write in one kernel",
        "SlideSparseFp8Kernel", "cusparselt 2:8 FP8E4M3 128x192: M=32: gate_norm_quantise_lift",
    ):  # fmt: skip
        assert part in path, path
    assert "M=16:" not in path, "of this size alone"
    assert session.tuning() == "no store"
    assert session.startup_s > 0
    assert session.compile_s > 0
    assert session.vocabulary == 128
    assert session.profile_step(prompts(2, 16), "prefill") is None, "no GPU"


def test_the_layers_check_is_no_path_of_the_step(sessions: Sessions) -> None:
    session = sessions("INT8")
    session.begin()
    session.prefill_steps(prompts(2, 16)[None])[0]
    before = session.path()
    session.check_step(prompts(2, 16), "prefill")
    assert session.path() == before


# -- refusals ------------------------------------------------------------------------------------------


def test_what_vllm_refuses_arrives_as_it_was_raised(sessions: Sessions, folder: Path) -> None:
    """`sessions`: for the environment."""
    sessions("INT8")
    with pytest.raises(CheckpointError) as caught:
        CpuEngine().open(folder / "checkpoints/Tiny-INT8", DType.INT8, Variant("cusparselt", Sparsity(4)), None, LIMITS)
    assert str(caught.value).startswith("model.layers.0.self_attn.qkv_proj: row")
    place = folder / "checkpoints_slidesparse/Tiny-FP8-SlideSparse-2_8"
    with pytest.raises(CheckpointError, match="holds pattern 2:8, but cusparselt 2:6"):
        CpuEngine().open(place, DType.FP8, Variant("cusparselt", Sparsity(6)), None, LIMITS)
