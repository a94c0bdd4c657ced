"""A program of its own, because Triton's interpreter cannot be left: is every launch among those that are baked?"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from triton.runtime import JITFunction

import slidesparse
from slidesparse.bake import launches
from slidesparse.bake.specialisation import Specialisation, trace
from slidesparse.bake.warm import specialisations
from slidesparse.bench_file import load_bench
from slidesparse.dtypes import DType
from slidesparse.kernels.bitnet_reference import BitNetOperation
from slidesparse.pattern import Sparsity
from slidesparse.plan import Plan

ROOT = Path(slidesparse.__file__).parents[1]
FEW = settings(max_examples=15, deadline=None, database=None, derandomize=True)
TOKENS = st.one_of(st.integers(1, 40), st.integers(1, 4096).map(lambda m: 16 * m), st.integers(1, 70_000))
SIZES = st.integers(1, 1024).map(lambda k: 4 * k)
DTYPES = st.sampled_from((DType.INT8, DType.FP8))
PATTERNS = st.sampled_from((None, *(Sparsity(length) for length in (4, 6, 8, 10, 12, 14, 16, None))))


def seen(launch: Callable[[], None], architecture: int = 90) -> set[str]:
    return {one.data for one in trace(architecture, launch)}


@FEW
@given(TOKENS, SIZES, DTYPES, PATTERNS)
def quantise(m: int, k: int, dtype: DType, sparsity: Sparsity | None) -> None:
    baked = seen(lambda: launches.quantise(dtype, sparsity, k))
    assert seen(lambda: launches.quantise(dtype, sparsity, k, (m,))) <= baked


@FEW
@given(TOKENS, SIZES, DTYPES, PATTERNS, st.sampled_from(get_args(BitNetOperation)))
def norm(m: int, k: int, dtype: DType, sparsity: Sparsity | None, before: BitNetOperation) -> None:
    baked = seen(lambda: launches.norm_and_quantise(before, dtype, sparsity, k))
    assert seen(lambda: launches.norm_and_quantise(before, dtype, sparsity, k, (m,))) <= baked


@FEW
@given(TOKENS, st.integers(1, 20_000), st.sampled_from((torch.int32, torch.bfloat16)))
def dequantise(m: int, n: int, acc: torch.dtype) -> None:
    biases = (None, torch.float32, torch.bfloat16)
    baked = seen(lambda: launches.dequantise(acc, n, biases))
    assert seen(lambda: launches.dequantise(acc, n, biases, (m,))) <= baked


@FEW
@given(TOKENS, st.integers(1, 20_000), SIZES, DTYPES, PATTERNS)
def reference(m: int, n: int, k: int, dtype: DType, sparsity: Sparsity | None) -> None:
    baked = seen(lambda: launches.reference(dtype, [sparsity], [n], [k]))
    assert seen(lambda: launches.reference(dtype, [sparsity], [n], [k], (m,))) <= baked


@FEW
@given(TOKENS, st.integers(1, 64), st.integers(1, 16), st.sampled_from((32, 64, 128, 256)))
def rope(m: int, heads: int, kv_heads: int, head: int) -> None:
    baked = seen(lambda: launches.rope(heads, kv_heads, head))
    assert seen(lambda: launches.rope(heads, kv_heads, head, (m,))) <= baked


def every_kernel() -> None:
    """Whatever is launched anywhere in the package is launched by the reference profile, but for one: the reference's
    pipeline runs around sparse GEMMs only, so that its plain quantisation is never needed."""
    sources = {path.stem: path.read_text() for path in (ROOT / "slidesparse").rglob("*.py")}
    jit = re.compile(r"@triton\.jit(?:\(.*\))?\ndef (\w+)")
    kernels = {(stem, name) for stem, text in sources.items() for name in jit.findall(text)}
    launched = {(stem, name) for stem, name in kernels if re.search(rf"\b{name}\[[^\]]+\]\(", sources[stem])}
    assert len(launched) == 8, launched
    found = profile("bitnet-2b", 90)
    names = {(one.module.rpartition(".")[2], one.name) for one in found}
    assert names == launched - {("reference_pipeline", "_quantise")}


def keys_depend_on_no_order() -> None:
    """Globals of a called function enter a kernel's cache key only if that function was hashed before its caller: a
    process that launches kernels in another order would look for other keys. So device functions use none."""
    functions = [
        (f"{module.__name__}.{name}", value)
        for module in sys.modules.copy().values()
        if getattr(module, "__name__", "").startswith("slidesparse.kernels.")
        for name, value in vars(module).items()
        if isinstance(value, JITFunction)
    ]
    assert len(functions) > 20
    for name, function in functions:
        assert function.cache_key
        assert not function.used_global_vals, f"{name} uses globals {[name for name, _ in function.used_global_vals]}"


def profiles() -> None:
    """Figures that follow from bench.yaml. 2:4 moves no code, so dense and 2:4 are one kernel: 8 ways to lift, of which
    4 are end-to-end. Both types; quantise has 8 launches for each K; norms 8 for K = 2560 (norm, add), 6 for 6912."""
    found = profile("bitnet-2b", 90)
    counts = {name: sum(one.module.endswith(name) for one in found) for name in ("activations", "bitnet", "copy")}
    assert counts == {"activations": 2 * 8 * 2 * 8, "bitnet": 2 * 4 * (8 + 8 + 6), "copy": 5}, counts
    ampere = profile("bitnet-2b", 80)
    assert all("EARLY=True" not in str(one) and "FP8=True" not in str(one) for one in ampere)
    assert all("EARLY=False" not in str(one) for one in found)
    halves = {str(one) for one in profile("bitnet-2b-tp2", 90)}
    assert any(f"PAIRS={6912 // 4}" in one and "_quantise_lift" in one for one in halves)
    assert any(f"N={13824 // 2}" in one for one in halves)
    biased = [str(one) for one in profile("paper", 90) if "BIAS=True" in str(one)]
    assert any("bias_ptr:*bf16" in one for one in biased)
    assert any("bias_ptr:*fp32" in one for one in biased)


def profile(name: str, architecture: int) -> tuple[Specialisation, ...]:
    found = specialisations(Plan(load_bench(ROOT / "bench.yaml"), name, Path()), architecture)
    assert len({one.digest for one in found}) == len(found)
    return found


if __name__ == "__main__":
    for check in (quantise, norm, dequantise, rope, reference, every_kernel, keys_depend_on_no_order, profiles):
        check()
        print("ok", check.__name__, flush=True)
