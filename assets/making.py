"""How is an output made, or reused, checked and recorded? One way for every asset."""

import logging
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from assets.failures import KILLED, ProcessFailed
from assets.resources import Event, Launcher, Listener
from assets.run_config import (
    check_documents,
    check_name,
    check_unchanged,
    config_url,
    inputs,
    inputs_url,
    keep_source,
    resuming,
    source_of,
    stored,
)
from assets.turns import turn
from storage import objects, records, sources
from storage.lineage import Lineage
from storage.places import Places
from storage.records import File, Parent, Record
from training import recipes
from training.config import RunConfig, to_dict

if TYPE_CHECKING:
    from assets.trainer import Training

log = logging.getLogger(__name__)


class StageConfig(dg.Config):
    recompute: bool = Field(
        default=False,
        description="Make this output anew even where one of the same fingerprint is there.",
    )


@dataclass(frozen=True)
class Output:
    """What is wanted: its key in the store and everything that defines it."""

    asset: str
    key: str
    code_version: str
    config: dict[str, Any]
    parents: "Sequence[Record | Output]" = ()

    @property
    def fingerprint(self) -> str:
        return records.fingerprint(self.asset, self.code_version, self.config, self.parent_list)

    @property
    def parent_list(self) -> list[Parent]:
        return [Parent(p.key, p.fingerprint) for p in self.parents]

    def reusable(self, store: str) -> tuple[Record | None, str]:
        """The record of the output if it is there, whole and of this fingerprint, and the reason either way."""
        definition = (self.code_version, self.config, self.parent_list)
        return records.reusable(store, self.key, *definition, self.fingerprint)


@dataclass(frozen=True)
class Produced:
    """What came of it. `paths` lie in the local folder; `files` are described already."""

    paths: Sequence[str] = ()
    mirrored: Sequence[str] = ()  # paths of which the process that made them has put copies into the store
    files: Sequence[File] = ()
    rows: int | None = None
    tokens: int | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    gpus: int = 0  # that were held while it was made
    price: float = 0.0  # dollars an hour of one of them; 0: not told
    seconds: float | None = None  # of wall clock, over all attempts; None: of this one
    ledger: dict[str, float | int | None] = field(default_factory=dict)  # more of what it cost


@dataclass(frozen=True)
class Made:
    """An output that is there, made now or found."""

    record: Record
    reused: bool
    reason: str
    seconds: float
    location: str


@dataclass(frozen=True)
class Check:
    """A check of a new output, on its record: `test` returns (passed, numbers that it looked at).

    What it found is kept in the record and shown again where the output is reused. One that fails blocks what
    follows, or only warns.
    """

    name: str
    description: str
    test: Callable[[Record, str], tuple[bool, dict[str, Any]]]
    blocking: bool = True

    def spec(self, asset: str) -> dg.AssetCheckSpec:
        return dg.AssetCheckSpec(self.name, asset=asset, description=self.description, blocking=self.blocking)

    def look(self, record: Record, store: str) -> dict[str, Any]:
        """Whether it passed, and its numbers, as records keep them."""
        if self.name in record.checks:
            return record.checks[self.name]
        passed, numbers = self.test(record, store)
        return {"passed": passed, **numbers}

    def result(self, asset: str, seen: dict[str, Any]) -> dg.AssetCheckResult:
        return dg.AssetCheckResult(
            check_name=self.name,
            asset_key=asset,
            passed=seen["passed"],
            metadata={name: value for name, value in seen.items() if name != "passed"},
            severity=dg.AssetCheckSeverity.ERROR if self.blocking else dg.AssetCheckSeverity.WARN,
        )


@dataclass(frozen=True)
class Maker:
    """The store, the index and the listener: what every asset makes its output with."""

    places: Places
    launcher: Launcher
    listener: Listener
    trainings: "dict[str, Training]" = field(default_factory=dict)  # by run: begun before their step

    @property
    def cores(self) -> int:
        return len(os.sched_getaffinity(0))

    def define(self, run: str, config: RunConfig, retry: bool = False) -> None:
        """Write a run's config.json; a retry leaves `resume` as it is. Raises ValueError where the run exists with
        another definition, or can't have that name."""
        there = stored(self.places, run)
        if there is None:
            check_name(run)
        check_unchanged(self.places, run, config)
        if retry and there is not None:  # the first start has had its choice: checkpoints are dropped once
            config = resuming(config, there.machine.resume)
        objects.publish_json(config_url(self.places, run), to_dict(config))

    def run_config(self, run: str) -> RunConfig:
        """The configuration of a run: its config.json, or the recipe of that name."""
        there = stored(self.places, run)
        if there is not None:
            return there
        if run in recipes.RECIPES:
            config = recipes.recipe(run)
            self.define(run, config)
            return config
        url = config_url(self.places, run)
        raise ValueError(
            f"run {run!r} has no {url} and no recipe has that name: start it with a recipe's job, with "
            f"`gpt2 run RECIPE --name {run}`, or name it after a recipe: {', '.join(recipes.RECIPES)}"
        )

    def source(self, run: str) -> sources.Source:
        """Where a run's documents come from, as it was when the run began."""
        corpus = self.run_config(run).corpus
        source = source_of(self.places, run, corpus)
        check_documents(self.places, run, source)
        return keep_source(self.places, run, corpus, source)

    def parent(self, key: str, asset: str) -> Record:
        record = records.read_record(self.places.store, key)
        if record is None:
            raise ValueError(f"{asset} is not made yet ({key}): materialize {asset} first")
        return record

    def remember_input(self, run: str, **keys: str) -> None:
        """Note which outputs a run reads: its corpus's name in the store is known once it has been resolved."""
        there = self.inputs(run)
        if there | keys != there:
            objects.publish_json(inputs_url(self.places, run), there | keys)

    def inputs(self, run: str) -> dict[str, str]:
        """What `remember_input` noted, name → key."""
        return inputs(self.places, run)

    def input(self, run: str, name: str, asset: str) -> Record:
        """The record of what `remember_input` noted under `name`; `asset` is what makes it."""
        key = self.inputs(run).get(name)
        if key is None:
            raise ValueError(f"{asset} of run {run!r} is not made yet: materialize it first")
        return self.parent(key, asset)

    def folder(self, key: str) -> str:
        """The local folder in which the files of `key` are worked on."""
        return self.places.local_folder(records.folder_url(self.places.store, key))

    def stage(self, record: Record, suffix: str | tuple[str, ...] = "") -> str:
        """The local folder that holds an output's files (of such an ending), copied from S3 if not there yet.

        Raises ValueError where one of them is gone from a local store, or is not what it was.
        """
        folder, wanted = self.folder(record.key), [f for f in record.files if f.path.endswith(suffix)]
        if objects.is_local(self.places.store):
            if problem := records.first_problem(self.places.store, record.key, wanted):
                raise ValueError(f"{record.asset} is not whole, {problem}: `gpt2 run` makes it anew")
        else:
            stamps = _stamps(folder)
            for f in wanted:
                if stamps.get(f.path) != f.sha256:
                    url, local = records.file_url(self.places.store, record.key, f.path), objects.join(folder, f.path)
                    if not (os.path.exists(local) and objects.sha256(local) == f.sha256):
                        objects.copy(url, local)
                    _stamp(folder, [f])
        return folder

    def warn(self, asset: str, message: str) -> None:
        """On the terminal, if there is one, and in the step's log."""
        log.warning(message)
        self.listener.progressed(asset, {"event": "warning", "message": message})

    def make(
        self,
        config: StageConfig,
        output: Output,
        produce: Callable[[Callable[[Event], None]], Produced],
        checks: Sequence[Check] = (),
        together: bool = False,
    ) -> tuple[Made, list[dg.AssetCheckResult]]:
        """Reuse the output if one of its fingerprint is whole, else produce and record it.

        Whoever else wants to make it now, on this machine or another, waits and then reuses it, unless they make it
        `together`. An output whose blocking check fails is left without a record, so that the next run makes it anew.
        """
        began = time.monotonic()
        self.listener.started(output.asset)
        with ExitStack() as stack:
            found, reason = output.reusable(self.places.store)
            if (config.recompute or not found) and not together:
                stack.enter_context(turn(self.places.store, output.key, partial(self.warn, output.asset)))
                found, reason = output.reusable(self.places.store)  # somebody may have made it meanwhile
            if found and config.recompute:
                found, reason = None, "asked for anew"
            return self._make(found, reason, output, produce, checks, began)

    def _make(
        self,
        found: Record | None,
        reason: str,
        output: Output,
        produce: Callable[[Callable[[Event], None]], Produced],
        checks: Sequence[Check],
        began: float,
    ) -> tuple[Made, list[dg.AssetCheckResult]]:
        record = found or self._produce(output, produce)
        looked = [check.look(record, self.places.store) for check in checks]
        reused = record is found
        if not reused:
            record = replace(record, checks={check.name: seen for check, seen in zip(checks, looked, strict=True)})
        failed = [(c.name, s) for c, s in zip(checks, looked, strict=True) if c.blocking and not s["passed"]]
        if not reused and not failed:
            self._remember(record)
        made = Made(
            record,
            reused=reused,
            reason=reason,
            seconds=time.monotonic() - began,
            location=records.output_url(self.places.store, output.key),
        )
        if failed:
            said = "; ".join(f"{name} failed: {_numbers(seen)}" for name, seen in failed)
            self.listener.progressed(output.asset, {"event": "failed", "message": said})
        else:
            self.listener.finished(output.asset, made)
        return made, [check.result(output.asset, seen) for check, seen in zip(checks, looked, strict=True)]

    def _produce(self, output: Output, produce: Callable[[Callable[[Event], None]], Produced]) -> Record:
        started, clock = _now(), time.monotonic()
        try:
            produced = produce(lambda event: self.listener.progressed(output.asset, event))
        except ProcessFailed as error:
            raise ProcessFailed(f"{output.asset}: {error}") from error
        except BrokenProcessPool as error:
            raise ProcessFailed(f"{output.asset}: one of its processes has crashed or {KILLED}") from error
        files = [*produced.files, *self._publish(output.key, produced.paths)]
        files += self._describe(output.key, produced.mirrored)
        seconds = time.monotonic() - clock if produced.seconds is None else produced.seconds
        commit, dirty = records.code_state()
        return Record(
            asset=output.asset,
            key=output.key,
            fingerprint=output.fingerprint,
            code_version=output.code_version,
            config=output.config,
            parents=output.parent_list,
            files=files,
            started=started,
            ended=_now(),
            rows=produced.rows,
            tokens=produced.tokens,
            metrics=produced.metrics,
            cost=_cost(seconds, produced.gpus, produced.price) | produced.ledger,
            commit=commit,
            dirty=dirty,
            versions=records.library_versions(),
            hardware=records.hardware(),
        )

    def _publish(self, key: str, paths: Sequence[str]) -> list[File]:
        local, final = self.folder(key), records.folder_url(self.places.store, key)
        if local != final:
            for path in paths:
                objects.publish_file(objects.join(local, path), objects.join(final, path))
        return self._describe(key, paths)

    def _describe(self, key: str, paths: Sequence[str]) -> list[File]:
        """Files of the store, hashed from their local copies."""
        local, final = self.folder(key), records.folder_url(self.places.store, key)
        described = []
        for path in paths:
            found = objects.stat(objects.join(final, path))
            digest = objects.sha256(objects.join(local, path))
            described.append(File(path, found.bytes, found.modified, digest))
        if local != final:
            _stamp(local, described)
        return described

    def _remember(self, record: Record) -> None:
        """The record and its rows in the index, which needs no look at the rest of the store for that."""
        records.write_record(self.places.store, record)
        Lineage(self.places.lineage).add(self.places.store, record.key)


STAMPS = ".staged.json"  # which content the local copies of an output's files have: path → sha256


def _stamps(folder: str) -> dict[str, str]:
    url = objects.join(folder, STAMPS)
    return objects.read_json(url) if objects.exists(url) else {}


def _stamp(folder: str, files: Sequence[File]) -> None:
    objects.publish_json(objects.join(folder, STAMPS), _stamps(folder) | {f.path: f.sha256 for f in files})


def chosen(context: dg.AssetExecutionContext, asset: str) -> bool:
    """Whether the job makes this asset, too."""
    return dg.AssetKey(asset) in context.job_def.asset_layer.selected_asset_keys


def _cost(seconds: float, gpus: int, price: float) -> dict[str, float | None]:
    """Dollars are those of GPUs whose price is told; what is not known is None, never 0."""
    gpu_hours = seconds / 3600 * gpus
    return {"seconds": round(seconds, 3), "gpu_hours": gpu_hours, "dollars": gpu_hours * price or None, "joules": None}


def _numbers(seen: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in seen.items() if name != "passed")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
