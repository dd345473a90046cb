"""How is a run started from Dagster's launchpad? With typed settings, checked before anything is launched.

The partition that a job is launched for is the run's name. The resource `new_run` holds what the run is; without
it a job goes on with the run of that name.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Mapping
from typing import Any

import dagster as dg

from assets.resources import NewRun
from pipeline import runs
from storage.places import places
from storage.sources import HUB_FOLDERS
from training import recipes
from training.config import RunConfig, to_dict
from training.gpus import check_gpus

ELSEWHERE = "elsewhere"  # the corpus that `corpus_at` names
CORPORA = ("embedded", *HUB_FOLDERS, ELSEWHERE)


class Refused(dg.DagsterError):
    """Settings that no run can have; raised before the run is launched."""


def jobs() -> list[Any]:
    """One job a recipe, filled in with all of its settings."""
    return [_job(name, make()) for name, make in recipes.RECIPES.items()]


def new_run() -> dg.ResourceDefinition:
    """The resource that tells the first asset what a new run is; its settings are read when a run is launched."""
    settled = dg.ResourceDefinition(
        lambda context: NewRun(context.resource_config["run"]),
        dg.Shape({"run": dg.Field(dg.Noneable(dg.Permissive()), default_value=None)}),
    )
    schema = dg.Field(dg.Shape(_schema()), is_required=False, description="What the run is, where it is a new one.")
    return dg.configured(settled, schema)(_settle)


def job_name(recipe: str) -> str:
    """Dagster's names are words: gpt2_1558m for gpt2-1558m."""
    return re.sub(r"\W", "_", recipe)


def _job(name: str, config: RunConfig) -> Any:
    values = _without_tiny(to_dict(config))
    named = {"corpus": config.corpus} if config.corpus in CORPORA else {}
    elsewhere = {} if named else {"corpus": ELSEWHERE, "corpus_at": config.corpus}
    return dg.define_asset_job(
        job_name(name),
        dg.AssetSelection.all(),
        config={"resources": {"new_run": {"config": values | named | elsewhere}}},
        description=f"{inspect.getdoc(recipes.RECIPES[name])} The partition is the new run's name: add one.",
    )


def _without_tiny(values: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out numbers that the page would write as 1e-8, which YAML reads as a word; they stay the recipe's."""
    kept = {key: _without_tiny(value) if isinstance(value, Mapping) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if not (isinstance(value, float) and 0 < value < 1e-6)}


def _settle(values: Mapping[str, Any]) -> dict[str, Any]:
    """The whole definition of the run that was asked for. Raises Refused where it can't succeed."""
    if not values:
        return {"run": None}
    try:
        config = runs.settled(_config(values))
        check_gpus(config.machine.gpus)
        runs.check_possible(places(), config, runs.source(places(), None, config.corpus))
    except ValueError as error:
        raise Refused(str(error)) from None  # the page shows the whole chain
    return {"run": to_dict(config)}


def _config(values: Mapping[str, Any]) -> RunConfig:
    if "recipe" not in values:
        raise ValueError(f"a new run with {', '.join(values)} needs its recipe: one of {', '.join(recipes.RECIPES)}")
    sections = {name: section for name, section in values.items() if isinstance(section, Mapping)}
    given = [f"{name}.{key}={value}" for name, section in sections.items() for key, value in section.items()]
    config = recipes.recipe(values["recipe"], given)
    return dataclasses.replace(config, corpus=_corpus(values) or config.corpus)


def _corpus(values: Mapping[str, Any]) -> str:
    """The one that is named, or none. Raises ValueError for a corpus that is named twice, or not at all."""
    chosen, place = values.get("corpus"), values.get("corpus_at", "")
    if (chosen == ELSEWHERE) != bool(place):
        raise ValueError(f"corpus={chosen} with corpus_at={place!r}: corpus_at goes with corpus: {ELSEWHERE}, only")
    return place or chosen or ""


def _schema() -> dict[str, dg.Field]:
    """Every setting with its type; what is left out is the recipe's."""
    described = [dg.EnumValue(n, description=str(inspect.getdoc(make))) for n, make in recipes.RECIPES.items()]
    hints = typing.get_type_hints(RunConfig)
    sections = {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return {
        "recipe": _field(dg.Enum("Recipe", described), "What to train; all that is left out here is the recipe's."),
        "corpus": _field(_enum("Corpus", CORPORA), "The documents to train on."),
        "corpus_at": _field(
            str, f"With corpus {ELSEWHERE}: a folder of parquet files, s3://bucket/folder, or what else there is."
        ),
    } | {name: _field(dg.Shape(_fields(kind)), str(inspect.getdoc(kind))) for name, kind in sections.items()}


def _fields(section: Any) -> dict[str, dg.Field]:
    """The fields of a part of the configuration, with the comments beside them as their descriptions."""
    said = comments(section)
    return {
        name: _field(_kind(f"{section.__name__}_{name}", hint), said.get(name))
        for name, hint in typing.get_type_hints(section).items()
    }


def _kind(name: str, hint: Any) -> Any:
    return _enum(name, typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else hint


def _enum(name: str, values: tuple[str, ...]) -> dg.Enum:
    return dg.Enum(name, [dg.EnumValue(value) for value in values])


def _field(kind: Any, description: str | None) -> dg.Field:
    return dg.Field(kind, is_required=False, description=description)


def comments(cls: type) -> dict[str, str]:
    """The comment that stands beside each field of a dataclass."""
    return dict(re.findall(r"^    (\w+): [^#\n]*  # (.+)$", inspect.getsource(cls), re.MULTILINE))
