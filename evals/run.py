"""How is one eval run on one model? `python -m evals.run MODEL --suite NAME --out scores/NAME.json`."""

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evals import harness_tasks
from storage import events, models, objects

if TYPE_CHECKING:
    from evals.model import LoadedModel
    from evals.results import EvalResult
    from evals.scoring import Scorer

HARNESS_SUITES = ("eleuther", *harness_tasks.SUITES)
SUITES = ("validation_loss", "hellaswag", "completion_demo", *HARNESS_SUITES, "core")


@dataclass(frozen=True)
class Inputs:
    """What an eval reads, as the command line gave it."""

    items: str
    shard: str
    tasks: tuple[str, ...]
    task_path: str
    bundle: str
    limit: int
    window: int = 0


def main(
    model: Annotated[str, typer.Argument(help="A Hugging Face model folder, or a hub name where there is a network.")],
    suite: Annotated[str, typer.Option(help="One of: " + ", ".join(SUITES))],
    out: Annotated[str, typer.Option(help="The score's JSON file (a path or an s3:// URL).")],
    items: Annotated[str, typer.Option(help="Items in HellaSwag's format: jsonl or jsonl.gz.")] = "",
    shard: Annotated[str, typer.Option(help="A token shard, for validation_loss.")] = "",
    tasks: Annotated[str, typer.Option(help="lm-eval tasks, comma-separated, for eleuther without --items.")] = "",
    task_path: Annotated[str, typer.Option(help="A folder of lm-eval task files of your own, over local data.")] = "",
    bundle: Annotated[str, typer.Option(help="For core: the folder of its data, fetched there if absent.")] = "",
    limit: Annotated[int, typer.Option(min=0, help="Only the first items (validation_loss: tokens); 0: all.")] = 0,
    window: Annotated[int, typer.Option(min=0, help="validation_loss: tokens a window; 0: the model's context.")] = 0,
    batch: Annotated[int, typer.Option(min=0, help="Tokens in a batch; 0: by device. Never changes a score.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Score one model on one suite and write SCORE.json with a per-item parquet beside it."""
    # before torch is loaded: spinning threads take ten times as long on cores that other processes use, too
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    inputs = Inputs(items, shard, tuple(t for t in tasks.split(",") if t), task_path, bundle, limit, window)
    try:
        if Path(model).exists() and _is_local(suite, inputs):  # nothing is on the network: nothing should ask for it
            os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
        run(model, suite, out, inputs, batch, device, dtype)
    except ValueError as error:  # the user's input: one line that says what to do
        sys.stderr.write(f"{error}\n")
        events.refuse(str(error))
        raise typer.Exit(2) from None


def _is_local(suite: str, inputs: Inputs) -> bool:
    """lm-eval's own tasks fetch their data from the hub; all else is files that the command line names."""
    if suite not in HARNESS_SUITES or inputs.items:
        return True
    return bool(inputs.task_path) and harness_tasks.all_own(_tasks(suite, inputs), inputs.task_path)


def _tasks(suite: str, inputs: Inputs) -> list[str]:
    return [part.task for part in harness_tasks.SUITES.get(suite, ())] or list(inputs.tasks)


def run(model: str, suite: str, out: str, inputs: Inputs, batch: int, device: str, dtype: str) -> None:
    check(model, suite, inputs)
    objects.check_address(out)
    if not out.endswith(".json"):
        raise ValueError(f"--out {out!r} must end in .json: the per-item parquet is named after it")
    # here, not above: the check of the arguments answers at once, torch and transformers take seconds
    from evals import results
    from evals.model import load
    from evals.scoring import Scorer

    started = time.monotonic()
    loaded = load(model, device, dtype)
    events.emit("note", message=f"{suite}: {model} on {loaded.device}, loaded in {time.monotonic() - started:.1f} s")
    result = _evaluate(loaded, Scorer(loaded, batch), suite, inputs, _progress(suite))
    page = results.publish(result, out, time.monotonic() - started)
    for name, score in result.scores.items():
        error = "" if score.stderr is None else f" ± {score.stderr:.4f}"
        events.emit("note", message=f"{suite} {name}: {score.value:.4f}{error} over {score.n}")
    events.emit("eval_progress", suite=suite, done=page["items"], total=page["items"])


def check(model: str, suite: str, inputs: Inputs) -> None:
    """Refuse before anything is loaded. A path is a model folder; owner/name may be on the hub."""
    folder = Path(model)
    if not folder.exists() and models.is_path(model):
        raise ValueError(f"{model} does not exist: give a Hugging Face model folder or a hub name")
    if folder.exists() and not (folder / "config.json").exists():
        raise ValueError(f"{model} holds no config.json: give a Hugging Face model folder (a run's `export`)")
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown: use one of {', '.join(SUITES)}")
    if suite == "validation_loss" and not inputs.shard:
        raise ValueError("validation_loss needs a token shard: --shard FOLDER/<corpus>_val_000000.bin")
    if suite in ("hellaswag", "completion_demo") and not inputs.items:
        raise ValueError(f"{suite} needs items in HellaSwag's format: --items FILE.jsonl")
    if suite == "core" and not inputs.bundle:
        raise ValueError("core needs its data: --bundle FOLDER, where the bundle lies or is to be fetched to")
    if suite == "eleuther" and bool(inputs.items) == bool(inputs.tasks):
        raise ValueError("eleuther needs either --tasks NAME,… of lm-eval, or --items FILE.jsonl")
    for option, place in (("--shard", inputs.shard), ("--items", inputs.items), ("--task-path", inputs.task_path)):
        if place and not objects.exists(place):
            raise ValueError(f"{option} {place}: there is no such file or folder")
    if suite in HARNESS_SUITES and importlib.util.find_spec("lm_eval") is None:
        raise ValueError(f"{suite} needs lm-eval, which is not installed: pip install lm-eval==0.4.13")


def _evaluate(
    model: "LoadedModel", scorer: "Scorer", suite: str, inputs: Inputs, progress: Callable[[int, int], None]
) -> "EvalResult":
    """Each suite imports what it needs and no more: lm-eval alone takes seconds."""
    if suite == "validation_loss":
        from evals import validation_loss

        return validation_loss.evaluate(model, scorer, inputs.shard, inputs.limit, progress, inputs.window)
    if suite == "core":
        from evals import core, core_bundle

        return core.evaluate(model, scorer, core_bundle.bundle(inputs.bundle), inputs.limit, progress)
    if suite in HARNESS_SUITES:
        return _harness(model, scorer, suite, inputs, progress)
    from evals import hellaswag

    items = hellaswag.read_items(inputs.items, inputs.limit)
    return hellaswag.evaluate(model, scorer, items, suite, progress=progress)


def _harness(
    model: "LoadedModel", scorer: "Scorer", suite: str, inputs: Inputs, progress: Callable[[int, int], None]
) -> "EvalResult":
    from evals import harness, hellaswag

    if inputs.items:
        items = hellaswag.read_items(inputs.items, inputs.limit)
        return harness.evaluate_items(model, scorer, items, progress=progress, suite=suite)
    parts = harness_tasks.SUITES.get(suite) or [harness_tasks.Part(task) for task in inputs.tasks]
    return harness.evaluate(model, scorer, parts, inputs.task_path, inputs.limit, progress, suite)


def _progress(suite: str) -> Callable[[int, int], None]:
    """At most one event a second."""
    last = 0.0

    def report(done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= 1.0:
            last = time.monotonic()
            events.emit("eval_progress", suite=suite, done=done, total=total)

    return report


if __name__ == "__main__":
    typer.run(main)
