"""BitNet b1.58 on vLLM's Llama: RMSNorms before o_proj and down_proj, a squared-ReLU gate, tied embeddings.

    h += o_proj(attn_sub_norm(attention(norm(h))))
    h += down_proj(ffn_sub_norm(relu(gate_proj(n))**2 * up_proj(n)))        n = norm(h)

With vLLM's own linears (backend `vllm`) every operation is vLLM's. With ours, each linear is one operator with all that
stands between it and the one before, and attention is one with what is before it:

    add + norm + quantise (+ lift) > qkv        rotary + KV-cache write > attention
    norm + quantise (+ lift) > o
    add + norm + quantise (+ lift) > gate_up    squared-ReLU gate + norm + quantise (+ lift) > down

On several ranks o and down keep their norms apart, because those need the other ranks' squares, and KV heads that the
ranks cannot share evenly stand several times (`shards.shared_kv_heads`): vLLM has to be told that there are more
(`hf_overrides`), and the checkpoint's are repeated as they are loaded.

The model function of `transformers` (`BitNetForCausalLM`); the linears carry no bias, their weights are ternary codes
with a scale, which is the business of the checkpoint's quantisation, not of this file.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_world_size, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.activation import ReLUSquaredActivation
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.model_loader.weight_utils import sharded_weight_loader
from vllm.model_executor.models.llama import LlamaAttention, LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.utils import set_weight_attrs

from slidesparse.errors import CheckpointError, ConfigError
from slidesparse.vllm_plugin.fused import BEFORE, add_norm_linear, gate_norm_linear, norm_linear
from slidesparse.vllm_plugin.linear_kernels import selection
from slidesparse.vllm_plugin.model_paths import require_ours
from slidesparse.vllm_plugin.rope_attention import rope_attention, runs_on, split_at_attention
from slidesparse.vllm_plugin.shards import shared_kv_heads

ACTIVATION = "relu2"


class ShardedRMSNorm(nn.Module):
    """RMSNorm of x [..., size / ranks], the columns of this rank: the mean of squares is over all ranks' columns.

    y = weight * bf16(x / sqrt(sum(x**2 over ranks) / size + eps)), float32 inside, weight [size / ranks].
    """

    def __init__(self, size: int, eps: float, ranks: int) -> None:
        super().__init__()
        self.size, self.eps = size, eps
        self.weight = nn.Parameter(torch.ones(size // ranks))
        set_weight_attrs(self.weight, {"weight_loader": sharded_weight_loader(0)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        squares = tensor_model_parallel_all_reduce(wide.square().sum(dim=-1, keepdim=True))
        return self.weight * (wide * torch.rsqrt(squares / self.size + self.eps)).to(x.dtype)


def sub_norm(size: int, eps: float) -> nn.Module:
    """RMSNorm of a row of `size` columns that tensor parallelism may have split (vLLM has no such norm)."""
    ranks = get_tensor_model_parallel_world_size()
    return RMSNorm(size, eps=eps) if ranks == 1 else ShardedRMSNorm(size, eps, ranks)


def runs_on_ours() -> bool:
    """Whether the model that vLLM is building now runs on linears of ours."""
    chosen = selection()
    return chosen is not None and chosen.ours


def fuses_sub_norms() -> bool:
    """Whether sub-norms, too, are part of the operator of the linear behind them."""
    return runs_on_ours() and get_tensor_model_parallel_world_size() == 1


class BitNetMLP(nn.Module):
    """hidden [M, hidden] -> [M, hidden]."""

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.intermediate_size
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden, [inner, inner], bias=False, quant_config=quant_config, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(
            inner, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.act_fn = ReLUSquaredActivation()
        self.ffn_sub_norm = sub_norm(inner, config.rms_norm_eps)
        self.fused = fuses_sub_norms()
        if self.fused:
            setattr(self.down_proj, BEFORE, "gate")

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.from_gate_up(self.gate_up_proj(hidden)[0])

    def from_gate_up(self, gate_up: torch.Tensor) -> torch.Tensor:
        """[M, 2 inner] -> [M, hidden]: all but the first linear."""
        if self.fused:
            return gate_norm_linear(self.ffn_sub_norm, gate_up, self.down_proj)
        gate, up = gate_up.chunk(2, dim=-1)
        out: torch.Tensor = self.down_proj(self.ffn_sub_norm(self.act_fn(gate) * up))[0]
        return out


class BitNetAttention(LlamaAttention):
    """Llama's attention with a norm between it and o_proj.

    `one_pass`: rotary embedding and KV-cache write are one kernel of ours.
    """

    def __init__(self, config: Any, hidden_size: int, num_heads: int, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, hidden_size, num_heads, *args, **kwargs)
        self.attn_sub_norm = sub_norm(self.total_num_heads * self.head_dim, config.rms_norm_eps)
        self.fused = fuses_sub_norms()
        if self.fused:
            setattr(self.o_proj, BEFORE, "norm")
        current = get_current_vllm_config()
        self.one_pass = runs_on_ours() and runs_on(self.attn, self.rotary_emb, current)
        if self.one_pass:
            split_at_attention(current)

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.from_qkv(positions, self.qkv_proj(hidden_states)[0])

    def from_qkv(self, positions: torch.Tensor, qkv: torch.Tensor) -> torch.Tensor:
        """positions [M], [M, q + 2 kv] -> [M, hidden]: all but the first linear."""
        if self.one_pass:
            attended = rope_attention(qkv, positions, self.attn, self.rotary_emb)
        else:
            q, k, v = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
            q, k = self.rotary_emb(positions, q, k)
            attended = self.attn(q, k, v)
        if self.fused:
            return norm_linear(self.attn_sub_norm, attended, self.o_proj)
        out: torch.Tensor = self.o_proj(self.attn_sub_norm(attended))[0]
        return out


class BitNetDecoderLayer(LlamaDecoderLayer):
    """`forward` is Llama's where the linears are vLLM's own; the parts are BitNet's."""

    def __init__(self, vllm_config: VllmConfig, prefix: str = "", config: Any = None) -> None:
        nn.Module.__init__(self)  # Llama's own would build an MLP, which refuses every activation but silu
        config = config or vllm_config.model_config.hf_config
        quant_config = self.get_quant_config(vllm_config)
        bias = bool(getattr(config, "attention_bias", False))
        self.hidden_size = config.hidden_size
        self.self_attn = BitNetAttention(
            config,
            config.hidden_size,
            config.num_attention_heads,
            config.num_key_value_heads,
            max_position_embeddings=config.max_position_embeddings,
            quant_config=quant_config,
            bias=bias,
            bias_o_proj=bias,
            cache_config=vllm_config.cache_config,
            prefix=f"{prefix}.self_attn",
        )
        self.mlp = BitNetMLP(config, quant_config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.fused = runs_on_ours()
        if self.fused:
            for linear in (self.self_attn.qkv_proj, self.mlp.gate_up_proj):
                setattr(linear, BEFORE, "add")

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [M], [M, hidden] twice -> what this layer adds, and the sum before it."""
        if not self.fused:
            out: tuple[torch.Tensor, torch.Tensor] = super().forward(positions, hidden_states, residual)
            return out
        attention, mlp = self.self_attn, self.mlp
        if residual is None:
            residual = hidden_states
            qkv = norm_linear(self.input_layernorm, hidden_states, attention.qkv_proj)
        else:
            qkv, residual = add_norm_linear(self.input_layernorm, hidden_states, residual, attention.qkv_proj)
        hidden_states = attention.from_qkv(positions, qkv)
        gate_up, residual = add_norm_linear(self.post_attention_layernorm, hidden_states, residual, mlp.gate_up_proj)
        return mlp.from_gate_up(gate_up), residual


class BitNetForCausalLM(LlamaForCausalLM):
    """Weights as prepare and convert (layout plain) write them; loaded by Llama's loader."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        """Raises CheckpointError for another activation, ConfigError for LoRA; as `model_paths.require_ours` does."""
        config = vllm_config.model_config
        if config.hf_config.hidden_act != ACTIVATION:
            raise CheckpointError(
                f"{config.model}: hidden_act {config.hf_config.hidden_act!r}; BitNet has {ACTIVATION!r}, and a model "
                f"relabelled as BitNet gives noise"
            )
        if runs_on_ours() and vllm_config.lora_config is not None:
            raise ConfigError(f"{config.model}: our linears take no LoRA; leave it out, or choose backend vllm")
        _require_shared_heads(config)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=BitNetDecoderLayer)
        if runs_on_ours():
            require_ours(self)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        loaded: set[str] = super().load_weights(_repeated(weights, self.config))
        return loaded


def _require_shared_heads(config: Any) -> None:
    """vLLM's own answer to heads that the ranks cannot share is an assertion without a word."""
    heads, kv_heads = config.hf_config.num_attention_heads, config.hf_config.num_key_value_heads
    ranks = get_tensor_model_parallel_world_size()
    shared = shared_kv_heads(heads, kv_heads, ranks)
    if shared != kv_heads:
        raise ConfigError(
            f"{config.model}: {kv_heads} KV heads on {ranks} ranks have to stand {shared // kv_heads} times each: "
            f"--hf-overrides '{{\"num_key_value_heads\": {shared}}}'"
        )


def _repeated(weights: Iterable[tuple[str, torch.Tensor]], config: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """k_proj and v_proj [checkpoint's KV heads * D, .] -> [those of the config * D, .], each head several times.

    A query head h of H reads KV head h * kv // H, so repeats of one head lie side by side.

    Raises:
        CheckpointError: the config's number is no multiple of the checkpoint's.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    rows = config.num_key_value_heads * head
    for name, tensor in weights:
        if (".k_proj." in name or ".v_proj." in name) and tensor.dim() and tensor.shape[0] != rows:
            held = tensor.shape[0] // head
            if tensor.shape[0] % head or config.num_key_value_heads % held:
                raise CheckpointError(
                    f"{name}: {tensor.shape[0]} rows are not {config.num_key_value_heads} KV heads of {head}, nor can "
                    f"heads be repeated to be that many"
                )
            by_head = tensor.unflatten(0, (held, head))
            tensor = by_head.repeat_interleave(config.num_key_value_heads // held, dim=0).flatten(0, 1)
        yield name, tensor
