"""Where the time of one engine step goes: its GPU kernels by category, and the work that each has to do at least.

The engine hands over a `StepProfile`; `step_rows` makes the records of it. Work is stated in operations and bytes, not
in time: the rates of this machine are measured later (task 10), and the report puts the two together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from slidesparse.config import Model
from slidesparse.dtypes import DType
from slidesparse.kernels.bitnet_reference import floor_bytes
from slidesparse.measure import step_categories as categories
from slidesparse.measure.step_categories import CATEGORIES, GROUPS, IDLE, category_of
from slidesparse.pattern import Sparsity
from slidesparse.plan import ThroughputCell
from slidesparse.rows import StepRow

SHOWN = 6
"""Kernels of a category that its row names."""
LONGEST_NAME = 120
BF16 = 2
"""Bytes of an activation, of a key or a value."""


@dataclass(frozen=True)
class KernelTime:
    """All launches of one kernel in one step. `us`: time in which it, and none that started earlier, was running."""

    name: str
    us: float
    calls: int


@dataclass(frozen=True)
class KernelSpan:
    """One launch, as a profiler records it; any origin of time."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True)
class StepProfile:
    """One engine step on one GPU. `wall_us`: from its begin to its end, the profiler on."""

    kernels: tuple[KernelTime, ...]
    wall_us: float

    @property
    def busy_us(self) -> float:
        """Time in which any kernel ran."""
        return sum(kernel.us for kernel in self.kernels)

    @classmethod
    def of(cls, spans: Iterable[KernelSpan], wall_us: float) -> StepProfile:
        """Of the launches of one step, copies and memsets included.

        Where launches overlap (other streams; programmatic dependent launch lets a kernel start and wait for the one
        before), that time counts for the one that started first: so the kernels' times add up to `busy_us`.
        """
        times: dict[str, tuple[float, int]] = {}
        covered = float("-inf")
        for span in sorted(spans, key=lambda span: (span.start_us, span.end_us)):
            own = max(0.0, span.end_us - max(span.start_us, covered))
            covered = max(covered, span.end_us)
            us, calls = times.get(span.name, (0.0, 0))
            times[span.name] = us + own, calls + 1
        return cls(tuple(KernelTime(name, us, calls) for name, (us, calls) in times.items()), wall_us)


def by_category(kernels: Iterable[KernelTime]) -> dict[str, list[KernelTime]]:
    """Kernels of each category but `IDLE`, the longest first; a category without any has an empty list."""
    found: dict[str, list[KernelTime]] = {name: [] for name in CATEGORIES if name != IDLE}
    for kernel in sorted(kernels, key=lambda kernel: (-kernel.us, kernel.name)):
        found[category_of(kernel.name)].append(kernel)
    return found


def step_rows(
    profile: StepProfile,
    cell: ThroughputCell,
    model: Model,
    context: int,
    columns: Mapping[str, Any],
    tensor_parallel: int = 1,
) -> list[StepRow]:
    """Records of one profiled step, a row for every category, for `ResultTree.step_profile(cell.model, cell.dtype)`.

    Args:
        profile: of one step of the cell, on one rank: S sequences of P tokens (prefill) or of 1 token (decode).
        model: the catalogue entry of `cell.model`.
        context: tokens that each sequence attends to in this step, its new ones included: P in prefill.
        columns: `fingerprint`, `run_id`, `time_utc`, `engine` and `path` of the rows.
        tensor_parallel: ranks that share the model.

    Kernel times and idle time add up to `step_us`.
    """
    step_us = max(profile.wall_us, profile.busy_us)
    work = _work(cell, model, context, tensor_parallel)
    times: dict[str, tuple[float, list[KernelTime]]] = {
        name: (sum(kernel.us for kernel in kernels), kernels) for name, kernels in by_category(profile.kernels).items()
    }
    times[IDLE] = step_us - profile.busy_us, []
    return [
        StepRow(
            phase=cell.phase,
            M=cell.m,
            backend=cell.variant.backend,
            sparsity=str(cell.variant.sparsity or ""),
            category=name,
            us=us,
            share=us / step_us if step_us else 0.0,
            calls=sum(kernel.calls for kernel in kernels),
            kernels="; ".join(f"{_short(k.name)}: {k.us:.1f} us in {k.calls}" for k in kernels[:SHOWN]),
            kinds=len(kernels),
            step_us=step_us,
            busy_us=profile.busy_us,
            **work.get(GROUPS[name], {}),
            **columns,
        )
        for name, (us, kernels) in ((name, times[name]) for name in CATEGORIES)
    ]


def _short(name: str) -> str:
    line = " ".join(name.split()).replace(";", ",")
    return line if len(line) <= LONGEST_NAME else f"{line[: LONGEST_NAME - 1]}…"


def _work(cell: ThroughputCell, model: Model, context: int, ranks: int) -> dict[str, dict[str, Any]]:
    """Columns that state the least work of each group, of one rank.

    b = 2 bytes a bfloat16, S sequences of T tokens in this step, M = S T, all of `num_hidden_layers` blocks:

        products        of every linear; the output layer's once, of S rows (a sequence's last token)
        between         `bitnet_reference.floor_bytes`: a norm or gate and quantise (+ lift) in one kernel before every
                        product, scales and bias in the product itself; the final norm reads 2 M K, writes M K values
        attention       operations: 4 heads d (T context - T (T - 1) / 2) a sequence, the causal half alone;
                        bytes: queries and outputs, keys and values of the context once
        rotary, cache   reads q, k and v, writes q and the cache, in one kernel
    """
    config, tokens = model.config, cell.prompt_len if cell.phase == "prefill" else 1
    sequences, blocks = cell.sequences, int(config["num_hidden_layers"])
    m, sparsity, hidden = sequences * tokens, cell.variant.sparsity, int(config["hidden_size"])
    shapes = _shapes_of_rank(model, ranks)
    width, (qkv, _) = shapes["o"][1], shapes["qkv"]
    """Columns of the attention's output, and of q, k and v together, on this rank."""
    pairs = tokens * context - tokens * (tokens - 1) // 2
    attention_bytes = BF16 * (2 * tokens * width + context * (qkv - width))
    products = "; ".join(f"{name} {n}x{k}" for name, (n, k) in shapes.items())
    head = f"lm_head {int(config['vocab_size']) // ranks}x{hidden}"
    return {
        categories.LINEAR: {"layers": products, "blocks": blocks, "rows": m, "operands": cell.dtype.value},
        categories.HEAD: {"layers": head, "blocks": 1, "rows": sequences, "operands": DType.BF16.value},
        categories.BETWEEN: {"bytes_moved": _between_bytes(shapes, m, hidden, blocks, sparsity)},
        categories.ATTENTION: {
            "operations": blocks * sequences * 4 * width * pairs,
            "bytes_moved": blocks * sequences * attention_bytes,
            "operands": DType.BF16.value,
        },
        categories.CACHE: {"bytes_moved": blocks * m * 2 * BF16 * qkv},
    }


def _shapes_of_rank(model: Model, ranks: int) -> dict[str, tuple[int, int]]:
    """(N, K) of a block's linears on one rank: qkv and gate_up are divided along N, o and down along K."""
    return {
        name: (n // ranks, k) if name in ("qkv", "gate_up") else (n, k // ranks)
        for name, (n, k) in model.linear_shapes().items()
    }


def _between_bytes(
    shapes: Mapping[str, tuple[int, int]], m: int, hidden: int, blocks: int, sparsity: Sparsity | None
) -> int:
    add = floor_bytes("add", m, hidden, sparsity)
    block = (
        2 * add + floor_bytes("norm", m, shapes["o"][1], sparsity) + floor_bytes("gate", m, shapes["down"][1], sparsity)
    )
    first = floor_bytes("norm", m, hidden, sparsity) - add
    """The first block has no residual to add yet."""
    return blocks * block + first + 3 * BF16 * m * hidden
