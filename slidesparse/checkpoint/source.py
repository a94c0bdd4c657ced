"""Where a base model comes from: the hub, a local folder, or made here (synthetic).

A folder that we fill carries `slidesparse_source.json`, written first: a model that was made from another
source, seed or config is an error, never silently used. A local folder is read where it is, and left alone.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from slidesparse.checkpoint import disk, hub, synthetic
from slidesparse.checkpoint.checkpoint import CONFIG, Checkpoint
from slidesparse.checkpoint.draft import Draft
from slidesparse.checkpoint.shard import INDEX
from slidesparse.config import Hub, Model
from slidesparse.errors import CheckpointError, SourceError
from slidesparse.files import atomic_path, read_json, write_json
from slidesparse.model_size import checkpoint_bytes
from slidesparse.plan import Plan, fingerprint

PROVENANCE = "slidesparse_source.json"
_MUST_AGREE = (
    "model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "tie_word_embeddings", "hidden_act", "rms_norm_eps",
)  # fmt: skip
"""Keys of bench.yaml's `config` that decide what is computed: a real model must have the same values."""
_NOT_COPIED = (".safetensors", ".partial", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".py")
"""Weights in other forms, and code of the hub repository that our config.json no longer names."""
_LARGEST_SIDE_FILE = 64 * disk.MIB


class Provenance(BaseModel):
    """What a base folder was filled from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["hub", "local", "synthetic"]
    model: str
    repo: str = ""
    revision: str = ""
    """As asked for; `commit` is what it meant at the first download."""
    commit: str = ""
    complete: bool = False
    """Hub: all files are there, so that no network is needed any more."""
    folder: str = ""
    seed: int = 0
    generator: int = 0
    config: dict[str, Any] = {}

    def __str__(self) -> str:
        if self.kind == "hub":
            return f"hub {self.repo}@{self.commit}"
        return f"local {self.folder}" if self.kind == "local" else f"synthetic seed {self.seed}"


@dataclass(frozen=True)
class Base:
    """A base model that is there and whole."""

    checkpoint: Checkpoint
    provenance: Provenance


def obtain(plan: Plan, model: str, quiet: bool = False) -> Base:
    """Get the BF16 base model of a catalogue entry from the profile's source; at once if it is there already.

    Raises:
        SourceError: it cannot be had (names the other sources).
        CheckpointError: what is there is not a whole BF16 model of that entry, or comes from elsewhere.
        DiskError: not enough space, or the folder cannot be written.
    """
    entry = plan.bench.models[model]
    folder = plan.base_folder(model)
    match plan.profile.source:
        case "local":
            provenance = Provenance(kind="local", model=model, folder=_local_folder(entry, model))
            folder = Path(provenance.folder)
        case "synthetic":
            provenance = _synthesise(folder, entry, model, plan.profile.seed, quiet)
        case "hub":
            provenance = _download(folder, entry, model, quiet)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.dtype is not None:
        raise CheckpointError(f"{folder / CONFIG}: holds {checkpoint.dtype.value} weights; a base model must be BF16")
    _check_config(checkpoint, entry, model)
    return Base(checkpoint, provenance)


def copy_side_files(base: Path, target: Path) -> None:
    """Tokeniser, generation config, licence: copied, not linked, because a user may edit them."""
    for path in sorted(base.iterdir()):
        ours = (CONFIG, INDEX, PROVENANCE)
        if not path.is_file() or path.name.startswith(".") or path.name in ours or path.name.endswith(_NOT_COPIED):
            continue
        if path.stat().st_size <= _LARGEST_SIDE_FILE:
            with atomic_path(target / path.name) as partial:
                shutil.copyfile(path, partial)


def _local_folder(entry: Model, model: str) -> str:
    if entry.local is None:
        raise SourceError(
            f"bench.yaml: models.{model}.local is not set; name the folder of the BF16 model there, "
            "or use --source hub or --source synthetic"
        )
    path = Path(entry.local).expanduser()
    if not path.is_dir():
        raise SourceError(
            f"{path}: models.{model}.local of bench.yaml is no folder; correct it, "
            "or use --source hub or --source synthetic"
        )
    return str(path.absolute())


def _synthesise(folder: Path, entry: Model, model: str, seed: int, quiet: bool) -> Provenance:
    wanted = Provenance(
        kind="synthetic", model=model, seed=seed, generator=synthetic.GENERATOR, config=entry.config, complete=True
    )
    before = read_provenance(folder)
    if before is not None and before != wanted:
        raise _other_origin(folder, before, wanted)
    if before is None:
        _refuse_unknown(folder)
    config = synthetic.model_config(entry.config)
    recipe = fingerprint(seed, synthetic.GENERATOR, json.dumps(entry.config, sort_keys=True))
    draft = Draft(folder, int(config["num_hidden_layers"]), recipe)
    if not draft.is_complete():
        disk.require(folder, checkpoint_bytes(entry).base - _bytes_in(folder), f"the synthetic {model}")
        write_json(folder / PROVENANCE, wanted.model_dump(mode="json"))
        synthetic.write_model(draft, entry.config, seed, model, quiet)
    return wanted


def _download(folder: Path, entry: Model, model: str, quiet: bool) -> Provenance:
    if entry.hub is None:
        raise SourceError(
            f"bench.yaml: models.{model}.hub is not set; use --source synthetic, or local with models.{model}.local"
        )
    before = read_provenance(folder)
    if before is None:
        _refuse_unknown(folder)
        provenance = _hub_provenance(entry.hub, model, hub.resolve(entry.hub, model))
    elif (before.kind, before.repo, before.revision) != ("hub", entry.hub.repo, entry.hub.revision):
        raise _other_origin(folder, before, _hub_provenance(entry.hub, model, entry.hub.revision))
    else:
        provenance = before
    if provenance.complete:
        try:
            Checkpoint.open(folder)
            return provenance
        except CheckpointError as fault:  # files were lost since: fetch those again, if the hub can be reached
            try:
                hub.resolve(entry.hub, model)
            except SourceError:
                raise fault from None
    need = hub.download_bytes(entry.hub, provenance.commit, model)
    disk.require(folder, need - _bytes_in(folder), f"{model} from the hub")
    write_json(folder / PROVENANCE, provenance.model_dump(mode="json"))
    hub.download(folder, entry.hub, provenance.commit, model, quiet)
    provenance = provenance.model_copy(update={"complete": True})
    write_json(folder / PROVENANCE, provenance.model_dump(mode="json"))
    return provenance


def _hub_provenance(entry: Hub, model: str, commit: str) -> Provenance:
    return Provenance(kind="hub", model=model, repo=entry.repo, revision=entry.revision, commit=commit)


def read_provenance(folder: Path) -> Provenance | None:
    """What a base folder of ours was filled from, None if it holds no such file. Raises CheckpointError if damaged."""
    path = folder / PROVENANCE
    if not path.is_file():
        return None
    try:
        return Provenance.model_validate(read_json(path))
    except ValidationError as error:
        fault = error.errors()[0]
        raise CheckpointError(
            f"{path}: {'.'.join(map(str, fault['loc']))}: {fault['msg']}; move the folder aside"
        ) from None


def _refuse_unknown(folder: Path) -> None:
    if folder.is_dir() and any(
        not path.name.startswith(".") and not path.name.endswith(".partial") for path in folder.iterdir()
    ):
        raise CheckpointError(
            f"{folder}: not empty, and no {PROVENANCE} says where its files come from; move it aside, "
            "or name it as models.*.local in bench.yaml and use --source local"
        )


def _other_origin(folder: Path, before: Provenance, wanted: Provenance) -> CheckpointError:
    detail = " with another config" if str(before) == str(wanted) else ""
    return CheckpointError(
        f"{folder}: was made from {before}{detail}, but {wanted} is asked for; "
        "move it aside or choose another folder with --data"
    )


def _check_config(checkpoint: Checkpoint, entry: Model, model: str) -> None:
    for key in _MUST_AGREE:
        if key in entry.config and key in checkpoint.config and entry.config[key] != checkpoint.config[key]:
            raise CheckpointError(
                f"{checkpoint.folder / CONFIG}: {key} is {checkpoint.config[key]!r}, bench.yaml says "
                f"{entry.config[key]!r} for models.{model}; correct the entry, or give the model it describes"
            )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0
