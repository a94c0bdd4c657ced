"""Base models from the Hugging Face hub: revision to commit, size, resumable download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from slidesparse.config import Hub
from slidesparse.errors import SourceError
from slidesparse.files import describe_os_error

PATTERNS = ("*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.md", "LICENSE*")
IGNORED = ("original/*",)
"""Llama repositories hold the weights a second time there."""
Answer = TypeVar("Answer")


def resolve(entry: Hub, model: str) -> str:
    """Commit that the revision means now. Raises SourceError when the hub cannot say."""
    info = _ask(entry, model, lambda: _api().model_info(entry.repo, revision=entry.revision))
    return str(info.sha)


def download_bytes(entry: Hub, commit: str, model: str) -> int:
    """Bytes of the files that `download` fetches. Raises SourceError as `resolve`."""
    from huggingface_hub.utils import filter_repo_objects

    info = _ask(entry, model, lambda: _api().model_info(entry.repo, revision=commit, files_metadata=True))
    files = {file.rfilename: file.size or 0 for file in info.siblings or []}
    wanted = filter_repo_objects(list(files), allow_patterns=list(PATTERNS), ignore_patterns=list(IGNORED))
    return sum(files[name] for name in wanted)


def download(folder: Path, entry: Hub, commit: str, model: str, quiet: bool) -> None:
    """Fetch the model into `folder`; files that are there are kept, partial ones are continued.

    Raises:
        SourceError: no network, no such repository or revision, or a licence that must be accepted first.
        DiskError: disk full or read-only.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    hide = quiet and not are_progress_bars_disabled()
    if hide:
        disable_progress_bars()
    try:
        _ask(
            entry,
            model,
            lambda: snapshot_download(
                entry.repo,
                revision=commit,
                local_dir=folder,
                allow_patterns=list(PATTERNS),
                ignore_patterns=list(IGNORED),
            ),
            folder,
        )
    finally:
        if hide:
            enable_progress_bars()


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi()


def _ask(entry: Hub, model: str, question: Callable[[], Answer], folder: Path | None = None) -> Answer:
    """Ask the hub; turn its errors into one line that says what else can be done."""
    import httpx
    from huggingface_hub import errors

    from slidesparse.errors import DiskError

    others = f"or use --source synthetic, or --source local with models.{model}.local set in bench.yaml"
    try:
        return question()
    except errors.GatedRepoError:
        reason = "its licence must be accepted on the hub first, and HF_TOKEN set; do that,"
    except errors.RevisionNotFoundError:
        reason = f"no revision {entry.revision}; correct models.{model}.hub.revision,"
    except errors.RepositoryNotFoundError:
        reason = f"no such repository, or HF_TOKEN may not see it; correct models.{model}.hub.repo or set HF_TOKEN,"
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError, httpx.TransportError):
        reason = "the hub cannot be reached from here; connect,"
    except errors.HfHubHTTPError as error:
        reason = f"the hub answered {error.response.status_code}; try again later,"
    except OSError as error:
        problem = None if folder is None else describe_os_error(error, folder)
        if problem is not None:
            raise DiskError(problem) from None
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no details'}; try again,"
    raise SourceError(f"hub {entry.repo}: {reason} {others}")
