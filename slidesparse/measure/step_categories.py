"""What a GPU kernel of an engine step does, told from its name.

Names are those that a profiler shows: demangled C++ (vLLM 0.24, FlashAttention, CUTLASS, NCCL, PyTorch), symbols of
cuBLASLt and cuSPARSELt, Triton functions (ours, vLLM's), and Inductor's, which list the operators that they fuse:
`triton_red_fused_add_mean_mul_pow_rsqrt_3`. A name that no rule knows is `REST`, and the report shows it by name.
"""

from __future__ import annotations

import re

LINEAR, DEQUANTISE = "GEMM", "dequantise and bias"
FUSED, QUANTISE, NORM, GATE = "norm, gate, quantise, lift: fused", "quantise and lift", "norms", "gate"
ATTENTION, CACHE = "attention", "rotary and KV-cache write"
HEAD, SAMPLING, COMMUNICATION = "output layer", "logits and sampling", "communication"
REST, IDLE = "rest", "idle"
CATEGORIES = (
    LINEAR, DEQUANTISE, FUSED, QUANTISE, NORM, GATE, ATTENTION, CACHE, HEAD, SAMPLING, COMMUNICATION, REST, IDLE,
)  # fmt: skip
"""In the order of tables. `FUSED`: two or more of norm, gate and quantise in one kernel. `HEAD`: 16-bit products, which
in a W8A8 model are the output layer's. `IDLE`: no kernel runs."""
BETWEEN = "between the products"
GROUPS = {name: BETWEEN if name in (DEQUANTISE, FUSED, QUANTISE, NORM, GATE) else name for name in CATEGORIES}
"""Categories that one bound is stated for: how much of the work between two products is fused is an engine's choice."""

_RULES = (
    (COMMUNICATION, r"nccl|all_?reduce|cross_device_reduce|all_?gather|reduce_?scatter|multimem"),
    (ATTENTION, r"flash::|flashattn|flash_fwd|fmha|paged_attention|unified_attention|merge_attn_states"
                r"|prepare_varlen_num_blocks|batch(prefill|decode)with|kernel_reduce_segments|^_fwd_(grouped_)?kernel"),
    (CACHE, r"reshape_and_cache|concat_and_cache|rotary|rope(?!r)"),
    (DEQUANTISE, r"dequanti[sz]e"),
)  # fmt: skip
_GEMM = r"gemm|gemv|nvjet|xmma|cutlass|cublas|cusparse|splitk|matmul"
_WIDE = r"nvjet_(sm\d+_)?[th]s|gemm_b?f16|_h\d+gemm|gemv"
"""16-bit operands. nvjet writes t for bfloat16 and h for float16, q for FP8; in the others' names the operands' type
comes after `gemm`, the output's before."""
_ROLES = (
    (NORM, r"(rms|layer)_?norm|norm_kernel|_norm_|^norm_"),
    (GATE, r"act_and_mul|silu|gelu|swiglu|relu|activation_kernel"),
    (QUANTISE, r"quant|lift"),
)
_SAMPLING = r"argmax|softmax|top_?k|top_?p|sampl|gumbel|multinomial|logit|penalt|temperature"
_INDUCTOR = re.compile(r"^triton_[a-z]+_fused_(.*?)(_\d+)?$")

_CONSUMER = re.compile(r"_?(cutlass_scaled_mm|scaled_mm)_?")
"""A product that is no Triton kernel: Inductor names what prepares its operands after it as well."""


def category_of(name: str) -> str:
    """The category of a kernel; `REST` for a name that is not known."""
    inductor = _INDUCTOR.match(name)
    if inductor is not None:
        return _of_operators(set(_CONSUMER.sub("_", inductor[1]).split("_")))
    low = name.lower()
    for category, pattern in _RULES:
        if re.search(pattern, low):
            return category
    if re.search(_GEMM, low):
        return HEAD if re.search(_WIDE, low) else LINEAR
    roles = [role for role, pattern in _ROLES if re.search(pattern, low)]
    if roles:
        return roles[0] if len(roles) == 1 else FUSED
    return SAMPLING if re.search(_SAMPLING, low) else REST


def _of_operators(words: set[str]) -> str:
    """Inductor joins the operators' names, which may hold `_` themselves: `_to_copy`, `index_select`."""
    if words & {"mm", "addmm", "bmm"}:
        return LINEAR
    roles = []
    if "rsqrt" in words or {"mean", "pow"} <= words or {"rms", "norm"} <= words:
        roles.append(NORM)
    if words & {"relu", "silu", "gelu", "sigmoid"}:
        roles.append(GATE)
    if words & {"amax", "aminmax", "round", "quant"} or {"abs", "max"} <= words:
        roles.append(QUANTISE)
    if roles:
        return roles[0] if len(roles) == 1 else FUSED
    if words & {"rotary", "cos", "sin"} or (words & {"cat", "stack"} and words & {"sub", "neg"}):
        return CACHE
    return SAMPLING if words & {"argmax", "softmax", "logits"} else REST
