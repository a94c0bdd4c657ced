"""Result rows: one schema a table. A field's place in its class is its column's place in the file.

The leading columns of `PrefillRow`, `DecodeRow` and the kernel rows are those of the published result
tree; our own follow. In every table a failed or skipped cell has -1 in its measured columns and says why
in `status` and `reason`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict

Status = Literal["ok", "failed", "skipped"]
Verified = Literal["exact", "within_bound", "failed", "not_checked"]
BEST = 3
"""Algorithms listed in one kernel row."""
UNMEASURED = -1.0


class Row(BaseModel):
    """Columns that every table ends with."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    KEY: ClassVar[tuple[str, ...]]
    """Columns that identify a cell inside its file."""

    status: Status = "ok"
    reason: str = ""
    fingerprint: str
    """Hash over everything that decides the value: a row with another one does not count as done."""
    run_id: str
    time_utc: str

    @classmethod
    def columns(cls) -> list[str]:
        """Field names: those of the most derived class first, so that the published columns lead."""
        names: dict[str, None] = {}
        for base in cls.__mro__:
            if issubclass(base, Row):
                names.update(dict.fromkeys(name for name in base.__annotations__ if name in cls.model_fields))
        return list(names)


class PrepareRow(Row):
    """One quantised checkpoint. Bytes and seconds are this cell's own."""

    KEY = ("model", "dtype")

    model: str
    dtype: str
    source: str = ""
    """`hub REPO@COMMIT`, `local FOLDER` or `synthetic seed N`."""
    quantization: str = ""
    parameters: int = -1
    linear_parameters: int = -1
    linear_layers: int = -1
    seconds: float = UNMEASURED
    bytes_read: int = -1
    bytes_written: int = -1
    disk_read_mib_s: float = UNMEASURED
    """Measured on this run's data folder; with bytes it gives the floor."""
    disk_write_mib_s: float = UNMEASURED
    floor_s: float = UNMEASURED
    """bytes_read / disk read speed + bytes_written / disk write speed."""
    peak_rss_mib: float = UNMEASURED
    weight_error_rel: float = UNMEASURED
    """||W - dequantised|| / ||W|| over all linear layers (Frobenius)."""
    folder: str = ""


class ConvertRow(Row):
    """One pruned checkpoint; its layers are in `ConvertLayerRow`s."""

    KEY = ("model", "dtype", "sparsity")

    model: str
    dtype: str
    sparsity: str
    method: str = ""
    layout: str = ""
    linear_layers: int = -1
    weights: int = -1
    natural_zeros: int = -1
    weights_removed: int = -1
    """Non-zero codes set to zero by the pattern."""
    removed_fraction: float = UNMEASURED
    energy_removed: float = UNMEASURED
    """Share of sum(W^2), of the original BF16 weights that had a non-zero code, that was removed."""
    groups: int = -1
    groups_unpruned: int = -1
    """Groups that had enough zeros of their own."""
    verified: Verified = "not_checked"
    check: str = ""
    seconds: float = UNMEASURED
    """Wall time of this variant's share: variants of one pass are divided by bytes written."""
    bytes_read: int = -1
    bytes_written: int = -1
    disk_read_mib_s: float = UNMEASURED
    disk_write_mib_s: float = UNMEASURED
    floor_s: float = UNMEASURED
    peak_rss_mib: float = UNMEASURED
    folder: str = ""


class ConvertLayerRow(Row):
    """One linear layer under one pattern."""

    KEY = ("layer",)

    layer: str
    n: int
    k: int
    lifted_k: int
    natural_zeros: int
    weights_removed: int
    removed_fraction: float
    energy_removed: float
    groups: int
    groups_unpruned: int
    verified: Verified
    check: str


class TimedRow(Row):
    """Statistics, machine state and trust of a timed row."""

    verified: Verified = "not_checked"
    check: str = ""
    """How it was checked: the reference, the bound, the figure seen."""
    path: str = ""
    """The code path that really ran."""
    emulation: bool = False
    """True on a CPU: the number says nothing about sparse tensor cores."""
    samples: int = 0
    p20: float = UNMEASURED
    p80: float = UNMEASURED
    ci_low: float = UNMEASURED
    """95 % interval of the row's main figure (same unit)."""
    ci_high: float = UNMEASURED
    ci_rel: float = UNMEASURED
    stop: str = ""
    """`interval`: narrow enough; `time cap`; `sample cap`."""
    clock_mhz: float = UNMEASURED
    power_w: float = UNMEASURED
    temperature_c: float = UNMEASURED
    throttle: str = ""


class TuneRow(TimedRow):
    """One candidate for one operation at one size. p20, p80 and the interval are of `lat_us`."""

    KEY = ("operation", "backend", "sparsity", "M", "N", "K", "algorithm")

    granularity: str
    operation: str
    backend: str
    sparsity: str = ""
    M: int
    N: int
    K: int
    """The K that the operation sees: lifted for sparse_gemm, unlifted otherwise."""
    algorithm: str
    alg_id: int
    config: str = ""
    lat_us: float = UNMEASURED
    candidates: int = -1
    """Candidates of the cell. Where there are many, only those that led a first, short look have a row."""
    bytes_moved: int = -1
    """Activation kernels: each input byte read once, each output byte written once."""
    copy_us: float = UNMEASURED
    """A copy of as many bytes (read plus written), in the same rounds: what memory allows at this size."""
    winner: bool = False


class ThroughputRow(TimedRow):
    """What prefill and decode share beyond the published columns. The interval is of `tokens_per_s`."""

    model: str
    dtype: str
    backend: str
    sparsity: str = ""
    engine: str = ""
    passes: int = 0
    """Times that the whole cell (all its prompts) was run and timed."""
    step_ms: float = UNMEASURED
    """Median duration of one engine step (a prefill step, or one decode step of all sequences)."""
    tokens_per_step: int = -1
    """As counted in the engine, not as asked for."""
    output_tokens_per_s: float = UNMEASURED
    """Generated tokens alone."""
    steady_tokens_per_s: float = UNMEASURED
    """Decode: generated tokens over decode-step time, prefill left out. Prefill: prompt tokens alone."""
    greedy_tokens: str = ""
    """What the engine says after four fixed prompts: tokens of each, `1 2 3 / 4 5 6`."""
    over_stock: float = UNMEASURED
    """Median of the paired ratios: seconds of a step with the engine's own kernels / with this row's, interleaved."""
    over_stock_low: float = UNMEASURED
    over_stock_high: float = UNMEASURED
    over_dense: float = UNMEASURED
    """The same against our first dense variant of the profile."""
    over_dense_low: float = UNMEASURED
    over_dense_high: float = UNMEASURED
    host_bound: bool = False
    """A profiled step spends less than 0.9 of its time in GPU kernels. Steps that were not profiled are not marked."""
    startup_s: float = UNMEASURED
    """From the start of the engine's process to a model in memory; compilation and graph capture not counted."""
    compile_s: float = UNMEASURED
    """Compilation and graph capture."""
    warmup_s: float = UNMEASURED
    measure_s: float = UNMEASURED
    peak_rss_mib: float = UNMEASURED
    """Of an engine in the process that measures; -1 for one in a process of its own."""
    tuning: str = ""
    """Look-ups of the tuning store: `hits 8, nearest 2, missed 0, stale 0`."""


class PrefillRow(ThroughputRow):
    """Published columns of a prefill cell, then ours. tokens_per_s counts prompt and output tokens, as published."""

    KEY = ("M_prefill",)

    M_prefill: int
    prompt_len: int
    max_num_seqs: int
    num_prompts: int
    N_prefill: int
    """Engine steps of one pass."""
    requests_per_s: float = UNMEASURED
    tokens_per_s: float = UNMEASURED
    elapsed_time_s: float = UNMEASURED
    """Of one pass: its steps by their median. `samples` are bursts of steps (prefill) or batches (decode)."""


class DecodeRow(ThroughputRow):
    """Published columns of a decode cell, then ours. tokens_per_s counts prompt and output tokens, as published."""

    KEY = ("M_decode",)

    M_decode: int
    prompt_len: int
    max_num_seqs: int
    num_prompts: int
    N_decode: int
    """Generated tokens a sequence."""
    output_len: int
    requests_per_s: float = UNMEASURED
    tokens_per_s: float = UNMEASURED
    elapsed_time_s: float = UNMEASURED
    graph_ms: float = UNMEASURED
    """GPU time of a step's CUDA graph, which is the whole model but for logits and sampling: what is left of a step
    when the host is fast enough. Median over blocks of 32 steps of their medians."""
    graph_over_stock: float = UNMEASURED
    """Median of the paired ratios of that time: the engine's own kernels / this row's."""
    graph_over_stock_low: float = UNMEASURED
    graph_over_stock_high: float = UNMEASURED


class KernelRow(TimedRow):
    """Published columns of a kernel point, then ours. Statistics are of `lat_us_1`.

    K is the K of the GEMM (K' for sparse). TOPS count 2*M*N*K as published files do, so a sparse row's
    figure counts lifted zeros too; compare latencies, not TOPS, across patterns.
    """

    KEY = ("M", "N", "K")

    M: int
    N: int
    K: int
    alg_count: int = 0
    tops_1: float = UNMEASURED
    lat_us_1: float = UNMEASURED
    alg_id_1: int = -1
    split_k_1: int = -1
    workspace_1: int = -1
    tops_2: float = UNMEASURED
    lat_us_2: float = UNMEASURED
    alg_id_2: int = -1
    split_k_2: int = -1
    workspace_2: int = -1
    tops_3: float = UNMEASURED
    lat_us_3: float = UNMEASURED
    alg_id_3: int = -1
    split_k_3: int = -1
    workspace_3: int = -1
    layer: str = ""
    K_model: int
    """K before lifting."""
    backend: str
    sparsity: str = ""
    algorithm: str = ""
    data: str = ""
    """`model` (the checkpoint's own weights) or `random`."""
    dense_us: float = UNMEASURED
    """Median latency of the dense twin, interleaved with this row's samples (sparse rows)."""
    dense_path: str = ""
    speedup: float = UNMEASURED
    """Median of the paired ratios dense / sparse, with its 95 % interval."""
    speedup_low: float = UNMEASURED
    speedup_high: float = UNMEASURED
    speedup_bound: float = UNMEASURED
    """L/(L-2)."""
    two_kernels_us: float = UNMEASURED
    """For a GEMM with its epilogue: the best library sparse GEMM with a second kernel for it, interleaved."""
    two_kernels_path: str = ""
    over_two_kernels: float = UNMEASURED
    """Median of the paired ratios two kernels / this one."""
    over_two_kernels_low: float = UNMEASURED
    over_two_kernels_high: float = UNMEASURED


class KernelDenseRow(KernelRow):
    """The dense file of the published tree has no split-K columns."""

    @classmethod
    def columns(cls) -> list[str]:
        return [name for name in super().columns() if not name.startswith("split_k")]


class LinearRow(TimedRow):
    """All merged linears of a block, from bfloat16 x to bfloat16 y, one after the other. Statistics are of `lat_us`.

    Three samples side by side: our pipeline, the best dense linear, and the pipeline of the reference
    implementation (its structure, our code): quantise + lift in two passes, bf16 out of the GEMM, dequantise + bias.
    """

    KEY = ("backend", "sparsity", "M")

    backend: str
    sparsity: str
    M: int
    layers: str = ""
    """Their names and shapes N x K."""
    data: str = ""
    lat_us: float = UNMEASURED
    quantise_us: float = UNMEASURED
    """Quantise + lift alone, all layers (as tuned; not interleaved)."""
    gemm_us: float = UNMEASURED
    dequantise_us: float = UNMEASURED
    dense_us: float = UNMEASURED
    dense_path: str = ""
    speedup: float = UNMEASURED
    """Median of the paired ratios dense / sparse, with its 95 % interval."""
    speedup_low: float = UNMEASURED
    speedup_high: float = UNMEASURED
    speedup_bound: float = UNMEASURED
    reference_us: float = UNMEASURED
    reference_path: str = ""
    over_reference: float = UNMEASURED
    """Median of the paired ratios reference pipeline / ours, with its 95 % interval."""
    over_reference_low: float = UNMEASURED
    over_reference_high: float = UNMEASURED


class CalibrationRow(TimedRow):
    """One rate that this machine reaches. Statistics are of `rate`."""

    KEY = ("quantity", "dtype", "sparse", "loads")

    quantity: str
    """`copy` or `tensor cores`."""
    dtype: str = ""
    sparse: bool = False
    loads: bool = False
    """Measured while a stream of loads into shared memory went on."""
    rate: float = UNMEASURED
    """copy: GB/s, bytes read plus bytes written. Tensor cores: TOPS, 2*M*N*K with K as if the operand were dense."""
    unit: str = ""
    load_rate: float = UNMEASURED
    """GB/s of those loads, all multiprocessors together."""
    instruction: str = ""
    """What was issued, e.g. `wgmma.mma_async.sp m64n256k64, A and B in shared memory`."""


class StepRow(Row):
    """One category of GPU kernels in one profiled engine step; the categories' times add up to `step_us`.

    What the work needs at least is stated as operations and bytes, once for each group of categories (the same in all
    rows of a group): `measure/step_categories.py` has both lists, the report the rates.
    """

    KEY = ("phase", "M", "backend", "sparsity", "category")

    phase: str
    M: int
    backend: str
    sparsity: str = ""
    category: str
    us: float = UNMEASURED
    share: float = UNMEASURED
    """Of `step_us`."""
    calls: int = -1
    """Kernel launches."""
    kinds: int = -1
    """Different kernels."""
    kernels: str = ""
    """The longest ones: `NAME: 12.3 us in 30; ...`."""
    step_us: float = UNMEASURED
    """The whole step while the profiler was on, which may slow it down: `step_ms` of the throughput row is without."""
    busy_us: float = UNMEASURED
    """Time of it in which any kernel ran."""
    layers: str = ""
    """Products: names and shapes N x K of one block, of this rank: `qkv 3840x2560; ...`."""
    blocks: int = -1
    rows: int = -1
    """M of these products."""
    operands: str = ""
    """Type of the operands of the products, or of the attention's."""
    operations: int = -1
    """Attention: multiplications and additions. -1: none counted."""
    bytes_moved: int = -1
    """Bytes read and written at least. -1: products, whose bytes follow from `layers`, or no bound is stated."""
    engine: str = ""
    path: str = ""


_ROW_TYPES: tuple[type[Row], ...] = (
    PrepareRow, ConvertRow, ConvertLayerRow, TuneRow, PrefillRow, DecodeRow, KernelRow, LinearRow, CalibrationRow,
    StepRow,
)  # fmt: skip
FLAG_COLUMNS = frozenset(
    name for row in _ROW_TYPES for name, field in row.model_fields.items() if field.annotation is bool
)
TEXT_COLUMNS = frozenset(
    name for row in _ROW_TYPES for name, field in row.model_fields.items() if field.annotation not in (int, float, bool)
)
