"""Task 2: prune prepared checkpoints to Z:L, prove for every layer that lifting loses nothing, write them.

All data types and patterns of a model are made in one pass over its layers. A layer whose proof fails ends
its variant: the row says which and why, and its folder never becomes a checkpoint.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch

from slidesparse import __version__, records
from slidesparse.checkpoint import disk, families, metadata, source
from slidesparse.checkpoint.checkpoint import CONFIG, Checkpoint
from slidesparse.checkpoint.draft import Draft
from slidesparse.checkpoint.facts import LinearFacts, layer_row, share, sum_up
from slidesparse.checkpoint.lift import Codes
from slidesparse.checkpoint.pipeline import Background, read_ahead, side_by_side, write_behind
from slidesparse.checkpoint.proof import LosslessProof
from slidesparse.checkpoint.prune import Bf16Bits, prune
from slidesparse.checkpoint.section import Section
from slidesparse.config import Convert
from slidesparse.dtypes import DType
from slidesparse.errors import CheckpointError, SourceError, VerificationError
from slidesparse.model_size import checkpoint_bytes
from slidesparse.plan import ConvertCell, Task, fingerprint
from slidesparse.progress import track
from slidesparse.rows import ConvertRow, Verified
from slidesparse.run import Outcome, Run


@dataclass
class _Variant:
    """One converted checkpoint in the making."""

    cell: ConvertCell
    prepared: Checkpoint
    draft: Draft
    bytes_read: int = 0
    facts: list[LinearFacts] = field(default_factory=list)
    error: Exception | None = None


@dataclass(frozen=True)
class _Layer:
    """Inputs of one decoder layer: BF16 bits and codes by linear layer, all other tensors as they are."""

    weights: dict[str, Bf16Bits]
    codes: dict[DType, dict[str, Codes]]
    others: dict[DType, dict[str, torch.Tensor]]


def run_task(run: Run, task: Task) -> Outcome:
    """Make every converted checkpoint of the task that is not there yet.

    Raises:
        DiskError: disk full or read-only; shards finished so far are kept and used by the next run.
    """
    outcome = Outcome()
    cells = [cell for cell in task.cells if isinstance(cell, ConvertCell)]
    for model in dict.fromkeys(cell.model for cell in cells):
        own = [cell for cell in cells if cell.model == model]
        try:
            base = source.obtain(run.plan, model, run.quiet)
        except (SourceError, CheckpointError) as error:
            _record_failures(run, own, error, outcome)
            continue
        variants = []
        for dtype in dict.fromkeys(cell.dtype for cell in own):
            of_dtype = [cell for cell in own if cell.dtype is dtype]
            try:
                prepared = _open_prepared(run, of_dtype[0], base.checkpoint)
            except CheckpointError as error:
                _record_failures(run, of_dtype, error, outcome)
                continue
            variants += [_variant(run, cell, prepared, base) for cell in of_dtype]
        _convert(run, variants, base, outcome)
    return outcome


def _open_prepared(run: Run, cell: ConvertCell, base: Checkpoint) -> Checkpoint:
    folder = run.plan.prepared_folder(cell.model, cell.dtype)
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: no prepared checkpoint; run `slidesparse prepare` first")
    prepared = Checkpoint.open(folder)
    if prepared.dtype is not cell.dtype or prepared.section is not None:
        raise CheckpointError(
            f"{folder / CONFIG}: is no dense {cell.dtype.value} checkpoint; run `slidesparse prepare` again"
        )
    made_from = {(shard.own or {}).get("base") for shard in prepared.shards.values() if _holds_codes(shard.tensors)}
    if made_from != {base.fingerprint()}:
        raise CheckpointError(
            f"{folder}: was not made from {base.folder} as it is now; run `slidesparse prepare` again"
        )
    return prepared


def _holds_codes(tensors: Any) -> bool:
    return any(name.endswith(".weight_scale") for name in tensors)


def _variant(run: Run, cell: ConvertCell, prepared: Checkpoint, base: source.Base) -> _Variant:
    options, seed = run.plan.profile.convert, run.plan.profile.seed
    recipe = fingerprint(
        cell, options.method, options.layout, options.proof_tokens, seed,
        base.provenance, base.checkpoint.fingerprint(), prepared.fingerprint(), __version__,
    )  # fmt: skip
    folder = run.plan.converted_folder(cell.model, cell.dtype, cell.sparsity)
    return _Variant(cell, prepared, Draft(folder, prepared.layer_count, recipe))


def _convert(run: Run, variants: list[_Variant], base: source.Base, outcome: Outcome) -> None:
    pending = []
    for variant in variants:
        cell, draft = variant.cell, variant.draft
        key: dict[str, object] = {"model": cell.model, "dtype": cell.dtype.value, "sparsity": str(cell.sparsity)}
        done = records.is_done(run.tree.convert, ConvertRow, key, draft.recipe)
        if done and draft.is_complete():
            outcome.ok += 1
            outcome.done_before += 1
        else:
            pending.append(variant)
    if not pending:
        return
    need = _bytes_needed(run, pending)
    folder = pending[0].draft.folder.parent
    disk.require(folder, need, f"converting {pending[0].cell.model} to {len(pending)} checkpoints")
    run.log.info("%s: %d checkpoints, %.0f MiB to write", pending[0].cell.model, len(pending), need / disk.MIB)
    speed = disk.measure(folder, need)
    started = time.monotonic()
    _make(run, pending, base)
    seconds = time.monotonic() - started
    written = sum(variant.draft.bytes_written for variant in pending)
    read = sum(variant.bytes_read for variant in pending)
    for variant in pending:
        share = variant.draft.bytes_written / written if written else 1 / len(pending)
        _record(run, variant, seconds * share, speed, outcome)
    outcome.notes.append(
        f"{pending[0].cell.model}: {written / disk.MIB:.0f} MiB written in {seconds:.1f} s, disk floor "
        f"{speed.floor_s(read, written):.1f} s, peak memory {disk.peak_rss_mib():.0f} MiB"
    )


def _bytes_needed(run: Run, variants: list[_Variant]) -> int:
    """Of shards still to be made. Embeddings count only where they cannot be hard-linked."""
    total = 0
    for variant in variants:
        entry = run.plan.bench.models[variant.cell.model]
        lifted = run.plan.profile.convert.layout == "lifted"
        size = checkpoint_bytes(entry, variant.cell.sparsity if lifted else None).converted
        total += size * len(variant.draft.missing()) // variant.draft.layer_count
    return total


# -- the pass ------------------------------------------------------------------------------------------


def _make(run: Run, variants: list[_Variant], base: source.Base) -> None:
    """One pass over the layers. Variants without an error are checkpoints when this returns."""
    for variant in variants:
        variant.draft.begin()
    count = base.checkpoint.layer_count
    work = {layer: [v for v in variants if v.draft.facts(layer) is None] for layer in range(count)}
    todo = [layer for layer, needing in work.items() if needing]
    proof = LosslessProof(run.plan.profile.convert.proof_tokens)
    title = f"{variants[0].cell.model}: converting"
    total = sum(len(needing) for needing in work.values())

    def prune_layer(variant: _Variant, layer: int, inputs: _Layer) -> None:
        if variant.error is None:
            _prune_layer(run, variant, layer, inputs, proof, writer)
        bar.advance(1, f"layer {layer}, {variant.cell.sparsity}")

    with track(title, total, run.quiet) as bar, write_behind() as writer, side_by_side() as workers:
        for layer, inputs in read_ahead(todo, lambda layer: _load(base.checkpoint, work[layer], layer)):
            size = _share_bytes_read(inputs, work[layer])
            for variant in work[layer]:
                workers.put(size // len(work[layer]), partial(prune_layer, variant, layer, inputs))
    for variant in variants:
        if variant.error is None:
            _finish(run, variant, base)


def _load(base: Checkpoint, variants: list[_Variant], layer: int) -> _Layer:
    linears = [name for name in base.linears() if families.layer_of(name) == layer]
    weights = {name: base.load(f"{name}.weight").view(torch.uint16).numpy() for name in linears}
    codes: dict[DType, dict[str, Codes]] = {}
    others: dict[DType, dict[str, torch.Tensor]] = {}
    for dtype, prepared in {variant.cell.dtype: variant.prepared for variant in variants}.items():
        tensors = {name: prepared.load(name) for name in prepared.layers()[layer]}
        codes[dtype] = {name: tensors.pop(f"{name}.weight").view(torch.int8).numpy() for name in weights}
        others[dtype] = tensors
    return _Layer(weights, codes, others)


def _share_bytes_read(inputs: _Layer, variants: list[_Variant]) -> int:
    """Count what was read once for every variant that needed it, in equal parts, so that the rows add up to it."""
    base = sum(weight.nbytes for weight in inputs.weights.values())
    prepared = {
        dtype: sum(codes.nbytes for codes in inputs.codes[dtype].values())
        + sum(tensor.nbytes for tensor in inputs.others[dtype].values())
        for dtype in inputs.codes
    }
    for variant in variants:
        dtype = variant.cell.dtype
        same = sum(other.cell.dtype is dtype for other in variants)
        variant.bytes_read += base // len(variants) + prepared[dtype] // same
    return base + sum(prepared.values())


def _prune_layer(
    run: Run, variant: _Variant, layer: int, inputs: _Layer, proof: LosslessProof, writer: Background
) -> None:
    options, seed, cell = run.plan.profile.convert, run.plan.profile.seed, variant.cell
    tensors = dict(inputs.others[cell.dtype])
    facts = []
    for name, codes in inputs.codes[cell.dtype].items():
        n, k = codes.shape
        made = prune(codes, inputs.weights[name], cell.sparsity, options.method, seed, name)
        lifted_k = cell.sparsity.lifted_k(k)
        lifted = np.empty((n, lifted_k), dtype=np.int8) if options.layout == "lifted" else None
        try:
            proof.lift(made.codes, cell.sparsity, name, lifted)
        except (VerificationError, CheckpointError) as error:
            variant.error = error
            return
        kept = made.codes if lifted is None else lifted
        tensors[f"{name}.weight"] = torch.from_numpy(kept).view(cell.dtype.torch)
        facts.append(
            LinearFacts(
                layer=name, n=n, k=k, lifted_k=lifted_k,
                natural_zeros=made.natural_zeros, weights_removed=made.removed,
                energy=made.energy, energy_removed=made.energy_removed,
                groups=made.groups, groups_unpruned=made.groups_unpruned,
            )
        )  # fmt: skip
    variant.draft.write(writer, layer, tensors, {"linears": [fact.model_dump() for fact in facts]})


def _finish(run: Run, variant: _Variant, base: source.Base) -> None:
    draft, cell, options = variant.draft, variant.cell, run.plan.profile.convert
    for layer in range(draft.layer_count):
        made = draft.facts(layer)
        assert made is not None, f"{draft.path(layer)}: written, yet not there"
        variant.facts += [LinearFacts.model_validate(fact) for fact in made["linears"]]
    draft.link_rest(Draft(variant.prepared.folder, draft.layer_count, "").path(None))
    section = Section(
        pattern=cell.sparsity,
        layout=options.layout,
        method=options.method,
        seed=run.plan.profile.seed,
        model=cell.model,
        source=str(base.provenance),
        base=base.checkpoint.fingerprint(),
        totals=sum_up(variant.facts),
    )
    source.copy_side_files(variant.prepared.folder, draft.folder)
    draft.finish(metadata.converted_config(variant.prepared.config, section))


# -- records -------------------------------------------------------------------------------------------


def _record(run: Run, variant: _Variant, seconds: float, speed: disk.DiskSpeed, outcome: Outcome) -> None:
    cell, draft, options = variant.cell, variant.draft, run.plan.profile.convert
    common: dict[str, Any] = {"fingerprint": draft.recipe, **run.stamp()}
    if variant.error is not None:
        _record_failures(run, [cell], variant.error, outcome, draft.recipe)
        return
    check = LosslessProof(options.proof_tokens).check
    layers = [layer_row(fact, check, common) for fact in variant.facts]
    records.append(run.tree.convert_layers(str(cell)), layers)
    totals = sum_up(variant.facts)
    row = ConvertRow(
        model=cell.model, dtype=cell.dtype.value, sparsity=str(cell.sparsity),
        method=options.method, layout=options.layout, linear_layers=len(layers),
        **totals.model_dump(),
        removed_fraction=share(totals.weights_removed, totals.weights - totals.natural_zeros),
        verified="exact", check=check,
        seconds=round(seconds, 3), bytes_read=variant.bytes_read, bytes_written=draft.bytes_written,
        disk_read_mib_s=round(speed.read_mib_s, 1), disk_write_mib_s=round(speed.write_mib_s, 1),
        floor_s=round(speed.floor_s(variant.bytes_read, draft.bytes_written), 3),
        peak_rss_mib=round(disk.peak_rss_mib(), 1),
        folder=disk.relative(draft.folder, run.plan.data),
        **common,
    )  # fmt: skip
    records.append(run.tree.convert, [row])
    outcome.ok += 1


def _record_failures(run: Run, cells: list[ConvertCell], error: Exception, outcome: Outcome, recipe: str = "") -> None:
    options: Convert = run.plan.profile.convert
    verified: Verified = "failed" if isinstance(error, VerificationError) else "not_checked"
    for cell in cells:
        run.log.error("%s: %s", cell, error)
    rows = [
        ConvertRow(
            model=cell.model, dtype=cell.dtype.value, sparsity=str(cell.sparsity),
            method=options.method, layout=options.layout, verified=verified,
            status="failed", reason=str(error), fingerprint=recipe or fingerprint(cell, "failed"), **run.stamp(),
        )
        for cell in cells
    ]  # fmt: skip
    records.append(run.tree.convert, rows)
    outcome.failed += len(cells)
    if str(error) not in outcome.notes:
        outcome.notes.append(str(error))
