"""How good is a model that is no run: a Hugging Face folder, the hub's, or a run asked what another one was asked?

Scores lie under models/<name>-<digits>/scores, with records whose parent is the model's own: the sha256 of its files,
or its repository and commit on the hub. The same model and questions are answered once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import dagster as dg

from assets import shown
from assets.asked import Asked, Missing, asked
from assets.items import hellaswag_items
from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import POOL, Event
from assets.scores import score
from storage import models, objects, records
from storage.records import Record
from training.config import EvalConfig, from_dict

VERSION = "1"
FOLDER = "models"


class ModelConfig(dg.Config):
    model: str  # a folder, a hub name, or a run
    suites: list[str]
    like: str = ""  # the run whose shards, items and settings are used
    settings: dict[str, Any] = {}  # EvalConfig's, where they differ from the run's or the defaults
    recompute: bool = False


@dataclass(frozen=True)
class Subject:
    """A model to be asked."""

    place: str  # in the store
    record: Record
    folder: Callable[[], str]  # its local folder


@dg.op(pool=POOL)
def score_model(context: dg.OpExecutionContext, config: ModelConfig, maker: dg.ResourceParam[Maker]) -> None:
    """Score one model on each suite; Dagster shows the scores as assets under models/."""
    settings = settings_of(maker, config.like, config.settings)
    if "hellaswag" in config.suites and settings.hellaswag:
        hellaswag_items(maker, StageConfig(), settings)
    subject = subject_of(maker, config.model)
    run = config.like or (config.model if subject.record.asset == "hf_model" else "")
    price = maker.run_config(run).machine.price_per_gpu_hour if run else 0.0
    for questions in questions_of(maker, config.suites, settings, config.like):
        stage = StageConfig(recompute=config.recompute)
        made, checks = score(
            maker, stage, questions, subject.place, subject.record, subject.folder, settings.dtype, price
        )
        key = [*subject.place.split("/"), questions.suite]
        context.log_event(
            dg.AssetMaterialization(key, metadata=shown.scores(made.record.metrics["scores"]) | shown.describe(made))
        )
        if not all(check.passed for check in checks):
            raise ValueError(f"{questions.suite} of {config.model} is not whole: {made.record.metrics}")


@dg.job
def score_models() -> None:
    """Score a model that is no run: start it with `gpt2 evals MODEL`."""
    score_model()


def settings_of(maker: Maker, like: str, changed: Mapping[str, Any]) -> EvalConfig:
    base = maker.run_config(like).evals if like else EvalConfig()
    return from_dict(EvalConfig, asdict(base) | dict(changed))


def questions_of(maker: Maker, suites: Sequence[str], settings: EvalConfig, like: str) -> list[Asked]:
    """Raises ValueError for a suite that can't be asked: nothing is scored then."""
    found = [asked(maker, suite, settings, like) for suite in suites]
    for missing in found:
        if isinstance(missing, Missing):
            raise ValueError(f"{missing.suite} can't be scored: {missing.reason}")
    return [_of_any_model(maker, questions, like) for questions in found if isinstance(questions, Asked)]


def _of_any_model(maker: Maker, questions: Asked, like: str) -> Asked:
    """Windows as long as the run's, whatever the model's context; their number depends on its vocabulary."""
    if questions.suite != "validation_loss":
        return questions
    window = maker.run_config(like).model.context
    arguments = questions.arguments
    return replace(
        questions,
        arguments=lambda: [*arguments(), "--window", str(window)],
        items=None,
        definition={"window": window},
    )


def subject_of(maker: Maker, name: str) -> Subject:
    """A run's export, or a model that is no run, with a record of its own."""
    export = records.read_record(maker.places.store, f"runs/{name}/export")
    if export is not None:
        place = f"{FOLDER}/{name}-{export.fingerprint[:8]}"
        return Subject(place, export, lambda: maker.stage(export))
    model = models.resolve(name)
    output = model_output(model)
    made, _ = maker.make(StageConfig(), output, lambda progress: _produce(model, progress))
    return Subject(output.key, made.record, lambda: models.fetch(model))


def model_output(model: models.Model) -> Output:
    digits = records.fingerprint("model", VERSION, model.identity, [])[:8]
    return Output("model", f"{FOLDER}/{model.name}-{digits}", VERSION, model.identity)


def _produce(model: models.Model, progress: Callable[[Event], None]) -> Produced:
    """Its files stay where they are."""
    folder = models.fetch(model)
    names = [s.path for s in objects.list_files(folder) if models.counts(s.path)]
    described = [records.describe_file(folder, name) for name in names]
    files = [replace(file, path=objects.join(folder, file.path)) for file in described]
    return Produced(files=files, metrics={"name": model.name, "source": model.identity.get("repo", model.folder)})


def scored_here(store: str) -> dict[str, list[Record]]:
    """The scores of every model in the store, by its folder under models/."""
    found: dict[str, list[Record]] = {}
    for stat in objects.list_files(objects.join(store, FOLDER), ".record.json"):
        url = objects.join(store, FOLDER, stat.path)
        record = records.from_json(url, objects.read_json(url))
        found.setdefault(stat.path.split("/")[0], []).append(record)
    return found
