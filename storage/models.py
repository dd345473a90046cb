"""Which model does a name mean: a Hugging Face folder, or one on the hub at a commit? And how does it get here?"""

import fnmatch
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from storage import objects
from storage.hub import endpoint

# what a model folder needs; other frameworks' weights, which some repositories hold beside these, stay there
WANTED = ("*.json", "*.safetensors", "*.txt", "*.model")
OLD_WEIGHTS = "pytorch_model*.bin"  # where there are no safetensors
BESIDE = ["*/*"]  # copies for other programs lie in folders
OFFLINE = "HF_HUB_OFFLINE"


@dataclass(frozen=True)
class Model:
    """A model that was not trained here."""

    name: str  # as people say it, safe for a folder's name
    identity: dict[str, Any]  # what defines it: repository and commit, or the sha256 of each file
    folder: str = ""  # where its files lie; empty: on the hub
    patterns: tuple[str, ...] = field(default=WANTED, compare=False)  # the repository's files that are fetched


def resolve(name: str) -> Model:
    """The model that `name` means, asked for at once: nothing is fetched, a wrong name or no network is refused."""
    return from_folder(Path(name)) if is_path(name) or Path(name).is_dir() else from_hub(name)


def is_path(name: str) -> bool:
    """owner/name may be on the hub; a path with more or other parts is none of it."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def from_folder(folder: Path) -> Model:
    """Raises ValueError for a folder that holds no model."""
    if not (folder / "config.json").exists():
        what = "holds no config.json" if folder.is_dir() else "does not exist"
        raise ValueError(f"{folder} {what}: give a run, a Hugging Face model folder, or a hub name")
    files = {s.path: objects.sha256(str(folder / s.path)) for s in objects.list_files(str(folder)) if counts(s.path)}
    return Model(objects.safe_name(folder.resolve().name), {"files": files}, str(folder.resolve()))


def counts(path: str) -> bool:
    """Whether a file of a folder is part of the model: no notes beside it, such as its card and its record."""
    names = [*WANTED, OLD_WEIGHTS]
    return "/" not in path and path != "record.json" and any(fnmatch.fnmatch(path, pattern) for pattern in names)


def from_hub(name: str) -> Model:
    """At the commit that its main branch has now, or, without a network, had when it was fetched last."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError, OfflineModeIsEnabled
    from huggingface_hub.errors import RepositoryNotFoundError as NotFound

    try:
        found = HfApi(endpoint=endpoint()).model_info(name, timeout=20)
    except (NotFound, HFValidationError) as error:
        raise ValueError(
            f"no run, model folder or hub model {name!r}: check its name, or set HF_TOKEN to a token that may read it"
        ) from error
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        return _fetched_before(name, error)
    files = [sibling.rfilename for sibling in found.siblings or []]
    return Model(_short(found.id), {"repo": found.id, "commit": found.sha}, patterns=_patterns(files))


def _short(repo: str) -> str:
    return objects.safe_name(repo.rsplit("/", 1)[-1])


def _patterns(files: Sequence[str]) -> tuple[str, ...]:
    return WANTED if any(file.endswith(".safetensors") for file in files) else (*WANTED, OLD_WEIGHTS)


def _fetched_before(name: str, reason: Exception) -> Model:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = snapshot_download(name, allow_patterns=[*WANTED], ignore_patterns=BESIDE, local_files_only=True)
    except LocalEntryNotFoundError as error:
        why = f"{OFFLINE} is set" if os.environ.get(OFFLINE, "0") not in ("", "0") else f"{type(reason).__name__}"
        raise ValueError(
            f"{name} is neither a run nor a folder here, and the hub at {endpoint()} can't be reached ({why}): "
            "give a local model folder, or run this where there is a network"
        ) from error
    return Model(_short(name), {"repo": name, "commit": Path(folder).name}, folder)


def fetch(model: Model) -> str:
    """The local folder of a model: its own, or the hub's files in the hub's cache, each checked by its client."""
    from huggingface_hub import snapshot_download

    if model.folder:
        return model.folder
    repo, commit = model.identity["repo"], model.identity["commit"]
    given: dict[str, Any] = {"allow_patterns": [*model.patterns], "ignore_patterns": BESIDE, "endpoint": endpoint()}
    # its main branch first: the client remembers its commit, for when there is no network
    folder = snapshot_download(repo, **given)
    return str(folder if Path(folder).name == commit else snapshot_download(repo, revision=commit, **given))


def push(folder: str, repo: str, message: str) -> str:
    """Put a model folder into a repository on the hub, made private where it is new -> the commit's URL.

    Raises ValueError without a token, or where the hub refuses it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, HTTPError

    check_push(repo)
    api = HfApi(endpoint=endpoint(), token=os.environ["HF_TOKEN"])
    try:
        api.create_repo(repo, private=True, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo, folder_path=folder, commit_message=message, ignore_patterns=["record.json", ".*"]
        )
    except (HTTPError, HFValidationError) as error:
        raise ValueError(f"{repo} can't be pushed to {endpoint()}: {error}; may HF_TOKEN write there?") from error
    return str(done.commit_url)


def check_push(repo: str) -> None:
    """Raises ValueError for a name that is no repository's, and without a token."""
    if repo.count("/") != 1 or not all(part == objects.safe_name(part) for part in repo.split("/")):
        raise ValueError(f"--push-to {repo}: write OWNER/NAME, a repository on the hub")
    if not os.environ.get("HF_TOKEN"):
        raise ValueError("--push-to needs a token that may write on the hub: set HF_TOKEN")
