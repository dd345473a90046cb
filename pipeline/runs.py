"""Which run does a command mean, and can it succeed? Settled, and refused where it can't, before anything starts."""

import difflib
import fcntl
import hashlib
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from assets.run_config import definition, inputs, known_runs, source_of, stored, trainings
from evals.run import HARNESS_SUITES
from storage import objects, sources, starting_weights
from storage.items import PUBLISHED, THROUGH_LIBRARY
from storage.places import Places
from training import plan, recipes
from training.config import SUITES, RunConfig, nearest_multiples, settable_keys
from training.gpus import gpu_count, gpu_memory_gib, ranks_here, shard_group
from training.model_config import GPT2_VOCABULARY

if TYPE_CHECKING:
    from assets.making import Maker

log = logging.getLogger(__name__)

EXPORT_BYTES = 4  # a parameter


def configure(
    recipe: str, settings: Sequence[str], corpus: str | None, gpus: int | None, files: int | None = None
) -> RunConfig:
    """The recipe with a command's overrides. Raises ValueError for what it does not know."""
    config = recipes.recipe(recipe, settings)
    if corpus is not None:
        config = replace(config, corpus=corpus)
    if files is not None:
        config = replace(config, corpus=sources.first_files(config.corpus, files))
    if gpus is not None:
        config = replace(config, machine=replace(config.machine, gpus=gpus))
    return settled(config)


def settled(config: RunConfig) -> RunConfig:
    """`config` as this machine's GPUs can train it; says so where that changes the numbers."""
    gib = gpu_memory_gib()
    if gib == 0.0:
        return config
    check_ranks(config)
    limit = plan.limit(config, gib)
    ranks = ranks_here(config.machine.gpus) * config.machine.nnodes
    fitted = plan.settle(config, ranks, limit)
    if fitted != config:
        sys.stderr.write(
            f"{config.recipe} fits {limit:.1f} GiB a GPU only without fp32 master weights: master_weights=false, bf16 "
            "weights with stochastic rounding. That changes the numbers, so it is part of the run's definition.\n"
        )
    return fitted


def default_name(config: RunConfig) -> str:
    """The recipe's name, with six digits behind it where its definition is not the recipe's own."""
    own, wanted = definition(recipes.recipe(config.recipe)), definition(config)
    name = objects.safe_name(config.recipe)
    if own == wanted:
        return name
    return f"{name}-{hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()[:6]}"


def found_from_anywhere(config: RunConfig) -> RunConfig:
    """With the whole path of a corpus in a folder: other commands, and Dagster's page, work in other folders."""
    here = sources.is_folder(config.corpus) and os.path.isdir(config.corpus)
    return replace(config, corpus=os.path.abspath(config.corpus)) if here else config


def readable_runs(places: Places) -> Iterator[str]:
    """Names of the runs in the store, without those whose configuration can't be read: these are named in the log."""
    for run in known_runs(places):
        try:
            stored(places, run)
        except ValueError as error:
            log.warning("run %r is left out: %s", run, error)
        else:
            yield run


def busy(places: Places) -> list[str]:
    """Runs that are being trained from this home."""
    held = []
    for path in (places.home / "locks").glob("*.lock"):
        with open(path) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(path.stem)
    return held


def existing(places: Places, run: str) -> RunConfig:
    """The configuration of a run that is in the store. Raises ValueError naming those that are."""
    config = stored(places, run)
    if config is None:
        known = ", ".join(known_runs(places)) or "none"
        raise ValueError(f"there is no run {run!r} in {places.store}: the runs there are {known}")
    return config


def tokens_of(places: Places, run: str) -> str:
    """The key of the token shards that a run reads."""
    key = inputs(places, run).get("tokens")
    if key is None:
        raise ValueError(f"run {run!r} has no token shards yet: `gpt2 run` makes them")
    return key


def check_possible(places: Places, config: RunConfig, source: sources.Source) -> None:
    """Raise ValueError for a run that can't succeed: its vocabulary, its ranks, its items, its store or its space."""
    if config.model.vocab < GPT2_VOCABULARY:
        raise ValueError(f"vocab={config.model.vocab} is less than the shards' vocabulary, GPT-2's {GPT2_VOCABULARY}")
    check_ranks(config)
    check_tasks(config.evals.harness)
    if config.train.init_from:
        check_starting_weights(config)
    check_items(config.evals.hellaswag)
    objects.check_address(config.evals.core)
    if config.train.hellaswag and not config.evals.hellaswag:
        raise ValueError(
            "train.hellaswag=true needs the items: set evals.hellaswag to their file, to published or to hub"
        )
    if config.machine.nnodes > 1 and not config.machine.rendezvous:
        raise ValueError(f"nnodes={config.machine.nnodes} needs rendezvous=HOST:PORT of the first machine")
    check_space(places, config, sum(f.get("bytes", 0) for f in source.identity.get("files", [])))
    objects.check_writable(places.store)  # last: it makes the store's folder


def cpu_ranks(config: RunConfig) -> str:
    """What a command says of a machine whose ranks train without a GPU; empty where they have one."""
    if gpu_count():
        return ""
    ranks = ranks_here(config.machine.gpus)
    return f"no GPU here: training takes {ranks} CPU rank{'s' if ranks > 1 else ''}"


def check_new(places: Places, run: str, config: RunConfig, source: sources.Source) -> None:
    """Refuse a run that would train what another one of the store has trained, or has begun to."""
    if trainings(places):
        from assets import corpus, repeats  # Dagster takes a second to load

        repeats.check_new(silent_maker(places), run, config, corpus.documents_output(source))


def check_items(place: str) -> None:
    """Refuse a place of HellaSwag's items that is neither a file nor a name that `storage.items` knows."""
    named = place in ("", "hub", PUBLISHED) or place.startswith(THROUGH_LIBRARY)
    if not named and not objects.exists(place):
        raise ValueError(
            f"hellaswag={place}: there is no such file; places with a name are {PUBLISHED}, hub and "
            f"{THROUGH_LIBRARY}OWNER/NAME"
        )


def source(places: Places, run: str | None, corpus: str) -> sources.Source:
    """The source of a run, as it was if that has begun. Raises ValueError for one that can't be read."""
    try:
        return source_of(places, run, corpus) if run else sources.resolve(corpus)
    except objects.failures() as error:
        raise ValueError(
            f"the corpus {corpus} can't be read ({error}): check its name, and for s3:// AWS_ACCESS_KEY_ID, "
            "AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL"
        ) from error


def check_inputs(places: Places, run: str, config: RunConfig, names: Sequence[str]) -> None:
    """Refuse to run single stages of a run where what they read has not been made."""
    there = objects.join(places.store, "runs", run)
    reads = {"documents": "inputs.json", "trained_model": "record.json", "hf_model": "export/record.json"}
    readers = {
        "documents": {*names},
        "trained_model": {"hf_model", "samples", "report"},
        "hf_model": {*SUITES, "report"},
    }
    for made, file in reads.items():
        wanted = readers[made] & {*names}
        if wanted and made not in names and not objects.exists(objects.join(there, file)):
            raise ValueError(
                f"{', '.join(sorted(wanted))} of run {run!r} need {made}, which is not made yet: "
                f"`gpt2 run {config.recipe} --name {run}` makes it all"
            )
    for suite, key in (("hellaswag", "evals.hellaswag"), ("core", "evals.core")):
        if [*names] in ([suite], [suite, "report"]) and not settable_keys(config)[key]:
            raise ValueError(f"{suite} of run {run!r} has no data: make a run with --set {key}=… ")


def check_tasks(tasks: str) -> None:
    """Refuse harness tasks that lm-eval does not know: it takes some seconds to say so, training takes hours."""
    suites = [suite for suite in HARNESS_SUITES if suite != "eleuther"]  # which is the tasks that a run names
    if not tasks or tasks in suites:
        return
    listing = "from lm_eval.tasks import TaskManager; print(*TaskManager().all_tasks, sep=chr(10))"
    done = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True)
    known = done.stdout.splitlines()
    for task in tasks.split(","):
        if task not in known:
            near = difflib.get_close_matches(task, [*suites, *known], n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"suites of tasks are {' and '.join(suites)}"
            raise ValueError(f"evals.harness={task}: lm-eval has no such task; {hint}")


def check_ranks(config: RunConfig) -> None:
    """Refuse shard groups, and a total batch, that the ranks can't be divided into or share evenly."""
    ranks = ranks_here(config.machine.gpus) * config.machine.nnodes
    shard_group(config.machine.shard_ranks, ranks)
    unit = ranks * max(config.machine.micro_batch, 1) * config.model.context
    if config.train.batch_tokens % unit:
        near = " or ".join(nearest_multiples(config.train.batch_tokens, unit))
        raise ValueError(
            f"batch_tokens={config.train.batch_tokens} does not divide into {ranks} ranks of micro-batches of "
            f"{unit // ranks} tokens: the nearest that do are {near}"
        )


def check_starting_weights(config: RunConfig) -> None:
    """Refuse weights that are not there, or of another size than the run's model."""
    source, model = config.train.init_from, config.model
    starting_weights.check(source)
    theirs = starting_weights.sizes(source)
    ours = {"n_layer": model.layers, "n_embd": model.channels, "n_head": model.heads, "n_positions": model.context}
    if theirs and theirs != ours:
        names = zip(("layers", "channels", "heads", "context"), theirs.values(), strict=False)
        raise ValueError(
            f"init_from={source} has other sizes than the run's model: add "
            + " ".join(f"--set {name}={value}" for name, value in names)
        )


def check_space(places: Places, config: RunConfig, corpus_bytes: int) -> None:
    """Refuse a store on a disk that can't hold the documents, the tokens, the checkpoints and the export."""
    needed = disk_bytes(config, corpus_bytes)
    for place in {places.store, str(places.home)}:
        free = objects.free_bytes(place)
        if free is not None and free < needed:
            raise ValueError(
                f"{place} has {free / 2**30:.1f} GiB free, this run needs about {needed / 2**30:.1f} GiB "
                f"({on_disk(config)}): choose another disk with --store, or keep fewer checkpoints"
            )


def disk_bytes(config: RunConfig, corpus_bytes: int) -> int:
    """What a run's stages write, at most about, where the corpus's files have so many bytes."""
    checkpoints = _kept_checkpoints(config) * plan.checkpoint_bytes(config)
    return checkpoints + config.model.parameters * EXPORT_BYTES + corpus_copies(config.corpus) * corpus_bytes


def corpus_copies(corpus: str) -> int:
    """Documents and tokens on disk, in sizes of the corpus's files.

    Text is twice its parquet at the most usual (FineWeb-Edu's 1.6 times), and half of that as tokens: 4 bytes of text
    each, 2 as a token. These can lie there twice, in pieces and in shards. Documents of the hub are fetched.
    """
    place = sources.hub_place(corpus)
    if place and place.suffix == ".bin":
        return 1
    return 3 if place else 2


def on_disk(config: RunConfig) -> str:
    return f"documents, tokens, {_kept_checkpoints(config)} checkpoints, the export"


def _kept_checkpoints(config: RunConfig) -> int:
    """And one that is being written."""
    train = config.train
    return train.keep_checkpoints + 1 + (train.steps // train.keep_every if train.keep_every else 0)


def silent_maker(places: Places) -> "Maker":
    """For commands that only ask what there is, or what would be made."""
    from assets.making import Maker  # Dagster takes a second to load
    from assets.resources import Launcher, Silent

    return Maker(places, Launcher(), Silent())
