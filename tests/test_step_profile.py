"""Where the time of a step goes: kernel names as profilers show them, times that add up, and the least work by hand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse import records
from slidesparse.bench_file import load_bench
from slidesparse.dtypes import DType
from slidesparse.measure import step_categories as c
from slidesparse.measure.step_profile import KernelSpan, KernelTime, StepProfile, by_category, step_rows
from slidesparse.pattern import Sparsity
from slidesparse.plan import ThroughputCell, Variant
from slidesparse.result_tree import ResultTree
from slidesparse.rows import StepRow

BITNET = load_bench(Path(__file__).parents[1] / "bench.yaml").models["BitNet-2B"]
STAMP = {"fingerprint": "0123456789ab", "run_id": "r", "time_utc": "2026-01-28T10:00:00+00:00", "engine": "vllm"}
FLASH3 = (
    "void cutlass::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<"
    "2, cute::tuple<cute::C<1>, cute::C<1>, cute::C<1> >, cute::tuple<cute::C<128>, cute::C<176>, cute::C<128> >, 128,"
    " cutlass::bfloat16_t, float, cutlass::arch::Sm90, true, false, false, true, true, false> > > >(Params)"
)
SCALED_MM = (
    "void cutlass::device_kernel<vllm::cutlass_3x_gemm<signed char, cutlass::bfloat16_t, vllm::c3x::ScaledEpilogue,"
    " cute::tuple<cute::C<128>, cute::C<128>, cute::C<128> >, cute::tuple<cute::C<2>, cute::C<1>, cute::C<1> >,"
    " cutlass::gemm::KernelTmaWarpSpecializedPingpong, cutlass::epilogue::TmaWarpSpecialized>::GemmKernel>(Params)"
)
NAMES = {
    # vLLM 0.24's own kernels, as its libraries list them
    SCALED_MM: c.LINEAR,
    "void cutlass::Kernel2<enable_sm75_to_sm80<cutlass::gemm::kernel::DefaultGemmWithVisitor<signed char, float> > >()":
        c.LINEAR,
    "void vllm::dynamic_scaled_int8_quant_kernel<c10::BFloat16, float>(c10::BFloat16 const*, signed char*, float*)":
        c.QUANTISE,
    "void vllm::dynamic_per_token_scaled_fp8_quant_kernel_strided<c10::BFloat16, c10::Float8_e4m3fn>(...)": c.QUANTISE,
    "std::enable_if<...>::type vllm::fused_add_rms_norm_kernel<c10::BFloat16, 8>(c10::BFloat16*, long, int)": c.NORM,
    "void vllm::rms_norm_kernel<c10::BFloat16, 8, 2>(c10::BFloat16*, c10::BFloat16 const*, long, float)": c.NORM,
    "void vllm::rms_norm_dynamic_per_token_quant_kernel<c10::BFloat16, signed char, true>(...)": c.FUSED,
    "void vllm::act_and_mul_kernel<c10::BFloat16, &vllm::silu_kernel<c10::BFloat16>, true>(...)": c.GATE,
    "void vllm::act_and_mul_quant_kernel<c10::BFloat16, ...>(...)": c.FUSED,
    "void vllm::activation_kernel<c10::BFloat16, &vllm::gelu_new_kernel<c10::BFloat16>, true>(...)": c.GATE,
    "void vllm::reshape_and_cache_flash_kernel<__nv_bfloat16, __nv_bfloat16, (vllm::Fp8KVCacheDataType)0>(...)":
        c.CACHE,
    "reshape_and_cache_kernel_flash": c.CACHE,
    "void vllm::rotary_embedding_kernel<c10::BFloat16, true>(long const*, c10::BFloat16*, int)": c.CACHE,
    "void vllm::cross_device_reduce_1stage<nv_bfloat16, 2>(vllm::RankData*, vllm::RankSignals, vllm::Signal*)":
        c.COMMUNICATION,
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": c.COMMUNICATION,
    "_topk_topp_kernel": c.SAMPLING,
    "_compute_slot_mapping_kernel": c.REST,
    # attention
    FLASH3: c.ATTENTION,
    "void cutlass::device_kernel<flash::FlashAttnFwdCombine<cute::tuple<cute::C<8>, cute::C<128> >, 5> >(Params)":
        c.ATTENTION,
    "flash::prepare_varlen_num_blocks_kernel(int, int, int, int const*, int const*)": c.ATTENTION,
    "void flash::flash_fwd_splitkv_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4, false, false>, true>(...)":
        c.ATTENTION,
    "kernel_unified_attention": c.ATTENTION,
    "void flashinfer::BatchPrefillWithPagedKVCacheKernel<flashinfer::KernelTraits<...>>(...)": c.ATTENTION,
    # cuBLASLt and cuSPARSELt
    "nvjet_sm90_qqtst_128x256_128x4_2x1_v_bz_coopA_TNT": c.LINEAR,
    "nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNN": c.HEAD,
    "nvjet_sm90_hsh_128x128_64x4_1x2_h_bz_TNN": c.HEAD,
    "sm90_xmma_gemm_i8i32_i8i32_i32_tn_n_tilesize128x256x128_warpgroupsize2x1x1_execute_segment_k_off_kernel__5x_cublas":
        c.LINEAR,
    "sm90_xmma_sparse_gemm_e4m3bf16_e4m3f32_f32_tn_n_tilesize128x128x128_cgasize2x1x1_execute_kernel__5x_cusparselt":
        c.LINEAR,
    "sm80_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x32_stage4_warpsize2x2x1_tensor16x8x16_kernel": c.HEAD,
    "ampere_bf16_s16816gemm_bf16_128x64_ldg8_f2f_stages_64x4_tn": c.HEAD,
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_bf16_128x128_32x5_tn_align8>(Params)": c.HEAD,
    "cutlass_89_tensorop_bf16_s16832gemm_e4m3_bf16_128x128_64x3_tn_align16": c.LINEAR,
    "void cublasLt::splitKreduce_kernel<32, 16, int, int, float, __nv_bfloat16, true, false, false>(...)": c.LINEAR,
    # Inductor
    "triton_red_fused__to_copy_add_mean_mul_pow_rsqrt_3": c.NORM,
    "triton_red_fused__to_copy_add_embedding_mean_mul_pow_rsqrt_0": c.NORM,
    "triton_red_fused__to_copy_mean_mul_pow_relu_rsqrt_split_5": c.FUSED,
    "triton_poi_fused_mul_pow_relu_split_2": c.GATE,
    "triton_poi_fused_mul_silu_slice_2": c.GATE,
    "triton_red_fused__to_copy_abs_add_amax_clamp_div_mean_mul_pow_round_rsqrt_1": c.FUSED,
    "triton_red_fused__to_copy_abs_clamp_div_max_0": c.QUANTISE,
    "triton_red_fused__to_copy_abs_clamp_cutlass_scaled_mm_div_max_mul_reciprocal_rms_norm_unsqueeze_view_0": c.FUSED,
    "triton_red_fused_dynamic_scaled_int8_quant_mul_pow_relu_rms_norm_split_2": c.FUSED,
    "triton_poi_fused_add_cat_index_select_mul_split_sub_unsqueeze_view_2": c.CACHE,
    "triton_poi_fused__to_copy_mul_view_7": c.REST,
    "triton_tem_fused_mm_1": c.LINEAR,
    # PyTorch
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::ArgMaxOps<float>, unsigned> >()":
        c.SAMPLING,
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<c10::BFloat16> >(int)": c.REST,
    "Memcpy HtoD (Pinned -> Device)": c.REST,
    "Memset (Device)": c.REST,
}  # fmt: skip
LAUNCH = r"\b(_\w+)\[(?:\([^]]*|\w+)\]\("
OURS = {
    "triton_activations": {"_quantise_lift": c.QUANTISE},
    "triton_bitnet": {"_norm_quantise_lift": c.FUSED},
    "triton_dequantise": {"_dequantise_bias": c.DEQUANTISE},
    "triton_copy": {"_copy": c.REST},
    "triton_rope": {"_rope_and_cache": c.CACHE},
}


# -- names ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_is_told_by_its_name(name: str) -> None:
    assert c.category_of(name) == NAMES[name]


def test_every_kernel_of_ours_is_known() -> None:
    """Functions that a launch names, `_kernel[(m,)](` or `_kernel[grid](`, in our Triton files."""
    folder = Path(c.__file__).parents[1] / "kernels"
    found = {
        path.stem: {name: c.category_of(name) for name in re.findall(LAUNCH, path.read_text("utf-8"))}
        for path in folder.glob("triton_*.py")
    }
    assert {stem: names for stem, names in found.items() if names} == OURS


def test_every_category_has_a_group_and_bounds_have_one() -> None:
    assert set(c.GROUPS) == set(c.CATEGORIES)
    assert [name for name in c.CATEGORIES if c.GROUPS[name] == c.BETWEEN] == [
        c.DEQUANTISE, c.FUSED, c.QUANTISE, c.NORM, c.GATE,
    ]  # fmt: skip


# -- times ---------------------------------------------------------------------------------------------


spans = st.lists(
    st.tuples(st.sampled_from(sorted(NAMES)), st.integers(0, 1000), st.integers(0, 200)).map(
        lambda part: KernelSpan(part[0], float(part[1]), float(part[1] + part[2]))
    ),
    max_size=30,
)


@given(spans)
def test_kernel_times_add_up_to_the_time_in_which_any_ran(launches: list[KernelSpan]) -> None:
    """The union of the spans, counted microsecond by microsecond: no overlap is counted twice."""
    profile = StepProfile.of(launches, 2000.0)
    running = {t for span in launches for t in range(int(span.start_us), int(span.end_us))}
    assert profile.busy_us == pytest.approx(len(running))
    assert sum(kernel.calls for kernel in profile.kernels) == len(launches)
    total = sum(kernel.us for kernels in by_category(profile.kernels).values() for kernel in kernels)
    assert total == pytest.approx(profile.busy_us)


@given(spans, st.floats(0, 3000))
def test_rows_add_up_to_the_step(launches: list[KernelSpan], wall: float) -> None:
    profile = StepProfile.of(launches, wall)
    rows = step_rows(profile, _cell(), BITNET, 1024, STAMP)
    assert [row.category for row in rows] == list(c.CATEGORIES)
    assert all(row.us >= 0 for row in rows)
    assert sum(row.us for row in rows) == pytest.approx(rows[0].step_us, abs=1e-6)
    assert rows[0].step_us == pytest.approx(max(wall, profile.busy_us))
    assert rows[-1].category == c.IDLE
    assert rows[-1].us == pytest.approx(max(0.0, wall - profile.busy_us))


def test_a_kernel_that_starts_early_and_waits_is_not_charged_for_the_wait() -> None:
    """Programmatic dependent launch: the second kernel is resident from 5 us on, the first ends at 10 us."""
    profile = StepProfile.of([KernelSpan("a", 0, 10), KernelSpan("b", 5, 14), KernelSpan("a", 20, 21)], 30)
    assert {k.name: (k.us, k.calls) for k in profile.kernels} == {"a": (11.0, 2), "b": (4.0, 1)}


def test_the_longest_kernels_are_named_and_the_others_counted() -> None:
    kernels = tuple(KernelTime(f"mystery_{i}", 10.0 + i, 3) for i in range(9))
    rest = _row(step_rows(StepProfile(kernels, 200.0), _cell(), BITNET, 1024, STAMP), c.REST)
    assert rest.kernels.startswith("mystery_8: 18.0 us in 3; mystery_7: 17.0 us in 3")
    assert rest.kernels.count(";") == 5
    assert rest.kinds == 9
    assert rest.calls == 27


# -- work ----------------------------------------------------------------------------------------------


def test_work_of_a_prefill_step_by_hand() -> None:
    """BitNet 2B, 16 prompts of 1024 tokens, dense; every kernel's inputs and outputs added up one by one."""
    m, hidden, inner, blocks = 16384, 2560, 6912, 30
    rows = step_rows(StepProfile((), 1.0), _cell(), BITNET, 1024, STAMP)
    gemm, head, attention, cache = (_row(rows, name) for name in (c.LINEAR, c.HEAD, c.ATTENTION, c.CACHE))
    assert gemm.layers == "qkv 3840x2560; o 2560x2560; gate_up 13824x2560; down 2560x6912"
    assert (gemm.rows, gemm.blocks, gemm.operands, gemm.bytes_moved) == (m, blocks, "INT8", -1)
    assert (head.layers, head.rows, head.blocks, head.operands) == ("lm_head 128256x2560", 16, 1, "BF16")
    causal = sum(range(1, 1025))
    assert attention.operations == blocks * 16 * 20 * causal * (2 * 128 + 2 * 128)
    assert attention.bytes_moved == blocks * m * 2 * (2560 + 640 + 640 + 2560)
    assert cache.bytes_moved == blocks * m * 2 * (3840 + 3840)
    first = m * (2 * hidden + hidden + 4) + 2 * hidden
    add = m * (2 * hidden + 2 * hidden + 2 * hidden + hidden + 4) + 2 * hidden
    sub = m * (2 * hidden + hidden + 4) + 2 * hidden
    gate = m * (2 * 2 * inner + inner + 4) + 2 * inner
    final = m * (2 * hidden + 2 * hidden + 2 * hidden)
    between = first + (2 * blocks - 1) * add + blocks * (sub + gate) + final
    assert {row.bytes_moved for row in rows if c.GROUPS[row.category] == c.BETWEEN} == {between}


def test_lifting_adds_its_columns_and_nothing_else_between_the_products() -> None:
    dense = _row(step_rows(StepProfile((), 1.0), _cell(), BITNET, 1024, STAMP), c.FUSED)
    pattern = Sparsity(8)
    sparse = _row(step_rows(StepProfile((), 1.0), _cell(pattern), BITNET, 1024, STAMP), c.FUSED)
    lifted = sum(n * (pattern.lifted_k(k) - k) for n, k in ((3, 2560), (1, 6912)))
    assert sparse.bytes_moved - dense.bytes_moved == 30 * 16384 * lifted
    assert sparse.sparsity == "2:8"
    assert sparse.backend == "cusparselt"


def test_a_decode_step_reads_one_token_and_the_whole_context() -> None:
    cell = ThroughputCell("decode", "BitNet-2B", DType.FP8, Variant("vllm"), 512, 16, 512, 256, 256)
    rows = step_rows(StepProfile((), 1.0), cell, BITNET, 272, STAMP)
    attention = _row(rows, c.ATTENTION)
    assert _row(rows, c.LINEAR).rows == _row(rows, c.HEAD).rows == 512
    assert attention.operations == 30 * 512 * 4 * 2560 * 272
    assert attention.bytes_moved == 30 * 512 * 2 * (2 * 2560 + 272 * 1280)


def test_two_ranks_share_every_product() -> None:
    layers = _row(step_rows(StepProfile((), 1.0), _cell(), BITNET, 1024, STAMP, 2), c.LINEAR).layers
    assert layers == "qkv 1920x2560; o 2560x1280; gate_up 6912x2560; down 2560x3456"


def test_rows_survive_the_table(tmp_path: Path) -> None:
    tree = ResultTree(tmp_path, "H200_cc90_py312_cu130_x86_64")
    rows = step_rows(StepProfile((KernelTime(SCALED_MM, 40.0, 120),), 50.0), _cell(), BITNET, 1024, STAMP)
    path = tree.step_profile("BitNet-2B", DType.INT8)
    assert path == tmp_path / "step_profile" / "steps_BitNet-2B-INT8.csv"
    records.append(path, rows)
    back = records.read(path)
    assert list(back["category"]) == list(c.CATEGORIES)
    assert back["us"].sum() == pytest.approx(50.0)
    assert back["kernels"][0].startswith("void cutlass::device_kernel<vllm::cutlass_3x_gemm<signed char")
    assert back["operations"].dtype.kind in "if"
    assert list(back.columns) == StepRow.columns()


def _cell(sparsity: Sparsity | None = None) -> ThroughputCell:
    variant = Variant("vllm") if sparsity is None else Variant("cusparselt", sparsity)
    return ThroughputCell("prefill", "BitNet-2B", DType.INT8, variant, 16384, 1024, 16, 128, 1)


def _row(rows: list[StepRow], category: str) -> StepRow:
    return next(row for row in rows if row.category == category)
