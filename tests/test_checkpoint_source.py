"""Where base models come from, and that a model from elsewhere is never silently used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub import errors as hub_errors
from safetensors.torch import load_file, save_file
from small_models import BITNET, LLAMA
from small_runs import MODEL, small_run

from slidesparse.checkpoint import hub, source
from slidesparse.config import Hub
from slidesparse.errors import CheckpointError, DiskError, SourceError
from slidesparse.plan import Plan


def plan(folder: Path, kind: str = "synthetic", seed: int = 0, **model: Any) -> Plan:
    made = small_run(folder, source=kind, seed=seed).plan
    entry = made.bench.models[MODEL].model_copy(update=model)
    return Plan(made.bench.model_copy(update={"models": {MODEL: entry}}), made.profile_name, folder)


def refused(made: Plan, error: type[Exception]) -> str:
    with pytest.raises(error) as caught:
        source.obtain(made, MODEL, quiet=True)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_synthetic_is_made_once(tmp_path: Path) -> None:
    base = source.obtain(plan(tmp_path), MODEL, quiet=True)
    assert str(base.provenance) == "synthetic seed 0"
    stamps = {path: path.stat().st_mtime_ns for path in base.checkpoint.folder.iterdir()}
    again = source.obtain(plan(tmp_path), MODEL, quiet=True)
    assert {path: path.stat().st_mtime_ns for path in again.checkpoint.folder.iterdir()} == stamps
    assert again.provenance == base.provenance


def test_an_interrupted_synthetic_model_is_completed_to_the_same_bytes(tmp_path: Path) -> None:
    folder = source.obtain(plan(tmp_path), MODEL, quiet=True).checkpoint.folder
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    lost = folder / "model-00002-of-00003.safetensors"
    lost.write_bytes(lost.read_bytes()[:-1])
    (folder / "model-00003-of-00003.safetensors").unlink()
    kept = (folder / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    source.obtain(plan(tmp_path), MODEL, quiet=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole
    assert (folder / "model-00001-of-00003.safetensors").stat().st_mtime_ns == kept


def test_another_seed_or_config_is_an_error_not_a_reuse(tmp_path: Path) -> None:
    source.obtain(plan(tmp_path), MODEL, quiet=True)
    message = refused(plan(tmp_path, seed=1), CheckpointError)
    assert "made from synthetic seed 0, but synthetic seed 1 is asked for" in message
    message = refused(plan(tmp_path, config=BITNET | {"vocab_size": 256}), CheckpointError)
    assert "synthetic seed 0 with another config" in message


def test_files_of_unknown_origin_are_not_touched(tmp_path: Path) -> None:
    folder = plan(tmp_path).base_folder(MODEL)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert "no slidesparse_source.json" in refused(plan(tmp_path), CheckpointError)
    assert [path.name for path in folder.iterdir()] == ["config.json"]


def test_too_little_space_is_said_before_starting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1, used=1, free=1000))
    message = refused(plan(tmp_path), DiskError)
    assert "needs 16 MiB, 0 MiB are free; free some space or choose another folder" in message
    assert not plan(tmp_path).base_folder(MODEL).exists()


# -- local ---------------------------------------------------------------------------------------------


def test_local_is_used_in_place(tmp_path: Path) -> None:
    made = source.obtain(plan(tmp_path / "one"), MODEL, quiet=True).checkpoint.folder
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    tensors: dict[str, torch.Tensor] = {}
    for path in made.glob("*.safetensors"):
        tensors |= load_file(path)
    save_file(tensors, theirs / "model.safetensors")
    shutil.copy(made / "config.json", theirs)
    before = {path.name: path.stat().st_mtime_ns for path in theirs.iterdir()}
    base = source.obtain(plan(tmp_path / "two", "local", local=str(theirs)), MODEL, quiet=True)
    assert base.checkpoint.folder == theirs
    assert str(base.provenance) == f"local {theirs}"
    assert {path.name: path.stat().st_mtime_ns for path in theirs.iterdir()} == before
    assert not (tmp_path / "two").exists()


def test_local_that_is_not_set_or_not_there_names_the_others(tmp_path: Path) -> None:
    message = refused(plan(tmp_path, "local"), SourceError)
    assert f"models.{MODEL}.local is not set" in message
    assert "--source synthetic" in message
    assert "is no folder" in refused(plan(tmp_path, "local", local=str(tmp_path / "no")), SourceError)


def test_local_model_of_another_size_is_refused(tmp_path: Path) -> None:
    folder = source.obtain(plan(tmp_path), MODEL, quiet=True).checkpoint.folder
    other = plan(tmp_path, "local", local=str(folder), config=LLAMA)
    assert "model_type is 'bitnet', bench.yaml says 'llama'" in refused(other, CheckpointError)


# -- hub: the network is not to be had in tests, so its client is replaced ---------------------------------


class FakeHub:
    """Answers as huggingface_hub does: `main` moves from commit to commit, a download may break off."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, made: Path) -> None:
        self.commit, self.calls, self.made = "c0ffee", [], made
        self.broken = False
        monkeypatch.setattr(huggingface_hub, "HfApi", lambda: self)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def model_info(self, repo: str, revision: str, files_metadata: bool = False) -> Any:
        self.calls.append(("info", revision))
        files = [SimpleNamespace(rfilename=path.name, size=path.stat().st_size) for path in self.made.iterdir()]
        files.append(SimpleNamespace(rfilename="original/consolidated.00.pth", size=10**15))
        return SimpleNamespace(sha=self.commit if revision == "main" else revision, siblings=files)

    def download(self, repo: str, revision: str, local_dir: Path, **options: Any) -> None:
        self.calls.append(("download", revision))
        for path in sorted(self.made.iterdir()):
            if path.name != source.PROVENANCE:
                shutil.copy(path, local_dir)
            if self.broken:
                raise httpx.ConnectError("broken off")


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(monkeypatch, source.obtain(plan(tmp_path / "made"), MODEL, quiet=True).checkpoint.folder)


REPO = Hub(repo="some/model", revision="main")


def test_hub_records_the_commit_and_needs_no_network_afterwards(tmp_path: Path, fake_hub: FakeHub) -> None:
    base = source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True)
    assert str(base.provenance) == "hub some/model@c0ffee"
    assert fake_hub.calls == [("info", "main"), ("info", "c0ffee"), ("download", "c0ffee")]
    fake_hub.commit, fake_hub.calls = "another", []
    again = source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True)
    assert again.provenance == base.provenance
    assert fake_hub.calls == []


def test_a_broken_download_is_continued_at_the_same_commit(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.broken = True
    message = refused(plan(tmp_path, "hub", hub=REPO), SourceError)
    assert "cannot be reached" in message
    fake_hub.commit, fake_hub.broken = "another", False
    base = source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True)
    assert str(base.provenance) == "hub some/model@c0ffee"


def test_files_lost_after_the_download_are_fetched_again(tmp_path: Path, fake_hub: FakeHub) -> None:
    folder = source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True).checkpoint.folder
    lost = folder / "model-00002-of-00003.safetensors"
    lost.unlink()
    again = source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True)
    assert lost.is_file()
    assert str(again.provenance) == "hub some/model@c0ffee"


def test_another_revision_than_the_one_there_is_an_error(tmp_path: Path, fake_hub: FakeHub) -> None:
    source.obtain(plan(tmp_path, "hub", hub=REPO), MODEL, quiet=True)
    other = plan(tmp_path, "hub", hub=Hub(repo="some/model", revision="v2"))
    assert "made from hub some/model@c0ffee, but hub some/model@v2 is asked for" in refused(other, CheckpointError)


def test_no_network_is_one_line_that_names_the_other_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refused(plan(tmp_path, "hub", hub=REPO), SourceError)
    assert "hub some/model: the hub cannot be reached from here" in message
    assert "--source synthetic" in message
    assert f"--source local with models.{MODEL}.local" in message
    assert not plan(tmp_path).base_folder(MODEL).exists()


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "http://localhost/"))


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (hub_errors.GatedRepoError("x", response=response(403)), "its licence must be accepted"),
        (hub_errors.RepositoryNotFoundError("x", response=response(404)), "no such repository"),
        (hub_errors.RevisionNotFoundError("x", response=response(404)), "no revision main"),
        (hub_errors.HfHubHTTPError("x", response=response(503)), "the hub answered 503"),
        (OSError("odd"), "OSError: odd"),
    ],
)
def test_answers_of_the_hub_are_explained(
    error: Exception, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(hub, "_api", lambda: SimpleNamespace(model_info=fail))
    message = refused(plan(tmp_path, "hub", hub=REPO), SourceError)
    assert expected in message
    assert "--source synthetic" in message


def test_a_full_disk_during_the_download_is_a_disk_error(
    tmp_path: Path, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert "disk full" in refused(plan(tmp_path, "hub", hub=REPO), DiskError)


def test_a_hub_model_that_is_not_the_described_one_is_refused(tmp_path: Path, fake_hub: FakeHub) -> None:
    config = fake_hub.made / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"hidden_act": "silu"}))
    message = refused(plan(tmp_path, "hub", hub=REPO), CheckpointError)
    assert "hidden_act is 'silu', bench.yaml says 'relu2'" in message
