"""What does each suite ask of a model: which outputs does it read, and with which arguments is it started?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from assets.corpus import completion_output
from assets.items import hellaswag_at_hand
from assets.making import Maker
from assets.tokens import validation_shard
from evals import core_bundle
from evals.run import HARNESS_SUITES
from storage import objects, records
from storage.items import FILES
from storage.records import Record
from training.config import EvalConfig
from training.gpus import gpu_count


@dataclass(frozen=True)
class Asked:
    """One suite's questions, the same for every model that they are put to."""

    suite: str
    arguments: Callable[[], list[str]]  # of evals.run; called only where the suite is scored anew
    reads: Sequence[Record] = ()
    items: int | None = None  # that must be scored, where it is known before
    definition: Mapping[str, Any] = field(default_factory=dict)  # what defines the score beyond what it reads

    def command(self, model: str, out: str, dtype: str) -> list[str]:
        """evals.run's arguments. Where this machine has GPUs, torch must use one: a CPU would take hours, unasked."""
        device = ["--device", "cuda"] if gpu_count() else []
        return [model, "--out", out, "--dtype", dtype, *device, *self.arguments()]


@dataclass(frozen=True)
class Missing:
    """A suite that can't be asked."""

    suite: str
    reason: str  # with the fix


def asked(maker: Maker, suite: str, settings: EvalConfig, run: str = "") -> Asked | Missing:
    """What `suite` asks by these settings; `run` is the one whose shards and items are read."""
    return ASKED[suite](maker, settings, run)


def _validation_loss(maker: Maker, settings: EvalConfig, run: str) -> Asked | Missing:
    if not run:
        return Missing("validation_loss", "it reads a run's validation shard: name the run with --like")
    tokens = maker.input(run, "tokens", "token_shards")
    windows = (tokens.metrics["validation_tokens"] - 1) // maker.run_config(run).model.context
    return Asked(
        "validation_loss",
        lambda: ["--suite", "validation_loss", "--shard", validation_shard(maker, run)],
        [tokens],
        windows,
    )


def _completion_demo(maker: Maker, settings: EvalConfig, run: str) -> Asked | Missing:
    if not run:
        return Missing("completion_demo", "it reads items of a run's held-out documents: name the run with --like")
    items = _completion_items(maker, settings, run)
    return Asked("completion_demo", partial(_on_items, maker, items, "completion_demo"), [items], items.rows)


def _hellaswag(maker: Maker, settings: EvalConfig, run: str) -> Asked | Missing:
    items = hellaswag_at_hand(maker, settings)
    if items is None:
        fix = "set evals.hellaswag to a file, to published or to hub"
        return Missing("hellaswag", f"its items are not at hand: {fix}")
    return Asked("hellaswag", partial(_on_items, maker, items, "hellaswag"), [items], items.rows)


def _eleuther(maker: Maker, settings: EvalConfig, run: str) -> Asked | Missing:
    """Prompts and metrics are the installed lm-eval's, so its version defines the score."""
    tasks, version = settings.harness, {"lm_eval": records.library_versions().get("lm_eval")}
    if tasks in HARNESS_SUITES:
        return Asked("eleuther", lambda: ["--suite", tasks], definition={"tasks": tasks} | version)
    if tasks:
        arguments = ["--suite", "eleuther", "--tasks", tasks]
        return Asked("eleuther", lambda: arguments, definition={"tasks": tasks} | version)
    if not run:
        return Missing("eleuther", "no tasks are named: set harness=leaderboard-v1, or lm-eval's tasks by name")
    items = _completion_items(maker, settings, run)
    limit = min(settings.harness_items, items.rows or 0)
    return Asked("eleuther", partial(_on_items, maker, items, "eleuther", limit), [items], limit, version)


def _core(maker: Maker, settings: EvalConfig, run: str) -> Asked | Missing:
    """Its data is fetched here where it is absent, since what it holds defines the score."""
    if not settings.core:
        return Missing("core", "no data is configured: set evals.core to a folder")
    folder = core_bundle.bundle(settings.core)
    definition = {"bundle": core_bundle.digest(folder)}
    return Asked("core", lambda: ["--suite", "core", "--bundle", folder], definition=definition)


ASKED: dict[str, Callable[[Maker, EvalConfig, str], Asked | Missing]] = {
    "validation_loss": _validation_loss,
    "hellaswag": _hellaswag,
    "completion_demo": _completion_demo,
    "eleuther": _eleuther,
    "core": _core,
}


def _completion_items(maker: Maker, settings: EvalConfig, run: str) -> Record:
    return maker.parent(completion_output(maker, run, settings).key, "eval_items")


def _on_items(maker: Maker, items: Record, suite: str, limit: int = 0) -> list[str]:
    return ["--suite", suite, "--items", objects.join(maker.stage(items), FILES[0]), "--limit", str(limit)]
