"""Which files are the weights that a run starts from? A model folder, a model of the hub, or an llm.c file."""

import os
import re
from dataclasses import dataclass
from typing import Any

from storage import checkpoints, objects
from storage.records import File, describe_file

CONFIG = "config.json"
WEIGHTS = (".safetensors", ".bin")


@dataclass(frozen=True)
class StartingWeights:
    """`identity` holds what defines them, the files' content; `revision` is the hub's commit, else empty."""

    source: str
    files: list[File]
    revision: str = ""

    @property
    def identity(self) -> dict[str, Any]:
        return {"files": {os.path.basename(f.path): f.sha256 for f in self.files}}

    @property
    def name(self) -> str:
        """Such as "gpt2-xl-1a2b3c4d": the source's last word and eight digits of the largest file's sha256."""
        word = re.sub(r"[^\w.-]+", "-", os.path.basename(self.source.rstrip("/")).removesuffix(".bin"))
        return f"{word}-{max(self.files, key=lambda f: f.bytes).sha256[:8]}"


def check(source: str) -> None:
    """Raise ValueError for what can be neither a file, nor a folder with a model, nor a name on the hub."""
    if os.path.isdir(source):
        if not os.path.isdir(os.path.join(source, "checkpoints")) and not _model_files(source):
            raise ValueError(f"init_from={source} holds no model: give a folder with config.json and *.safetensors")
    elif not os.path.isfile(source) and not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source.removesuffix(".bin")):
        raise ValueError(f"init_from={source}: there is no such file or folder; on the hub, write OWNER/NAME")


def sizes(source: str) -> dict[str, int]:
    """The sizes in a local model folder's config.json, by the names that GPT-2 gives them; {} for anything else."""
    path = os.path.join(source, CONFIG)
    if not os.path.isfile(path):
        return {}
    found = objects.read_json(path)
    return {name: found[name] for name in ("n_layer", "n_embd", "n_head", "n_positions") if name in found}


def resolve(source: str) -> StartingWeights:
    """The files of `source`; a model of the hub is fetched into its cache. Raises ValueError where there is none."""
    check(source)
    if os.path.isfile(source):
        return StartingWeights(source, [_described(source)])
    if os.path.isdir(os.path.join(source, "checkpoints")):
        return StartingWeights(source, _described_all(_newest_checkpoint(source), ("model.safetensors",)))
    if os.path.isdir(source):
        return StartingWeights(source, _described_all(source, _model_files(source)))
    folder = _fetch(source)
    return StartingWeights(source, _described_all(folder, _model_files(folder)), os.path.basename(folder))


def _model_files(folder: str) -> tuple[str, ...]:
    """config.json and the weights beside it; () where one of them is missing."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.name.endswith(WEIGHTS))
    return (CONFIG, *names) if names and os.path.exists(os.path.join(folder, CONFIG)) else ()


def _newest_checkpoint(run: str) -> str:
    steps = checkpoints.complete(run)
    if not steps:
        raise ValueError(f"init_from={run} has no complete checkpoint: train it first")
    return checkpoints.checkpoint_url(run, steps[-1])


def _fetch(name: str) -> str:
    """The snapshot of a model of the hub: a folder that is named after its commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return snapshot_download(name, allow_patterns=[CONFIG, "*.safetensors"])
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"init_from={name} is no folder here, and the hub does not give it ({type(error).__name__}): check the "
            "name and the network, or give a folder with the model"
        ) from error


def _described_all(folder: str, names: tuple[str, ...]) -> list[File]:
    return [_described(os.path.join(folder, name)) for name in names]


def _described(path: str) -> File:
    return describe_file("", os.path.abspath(path))
