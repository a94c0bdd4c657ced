"""What `bench.yaml` may say: its sections, and what they must keep to. `bench_file.py` reads it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, model_validator

from slidesparse.dtypes import DType
from slidesparse.errors import ConfigError
from slidesparse.pattern import Sparsity

Pattern = Annotated[
    Sparsity,
    BeforeValidator(lambda value: value if isinstance(value, Sparsity) else Sparsity.parse(str(value))),
    PlainSerializer(str, return_type=str),
]
Positive = Annotated[int, Field(gt=0)]


def _one_of(*allowed: DType) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"Input should be {' or '.join(repr(dtype.value) for dtype in allowed)}")
        return value

    return BeforeValidator(check)


QuantisedDType = Annotated[DType, _one_of(DType.INT8, DType.FP8)]
FloatDType = Annotated[DType, _one_of(DType.BF16, DType.FP16)]
Source = Literal["hub", "local", "synthetic"]
Backend = Literal["cpu_dense", "cpu_sparse", "vllm", "cublaslt", "cusparselt", "cutlass", "auto", "fused"]
EngineName = Literal["transformers", "vllm"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


class Paths(_Section):
    """Folders, relative to the data folder (`--data`, default: the current one)."""

    source: str = "checkpoints"
    checkpoints: str = "checkpoints"
    converted: str = "checkpoints_slidesparse"
    reports: str = "reports"


class Hub(_Section):
    """A model repository on the Hugging Face hub; the commit that a moving revision meant is recorded."""

    repo: str
    revision: str


class Model(_Section):
    """One entry of the catalogue. `config` is a `transformers` config and defines the synthetic model."""

    quantization: Literal["bitnet_ternary", "absmax_per_channel"]
    hub: Hub | None = None
    local: str | None = None
    config: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Model:
        for key in ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
            if key not in self.config:
                raise ValueError(f"config.{key} is missing")
        return self

    @property
    def max_positions(self) -> int:
        return int(self.config["max_position_embeddings"])

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """(N, K) of the four linear layers of a decoder block as an inference engine merges them."""
        hidden, inner = int(self.config["hidden_size"]), int(self.config["intermediate_size"])
        heads = int(self.config["num_attention_heads"])
        kv_heads = int(self.config.get("num_key_value_heads", heads))
        head = int(self.config.get("head_dim") or hidden // heads)
        return {
            "qkv": ((heads + 2 * kv_heads) * head, hidden),
            "o": (hidden, heads * head),
            "gate_up": (2 * inner, hidden),
            "down": (hidden, inner),
        }


class Stopping(_Section):
    """When a measurement may stop: the interval is narrow enough, or a cap is hit; the row says which."""

    warmup_s: Annotated[float, Field(ge=0)]
    steady_rel: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Warm up in windows of `warmup_s` until the medians of two that follow each other agree this well."""
    min_samples: Annotated[int, Field(ge=2)]
    max_samples: Annotated[int, Field(ge=2)]
    ci_rel: Annotated[float, Field(gt=0, lt=1, description="half width of the 95 % interval over the median")]
    cap_s: Annotated[float, Field(gt=0)]

    @model_validator(mode="after")
    def _check(self) -> Stopping:
        if self.max_samples < self.min_samples:
            raise ValueError(f"max_samples {self.max_samples} is below min_samples {self.min_samples}")
        return self


class Convert(_Section):
    method: Literal["magnitude", "random"] = "magnitude"
    layout: Literal["plain", "lifted"] = "plain"
    proof_tokens: Positive = 32


class Tune(_Section):
    coarse_m: tuple[Positive, ...]
    fine_m: tuple[Positive, ...]
    stopping: Stopping


class Prefill(_Section):
    """Cell of M tokens: prompts of P = min(M, prompt_cap), S = M / P sequences a step, `steps` steps, 1 output."""

    m: tuple[Positive, ...]
    prompt_cap: Positive = 1024
    steps: Positive = 128
    stopping: Stopping

    @model_validator(mode="after")
    def _check(self) -> Prefill:
        for m in self.m:
            if m > self.prompt_cap and m % self.prompt_cap:
                raise ValueError(
                    f"m {m} is impossible: above prompt_cap {self.prompt_cap} it must be a multiple of it, "
                    f"or no step holds exactly {m} tokens"
                )
        return self


class Decode(_Section):
    """Cell of M sequences: `prompt_len` prompt tokens and `output_len` generated tokens each."""

    m: tuple[Positive, ...]
    prompt_len: Positive = 16
    output_len: Annotated[int, Field(ge=2)] = 256
    stopping: Stopping


class Kernel(_Section):
    """GEMM points: the models' own shapes in the profile's types, then the optional wider ones."""

    m: tuple[Positive, ...]
    float_dtypes: tuple[FloatDType, ...] = ()
    """16-bit types, measured at the same shapes on random data."""
    square: tuple[Positive, ...] = ()
    """Sizes M = N = K, in all types."""
    stopping: Stopping


class Linear(_Section):
    """Whole linear layers: all merged linears of a block, one after the other, M tokens each."""

    m: tuple[Positive, ...]
    stopping: Stopping


class StepProfiles(_Section):
    """Cells of which one more step is run under the profiler, in every variant: where its time goes."""

    prefill_m: tuple[Positive, ...] = ()
    decode_m: tuple[Positive, ...] = ()

    def sizes(self, phase: Literal["prefill", "decode"]) -> tuple[int, ...]:
        return self.prefill_m if phase == "prefill" else self.decode_m


class Calibrate(_Section):
    """How long each rate is measured for."""

    seconds: Annotated[float, Field(gt=0)] = 0.3


class SparsityLists(_Section):
    """Which patterns each task covers."""

    end_to_end: tuple[Pattern, ...]
    kernel_high: tuple[Pattern, ...]
    kernel_low: tuple[Pattern, ...]

    @model_validator(mode="after")
    def _check(self) -> SparsityLists:
        for name in ("end_to_end", "kernel_high", "kernel_low"):
            values = getattr(self, name)
            if len(set(values)) != len(values):
                raise ValueError(f"{name} names a pattern twice")
        return self

    @property
    def every(self) -> tuple[Sparsity, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.end_to_end, *self.kernel_high, *self.kernel_low)))


class Backends(_Section):
    dense: tuple[Backend, ...]
    sparse: tuple[Backend, ...]
    end_to_end: tuple[Literal["vllm", "auto", "cutlass"], ...] = ()
    """Dense variants that only tasks 4 and 5 have: `vllm` (the engine's own kernels, untouched), `auto` (the fastest at
    hand for each shape and M, behind our fused kernels), `cutlass` (the engine's own GEMM behind them)."""

    dense_end_to_end: tuple[Backend, ...] | None = None
    """Dense GEMM libraries that tasks 4 and 5 have too, beside `end_to_end`; those of the kernel tasks unless given."""

    sparse_end_to_end: tuple[Backend, ...] = ()
    """Sparse side of tasks 4 and 5, where it is another than that of the kernel tasks."""

    @model_validator(mode="after")
    def _has_a_dense_side(self) -> Backends:
        if not [name for name in self.engine_dense if name != "vllm"]:
            raise ValueError(
                "tasks 4 and 5 have no dense variant of ours to compare with; name one in end_to_end (auto) or "
                "dense_end_to_end"
            )
        return self

    @property
    def engine_dense(self) -> tuple[Backend, ...]:
        """Dense side of tasks 4 and 5, in the order of the tables."""
        return (*self.end_to_end, *(self.dense if self.dense_end_to_end is None else self.dense_end_to_end))

    @property
    def engine_sparse(self) -> tuple[Backend, ...]:
        """Sparse side of tasks 4 and 5."""
        return self.sparse_end_to_end or self.sparse

    @property
    def every_sparse(self) -> tuple[Backend, ...]:
        return tuple(dict.fromkeys((*self.sparse, *self.engine_sparse)))

    @property
    def every(self) -> tuple[Backend, ...]:
        """All of them, each once."""
        return tuple(dict.fromkeys((*self.dense, *self.every_sparse, *self.engine_dense)))


class Vllm(_Section):
    """How the vLLM engine is started."""

    tensor_parallel_size: Positive = 1
    together: Positive | None = None
    """Variants held on the GPU side by side, so that their steps can be interleaved. None: as many as fit."""


class Profile(_Section):
    """One set of cells to measure."""

    description: str
    models: Annotated[tuple[str, ...], Field(min_length=1)]
    source: Source
    seed: int = 0
    dtypes: Annotated[tuple[QuantisedDType, ...], Field(min_length=1)]
    sparsity: SparsityLists
    backends: Backends
    engine: EngineName
    vllm: Vllm = Vllm()
    convert: Convert = Convert()
    tune: Tune
    prefill: Prefill
    decode: Decode
    kernel: Kernel
    linear: Linear | None = None
    step_profiles: StepProfiles = StepProfiles()
    calibrate: Calibrate = Calibrate()

    @property
    def types(self) -> tuple[DType, ...]:
        """All types that anything is measured in: the 8-bit ones, then the 16-bit ones of the kernel tasks."""
        return (*self.dtypes, *self.kernel.float_dtypes)

    def only(self, names: Sequence[str]) -> Profile:
        """This profile in some of its types alone, 16-bit ones included: what is not named is not run.

        Parts of a profile thus share no cell of a type: a 16-bit type is measured in the part that names it.

        Raises ConfigError when a name is none of its types, or none is an 8-bit type, which every profile needs.
        """
        for name in names:
            if name not in self.types:
                raise ConfigError(f"--types: {name!r} is no type of this profile; it has {', '.join(self.types)}")
        dtypes = tuple(dtype for dtype in self.dtypes if dtype in names)
        if not dtypes:
            raise ConfigError(f"--types: name at least one 8-bit type of this profile: {', '.join(self.dtypes)}")
        floats = tuple(dtype for dtype in self.kernel.float_dtypes if dtype in names)
        kernel = self.kernel.model_copy(update={"float_dtypes": floats})
        return self.model_copy(update={"dtypes": dtypes, "kernel": kernel})

    @property
    def on_gpu(self) -> bool:
        """True when any of its backends runs on a GPU."""
        return any(not name.startswith("cpu_") for name in self.backends.every)


class Bench(_Section):
    """A whole, validated `bench.yaml`."""

    version: Literal[1]
    paths: Paths = Paths()
    models: dict[str, Model]
    profiles: dict[str, Profile]

    @model_validator(mode="after")
    def _check(self) -> Bench:
        for name in self.models:
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9.-]*", name):
                raise ValueError(f"model name {name!r}: letters, digits, dots and dashes only (it names files)")
        for name, profile in self.profiles.items():
            _check_profile(name, profile, self.models)
        return self

    def profile(self, name: str) -> Profile:
        """The named profile. Raises ConfigError listing those that exist."""
        if name not in self.profiles:
            raise ConfigError(f"unknown profile {name!r}; bench.yaml has: {', '.join(self.profiles)}")
        return self.profiles[name]


def _check_profile(name: str, profile: Profile, models: dict[str, Model]) -> None:
    for model_name in profile.models:
        if model_name not in models:
            raise ValueError(
                f"profiles.{name}.models: unknown model {model_name!r}; the catalogue has: {', '.join(models)}"
            )
        for phase, asked, measured in (
            ("prefill", profile.step_profiles.prefill_m, profile.prefill.m),
            ("decode", profile.step_profiles.decode_m, profile.decode.m),
        ):
            extra = sorted(set(asked) - set(measured))
            if extra:
                raise ValueError(f"profiles.{name}.step_profiles.{phase}_m: {extra[0]} is not in {phase}.m")
        limit = models[model_name].max_positions
        decode = profile.decode.prompt_len + profile.decode.output_len
        prefill = max((min(m, profile.prefill.prompt_cap) for m in profile.prefill.m), default=0) + 1
        for key, need in (("prefill.m", prefill), ("decode.output_len", decode)):
            if need > limit:
                raise ValueError(
                    f"profiles.{name}.{key}: sequences of {need} tokens, but {model_name} has {limit} positions"
                )
