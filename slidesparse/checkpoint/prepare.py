"""Task 1: base model -> INT8 and FP8 checkpoints (W8A8, compressed-tensors) that any engine loads.

One pass over the BF16 weights makes all data types. Everything but the weights of the linear layers is kept
as it is: embeddings, lm_head, norms (BitNet's two sub-norms too), biases.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from slidesparse import __version__, records
from slidesparse.checkpoint import disk, metadata, source
from slidesparse.checkpoint.checkpoint import CONFIG, Checkpoint
from slidesparse.checkpoint.draft import Draft
from slidesparse.checkpoint.pipeline import Background, read_ahead, side_by_side, write_behind
from slidesparse.checkpoint.quantize import Quantised, absmax_per_channel, check_finite, ternary, ternary_as_e4m3
from slidesparse.config import Model
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, SourceError
from slidesparse.model_size import checkpoint_bytes, parameter_count
from slidesparse.plan import PrepareCell, Task, fingerprint
from slidesparse.progress import track
from slidesparse.rows import PrepareRow
from slidesparse.run import Outcome, Run


@dataclass
class _Target:
    """One checkpoint to make."""

    cell: PrepareCell
    draft: Draft
    bytes_read: int = 0
    sums: list[tuple[float, float]] = field(default_factory=list)
    """(squared error, squared weight) of every layer."""


def run_task(run: Run, task: Task) -> Outcome:
    """Make every checkpoint of the task that is not there yet.

    Raises:
        DiskError: disk full or read-only; shards finished so far are kept and used by the next run.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, PrepareCell)]
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        try:
            started = time.monotonic()
            base = source.obtain(run.plan, model, run.quiet)
            seconds = time.monotonic() - started
            if seconds > 1:
                outcome.notes.append(f"{model} from {base.provenance} in {seconds:.1f} s")
            _prepare(run, own, base, outcome)
        except (SourceError, CheckpointError) as error:
            run.log.error("%s: %s", model, error)
            records.append(run.tree.prepare, [_failed(run, cell, str(error)) for cell in own])
            outcome.failed += len(own)
            outcome.notes.append(str(error))
    return outcome


def recipe(run: Run, cell: PrepareCell, base: source.Base) -> str:
    """Everything that decides a prepared checkpoint."""
    method = run.plan.bench.models[cell.model].quantization
    return fingerprint(cell, method, base.provenance, base.checkpoint.fingerprint(), __version__)


def _prepare(run: Run, cells: list[PrepareCell], base: source.Base, outcome: Outcome) -> None:
    model = run.plan.bench.models[cells[0].model]
    targets = []
    for cell in cells:
        draft = Draft(
            run.plan.prepared_folder(cell.model, cell.dtype), base.checkpoint.layer_count, recipe(run, cell, base)
        )
        key: dict[str, object] = {"model": cell.model, "dtype": cell.dtype.value}
        done = records.is_done(run.tree.prepare, PrepareRow, key, draft.recipe)
        if done and draft.is_complete():
            outcome.ok += 1
            outcome.done_before += 1
        else:
            targets.append(_Target(cell, draft))
    if not targets:
        return
    missing = sum(len(target.draft.missing()) for target in targets)
    sizes = checkpoint_bytes(model)
    need = missing * sizes.prepared // base.checkpoint.layer_count
    folder = targets[0].draft.folder.parent
    disk.require(folder, need, f"preparing {len(targets)} checkpoints of {cells[0].model}")
    run.log.info("%s: %d checkpoints, %.0f MiB to write", cells[0].model, len(targets), need / disk.MIB)
    speed = disk.measure(folder, need + sizes.base)
    started = time.monotonic()
    _make(run, targets, base, model)
    seconds = time.monotonic() - started
    rows = _rows(run, targets, base, model, seconds, speed)
    records.append(run.tree.prepare, rows)
    outcome.ok += len(rows)
    read, written = sum(row.bytes_read for row in rows), sum(row.bytes_written for row in rows)
    outcome.notes.append(
        f"{cells[0].model}: {written / disk.MIB:.0f} MiB written in {seconds:.1f} s, disk floor "
        f"{speed.floor_s(read, written):.1f} s, peak memory {disk.peak_rss_mib():.0f} MiB"
    )


def _make(run: Run, targets: list[_Target], base: source.Base, model: Model) -> None:
    """One pass over the layers. Every file of a target is there when this returns."""
    checkpoint = base.checkpoint
    for target in targets:
        target.draft.begin()
    work = {layer: [t for t in targets if t.draft.facts(layer) is None] for layer in range(checkpoint.layer_count)}
    layers, linears = checkpoint.layers(), set(checkpoint.linears())
    facts = {"base": checkpoint.fingerprint(), "source": str(base.provenance)}
    todo = [layer for layer, needing in work.items() if needing]

    def load(layer: int) -> dict[str, torch.Tensor]:
        return {name: checkpoint.load(name) for name in layers[layer]}

    def quantise(layer: int, tensors: dict[str, torch.Tensor]) -> None:
        for target, out, sums in _quantise_layer(work[layer], tensors, model, linears):
            target.draft.write(writer, layer, out, facts | {"sums": sums})
        bar.advance(1, f"layer {layer}")

    title = f"{targets[0].cell.model}: quantising"
    with track(title, len(todo) + 1, run.quiet) as bar, write_behind() as writer, side_by_side() as workers:
        _rest(targets, checkpoint, writer, facts)
        bar.advance(1, "embeddings")
        for layer, tensors in read_ahead(todo, load):
            size = sum(tensor.nbytes for tensor in tensors.values())
            for target in work[layer]:
                target.bytes_read += size // len(work[layer])
            workers.put(size, partial(quantise, layer, tensors))
    for target in targets[1:]:
        target.draft.link_rest(targets[0].draft.path(None))
    for target in targets:
        for layer in range(checkpoint.layer_count):
            made = target.draft.facts(layer)
            assert made is not None, f"{target.draft.path(layer)}: written, yet not there"
            target.sums.append((made["sums"][0], made["sums"][1]))
        source.copy_side_files(checkpoint.folder, target.draft.folder)
        where = str(checkpoint.folder / CONFIG)
        target.draft.finish(metadata.prepared_config(checkpoint.config, target.cell.dtype, where))


def _rest(targets: list[_Target], base: Checkpoint, writer: Background, facts: dict[str, Any]) -> None:
    """The first target's shard of embeddings and the like: a link where the base has such a shard of ours."""
    first, names = targets[0], base.rest()
    holders = [shard for shard in base.shards.values() if set(shard.tensors) == set(names)]
    if holders and holders[0].own is not None:
        first.draft.link_rest(holders[0].path)
    elif first.draft.facts(None) is None:
        tensors = {name: base.load(name) for name in names}
        for name, tensor in tensors.items():
            _check_finite(name, tensor)
        first.bytes_read += sum(tensor.nbytes for tensor in tensors.values())
        first.draft.write(writer, None, tensors, facts)


def _quantise_layer(
    targets: list[_Target], tensors: dict[str, torch.Tensor], model: Model, linears: set[str]
) -> list[tuple[_Target, dict[str, torch.Tensor], tuple[float, float]]]:
    """The layer's tensors for every target, with the sums of squared errors and squared weights."""
    out: dict[DType, dict[str, torch.Tensor]] = {target.cell.dtype: {} for target in targets}
    sums = dict.fromkeys(out, (0.0, 0.0))
    for name, tensor in tensors.items():
        module, _, parameter = name.rpartition(".")
        if module not in linears or parameter != "weight":
            _check_finite(name, tensor)
            for made in out.values():
                made[name] = tensor
            continue
        for dtype, quantised in _quantise(name, tensor, model, list(out)).items():
            out[dtype][name] = torch.from_numpy(quantised.codes).view(dtype.torch)
            out[dtype][f"{module}.weight_scale"] = torch.from_numpy(quantised.scale)
            error, energy = sums[dtype]
            sums[dtype] = (error + quantised.error, energy + quantised.energy)
    return [(target, out[target.cell.dtype], sums[target.cell.dtype]) for target in targets]


def _quantise(name: str, weight: torch.Tensor, model: Model, dtypes: list[DType]) -> dict[DType, Quantised]:
    bits = weight.view(torch.uint16).numpy()
    if model.quantization == "absmax_per_channel":
        return {dtype: absmax_per_channel(bits, dtype, name) for dtype in dtypes}
    made = ternary(bits, name)
    fp8 = Quantised(ternary_as_e4m3(made.codes), made.scale, made.error, made.energy)
    return {dtype: made if dtype is DType.INT8 else fp8 for dtype in dtypes}


def _check_finite(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype is torch.bfloat16:
        check_finite(tensor.view(torch.uint16).view(-1, tensor.shape[-1]).numpy(), name)


def _rows(
    run: Run, targets: list[_Target], base: source.Base, model: Model, seconds: float, speed: disk.DiskSpeed
) -> list[PrepareRow]:
    count = parameter_count(model)
    written = sum(target.draft.bytes_written for target in targets)
    rows = []
    for target in targets:
        error, energy = (sum(values) for values in zip(*target.sums, strict=True))
        share = target.draft.bytes_written / written if written else 1 / len(targets)
        rows.append(
            PrepareRow(
                model=target.cell.model,
                dtype=target.cell.dtype.value,
                source=str(base.provenance),
                quantization=model.quantization,
                parameters=count.total,
                linear_parameters=count.linear,
                linear_layers=len(base.checkpoint.linears()),
                seconds=round(seconds * share, 3),
                bytes_read=target.bytes_read,
                bytes_written=target.draft.bytes_written,
                disk_read_mib_s=round(speed.read_mib_s, 1),
                disk_write_mib_s=round(speed.write_mib_s, 1),
                floor_s=round(speed.floor_s(target.bytes_read, target.draft.bytes_written), 3),
                peak_rss_mib=round(disk.peak_rss_mib(), 1),
                weight_error_rel=round((error / energy) ** 0.5, 6) if energy else 0.0,
                folder=disk.relative(target.draft.folder, run.plan.data),
                fingerprint=target.draft.recipe,
                **run.stamp(),
            )
        )
    return rows


def _failed(run: Run, cell: PrepareCell, reason: str) -> PrepareRow:
    return PrepareRow(
        model=cell.model,
        dtype=cell.dtype.value,
        status="failed",
        reason=reason,
        fingerprint=fingerprint(cell, "failed"),
        **run.stamp(),
    )
