"""What defines a run? The config.json in its folder, written once; no Dagster here."""

from dataclasses import replace
from typing import Any, Literal

from storage import objects
from storage.places import Places
from training.config import RunConfig, from_dict, settable_keys, to_dict


def config_url(places: Places, run: str) -> str:
    return objects.join(places.store, "runs", run, "config.json")


def stored(places: Places, run: str) -> RunConfig | None:
    """The configuration of a run in the store, or None."""
    url = config_url(places, run)
    return from_dict(RunConfig, objects.read_json(url), url) if objects.exists(url) else None


def resuming(config: RunConfig, how: Literal["exact", "anyway", "no"] = "exact") -> RunConfig:
    """The same run, started in that way."""
    return replace(config, machine=replace(config.machine, resume=how))


def definition(config: RunConfig) -> dict[str, Any]:
    """All of a configuration that changes results: where it runs, and what runs its workers, does not."""
    values = {key: value for key, value in to_dict(config).items() if key != "machine"}
    return values | {"tokenize": {"shard_tokens": config.tokenize.shard_tokens}}


def check_unchanged(places: Places, run: str, config: RunConfig) -> None:
    """Refuse to give a run that exists another definition."""
    there = stored(places, run)
    if there is None or definition(there) == definition(config):
        return
    old, new = settable_keys(there), settable_keys(config)
    differences = [
        f"{key}={old[key]} (now {new[key]})" for key in old if old[key] != new[key] and not key.startswith("machine.")
    ]
    if there.recipe != config.recipe:
        differences.insert(0, f"recipe={there.recipe} (now {config.recipe})")
    raise ValueError(f"run {run!r} exists with {', '.join(differences)}: give the new one another name with --name")
