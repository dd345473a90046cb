"""What defines a run? The config.json in its folder, written once; no Dagster here.

Beside it, source.json: the files and the commit on the hub that its corpus named when the run began.
"""

import logging
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

from storage import objects, records, sources
from storage.places import Places
from training.config import RunConfig, from_dict, settable_keys, to_dict

log = logging.getLogger(__name__)


def config_url(places: Places, run: str) -> str:
    return objects.join(places.store, "runs", run, "config.json")


LONGEST_NAME = 200  # of the 255 that a file's name may have, beside what a lock or a folder of Dagster's adds


def check_name(run: str) -> None:
    """Refuse a run's name that is no good for a folder of the store."""
    if len(run) > LONGEST_NAME:
        raise ValueError(f"run name {run!r} has {len(run)} letters: {LONGEST_NAME} are enough")
    if not run or run != objects.safe_name(run):
        raise ValueError(
            f"run name {run!r} is not a good name for a folder: use letters, digits, '.', '_' and '-', "
            f"such as {objects.safe_name(run) or 'my-run'}"
        )


def stored(places: Places, run: str) -> RunConfig | None:
    """The configuration of a run in the store, or None."""
    url = config_url(places, run)
    return from_dict(RunConfig, objects.read_json(url), url) if objects.exists(url) else None


def known_runs(places: Places) -> list[str]:
    """Names of the runs in the store."""
    return _with_file(places, "config.json")


def _with_file(places: Places, name: str) -> list[str]:
    """The runs of the store whose folders hold a file of that name."""
    found = objects.list_files(objects.join(places.store, "runs"), f"/{name}")
    return [s.path.split("/")[0] for s in found if s.path.count("/") == 1]


def inputs(places: Places, run: str) -> dict[str, str]:
    """Which outputs a run reads, name → key, as far as they are known yet."""
    url = inputs_url(places, run)
    return dict(objects.read_json(url)) if objects.exists(url) else {}


def inputs_url(places: Places, run: str) -> str:
    return objects.join(places.store, "runs", run, "inputs.json")


def resuming(config: RunConfig, how: Literal["exact", "anyway", "no"] = "exact") -> RunConfig:
    """The same run, started in that way."""
    return replace(config, machine=replace(config.machine, resume=how))


def source_of(places: Places, run: str, corpus: str) -> sources.Source:
    """A run's source as it was when the run began: where the hub has moved since, that is for other runs.

    The hub is asked only for a run that has neither begun nor documents. Raises ValueError as `sources.resolve`.
    """
    for identity, revision in _found(places, run, corpus):
        if source := sources.found_before(corpus, identity, revision):
            return source
    return sources.resolve(corpus)


def _found(places: Places, run: str, corpus: str) -> Iterator[tuple[dict[str, Any], str | None]]:
    """What a run's corpus was found to be, by its source.json, or else by the record of its documents."""
    if objects.exists(url := objects.join(places.store, "runs", run, "source.json")):
        noted = objects.read_json(url)
        if noted["corpus"] == corpus:
            yield noted["identity"], noted["revision"]
    key = inputs(places, run).get("documents")
    if key and (documents := records.read_record(places.store, key)):
        yield documents.config, documents.metrics.get("revision")


def documents_key(source: sources.Source) -> str:
    return f"corpora/{source.name}/documents"


def keep_source(places: Places, run: str, corpus: str, source: sources.Source) -> sources.Source:
    """Note what a run's corpus is, once, for every command and machine; the source that counts."""
    revision = source.details.get("revision")
    if sources.found_before(corpus, source.identity, revision) is None:
        return source
    url = objects.join(places.store, "runs", run, "source.json")
    if not objects.exists(url) or objects.read_json(url)["corpus"] != corpus:  # whose config.json somebody has removed
        objects.publish_json(url, {"corpus": corpus, "revision": revision, "identity": source.identity})
    return source_of(places, run, corpus)


def check_documents(places: Places, run: str, source: sources.Source) -> None:
    """Refuse to give a run whose training has begun other documents: its scores would be on text that it may know."""
    now = documents_key(source)
    there = inputs(places, run).get("documents", now)
    if there != now and objects.exists(objects.join(places.store, "runs", run, DEFINITION)):
        raise ValueError(
            f"run {run!r} was trained on {there}, and its corpus is {now} now: bring back the files that it had, or "
            "train on these as another run, with --name"
        )


def definition(config: RunConfig) -> dict[str, Any]:
    """All of a configuration that changes results: where it runs, and what runs its workers, does not."""
    values = {key: value for key, value in to_dict(config).items() if key != "machine"}
    return values | {"tokenize": {"shard_tokens": config.tokenize.shard_tokens}}


def check_unchanged(places: Places, run: str, config: RunConfig) -> None:
    """Refuse to give a run that exists another definition."""
    there = stored(places, run)
    if there is not None and sources.is_folder(there.corpus) and sources.is_folder(config.corpus):
        there = replace(there, corpus=config.corpus)  # its documents say what it is, wherever it lies
    if there is None or definition(there) == definition(config):
        return
    old, new = settable_keys(there), settable_keys(config)
    changed = [key for key in old if old[key] != new[key] and not key.startswith("machine.")]
    differences, way = [f"{key}={old[key]} (now {new[key]})" for key in changed], ""
    if there.recipe != config.recipe:
        differences.insert(0, f"recipe={there.recipe} (now {config.recipe})")
    else:
        settings = [f"--set {shlex.quote(f'{key}={old[key]}')}" for key in changed]
        way = f", or go on with it: {' '.join([f'--name {run}', *settings])}"
    raise ValueError(
        f"run {run!r} exists with {', '.join(differences)}: give the new one another name with --name{way}"
    )


DEFINITION = "definition.json"  # of a run whose training has begun: the fingerprint of its model


def trainings(places: Places) -> dict[str, str]:
    """The runs of the store whose training has begun -> the fingerprint of what each of them trains."""
    begun: dict[str, str] = {}
    for run in _with_file(places, DEFINITION):
        try:
            begun[run] = objects.read_json(objects.join(places.store, "runs", run, DEFINITION))["fingerprint"]
        except (ValueError, KeyError, TypeError) as error:  # no reason to keep every other run from training
            log.warning("what run %r trains is not known: %s", run, error)
    return begun


def check_no_repeat(places: Places, run: str, fingerprint: str) -> None:
    """Refuse to begin a training that another run of the store has begun or finished: it would come to the same."""
    begun = trainings(places)
    same = [name for name, other in begun.items() if other == fingerprint]
    if same and run not in begun:
        raise ValueError(
            f"run {run!r} would train what run {same[0]!r} of this store trains or has trained, of the same settings, "
            f"tokens and code: go on with that one (--name {same[0]}), or ask it other questions "
            f"(gpt2 evals {same[0]}); for a repeat take another order_seed or init_seed, or another --store"
        )
