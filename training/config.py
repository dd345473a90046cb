"""What is a run? Its whole configuration as frozen, typed values, and how text becomes one."""

import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from training.model_config import ModelConfig, model_from_descriptor

TRAINER_VERSION = "3"  # raise it when the same configuration gives other weights than before


@dataclass(frozen=True)
class TrainConfig:
    """Everything that defines the trained weights, given the tokens. The comment names llm.c's flag."""

    steps: int  # -x: optimizer steps of the whole run
    batch_tokens: int  # -d: tokens an optimizer step, over all ranks
    lr: float  # -l: learning rate, the schedule's maximum
    final_lr_fraction: float = 0.1  # -q: of lr, at the last step
    warmup_steps: int = 700  # -u: steps in which the learning rate rises to its maximum; `constant` has none
    schedule: Literal["cosine", "linear", "constant", "wsd", "trapezoid"] = "cosine"  # -k: how lr falls
    cooldown: float = 0.4  # of `trapezoid`: the share of the run, at its end, in which the rate falls
    weight_decay: float = 0.1  # -c: on 2-D weights only; with Muon on the blocks' only, where it goes the update's way
    beta1: float = 0.9  # AdamW's decay, a step, of the gradients' running mean
    beta2: float = 0.95  # AdamW's decay, a step, of the running mean of their squares
    eps: float = 1e-8  # AdamW's: added to the root of that mean, which it divides by
    clip: float = 1.0  # largest global gradient norm; 0: any
    # with muon, embedding and head are AdamW's at rates of their own; the schedule is one
    optimizer: Literal["adamw", "muon"] = "adamw"  # what updates the weights; muon: the blocks' matrices, at `lr`
    embedding_lr: float = 0.3  # with muon: the embedding's learning rate, the schedule's maximum
    head_lr: float = 0.004  # with muon: the head's learning rate, the schedule's maximum
    momentum: float = 0.95  # Muon's: the decay, a step, of the gradients' running mean
    momentum_warmup_steps: int = 0  # steps in which the momentum rises to that from 0.85
    neuron_beta2: float = 0.0  # Muon's updates are evened out over neurons, by mean squares of that decay; 0: not
    dtype: Literal["bf16", "fp32"] = "bf16"  # of weights, activations and gradients in training
    master_weights: bool = True  # -w: fp32 masters behind bf16 weights; false: stochastic rounding
    fp8: bool = False  # fp8 operands in the blocks' products, but those of weight gradients: Hopper (H100, H200)
    init_seed: int = 42  # of the initial weights, and of the samples while training
    init_from: str = ""  # -e with a checkpoint: a Hugging Face folder or hub name, or an llm.c .bin
    shuffle: bool = True  # a seeded permutation of the sequences within each shard
    order_seed: int = 42  # of the order in which a shard's sequences are read
    overfit: bool = False  # -a: train on the first batch only, to debug
    val_every: int = 250  # -v: steps; 0: only at the end
    val_batches: int = 20  # -m: batches of val_sequences x T tokens each, or as many as the split holds
    val_sequences: int = 128  # a batch of -m: 16 sequences on each of 8 GPUs in the run to reproduce
    hellaswag: bool = False  # -h: HellaSwag's accuracy with each validation loss
    sample_every: int = 0  # -s: steps; 0: only at the end
    sample_tokens: int = 384  # -g: of each sample while training, and of each of the finished model's
    health_every: int = 100  # steps between two looks at the layers' extremes; 0: never
    checkpoint_every: int = 2000  # -n: steps; the last step always
    keep_checkpoints: int = 2  # -nk: the newest that stay
    keep_every: int = 0  # -nm: checkpoints of each such step are never deleted; 0: none
    skip_loss_z: float = 0.0  # -sl: skip updates whose loss has a higher z-score; 0: off
    skip_grad_z: float = 0.0  # -sg: the same for the gradient norm
    on_divergence: Literal["stop", "rewind"] = "stop"  # rewind: to an earlier checkpoint, past the data since

    def __post_init__(self) -> None:
        counts = ("val_batches", "val_sequences", "checkpoint_every", "keep_checkpoints")
        for name in ("steps", "batch_tokens", *counts):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        least_zero = ("warmup_steps", "val_every", "sample_every", "sample_tokens", "health_every", "keep_every")
        for name in (*least_zero, "clip", "momentum_warmup_steps", "weight_decay", "skip_loss_z", "skip_grad_z"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("lr", "embedding_lr", "head_lr", "eps"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0")
        for name in ("cooldown", "momentum", "neuron_beta2", "final_lr_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1, below 1")


# The prompt of GPT-2's best-known sample, and how its texts were drawn: 20 of them are made of every run.
UNICORN = (
    "In a shocking finding, scientist discovered a herd of unicorns living in a remote, previously unexplored "
    "valley, in the Andes Mountains. Even more surprising to the researchers was the fact that the unicorns spoke "
    "perfect English."
)
TEMPERATURE, TOP_K = 1.0, 40
SAMPLES = 20


@dataclass(frozen=True)
class TokenizeConfig:
    shard_tokens: int = 0  # tokens a shard; 0: 100M, or about a twentieth of a small corpus
    engine: Literal["processes", "ray"] = "processes"  # what runs the workers; the bytes are the same
    shared: bool = False  # several machines work on one store's shards, divided by claims; the bytes are the same

    def __post_init__(self) -> None:
        if self.shard_tokens < 0:
            raise ValueError(f"shard_tokens={self.shard_tokens} must not be negative")


# What a run is scored on: an asset, and a file in the run's scores/, of that name each.
SUITES = ("validation_loss", "hellaswag", "completion_demo", "eleuther", "core")


@dataclass(frozen=True)
class EvalConfig:
    completion_items: int = 100  # items made from held-out documents, in HellaSwag's format
    harness_items: int = 100  # of these, how many the Eleuther harness scores
    hellaswag: str = ""  # its validation items: a jsonl (or .gz), published, hub or datasets:NAME; empty: not evaluated
    harness: str = ""  # lm-eval tasks, comma-separated, or leaderboard-v1 or zero-shot; empty: the completion items
    core: str = ""  # DCLM CORE's data: a local folder, fetched there where absent; empty: not evaluated
    dtype: Literal["fp32", "bf16"] = "fp32"  # of the exported weights and of every eval

    def __post_init__(self) -> None:
        if not 4 <= self.completion_items <= 10_000:
            raise ValueError(f"completion_items={self.completion_items} must lie between 4 and 10000")
        if not 1 <= self.harness_items <= self.completion_items:
            raise ValueError(f"harness_items={self.harness_items} must lie between 1 and completion_items")


@dataclass(frozen=True)
class MachineConfig:
    """Where a run runs. None of this changes the result, so none of it enters a fingerprint."""

    gpus: int = 0  # ranks on this machine; 0: every GPU, or one CPU rank
    nnodes: int = 1  # machines; the others run `python -m training.launch` by hand (docs/training.md)
    rendezvous: str = ""  # host:port of the first of several machines
    restarts: int = 0  # starts after a failure, each from the newest checkpoint
    # anyway: also from a checkpoint of other settings, torch or GPU; no: drop the checkpoints and begin anew. Of the
    # next start alone
    resume: Literal["exact", "anyway", "no"] = "exact"  # -y: from the newest checkpoint, as if it had never stopped
    micro_batch: int = 0  # -b: sequences a rank and micro-step; 0: the largest that fits
    shard_ranks: int = 0  # -z: ranks that share one optimizer state; 0: all; 1: each has its own
    timeout: float = 600.0  # seconds after which ranks that wait for each other give up: one of them hangs
    overlap: bool = True  # gradients and weights travel while others are computed; false: to measure what it brings
    recompute: int = -1  # -r: 0 none, 1 GELU, 2 also LayerNorm, 3 whole blocks; -1: the least that fits
    gelu_epilogue: bool = True  # -ge: on a GPU, GELU inside the product before it; the last bits differ
    memory_gib: float = 0.0  # GiB of a GPU that training may take; 0: all of it
    workers: int = 0  # processes that tokenize; 0: one a core
    price_per_gpu_hour: float = 0.0  # dollars an hour of one GPU; 0: none is told, and no cost in dollars is

    def __post_init__(self) -> None:
        if self.recompute not in (-1, 0, 1, 2, 3):
            raise ValueError(f"recompute={self.recompute} must be 0, 1, 2 or 3, or -1 for the least that fits")
        for name in ("memory_gib", "gpus", "micro_batch", "shard_ranks", "workers", "restarts", "price_per_gpu_hour"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        if self.nnodes < 1:
            raise ValueError(f"nnodes={self.nnodes} must be at least 1")
        if self.timeout <= 0:
            raise ValueError(f"timeout={self.timeout} must be above 0")


@dataclass(frozen=True)
class RunConfig:
    """A whole run: the content of `runs/<run>/config.json`. llm.c's -o is that folder."""

    recipe: str
    corpus: str  # -i, -j: a source of training and validation shards: "embedded", a folder of parquet, s3://…
    model: ModelConfig
    train: TrainConfig
    tokenize: TokenizeConfig = field(default_factory=TokenizeConfig)
    evals: EvalConfig = field(default_factory=EvalConfig)
    machine: MachineConfig = field(default_factory=MachineConfig)

    def __post_init__(self) -> None:
        if self.train.batch_tokens % self.model.context:
            raise ValueError(
                f"batch_tokens={self.train.batch_tokens} is not a multiple of the context of "
                f"{self.model.context} tokens: the nearest that are "
                f"{' and '.join(nearest_multiples(self.train.batch_tokens, self.model.context))}"
            )
        if self.model.family != "nanochat" and self.train.optimizer == "muon":
            raise ValueError("optimizer=muon is for the speed recipe's models: take one (model=modern:d12), or adamw")
        if self.model.family == "nanochat" and self.machine.recompute > 0:
            raise ValueError(f"recompute={self.machine.recompute} is for GPT-2 and GPT-3 models: set it to 0 or -1")

    @property
    def tokens(self) -> int:
        """Tokens seen in training."""
        return self.train.steps * self.train.batch_tokens

    @property
    def flops(self) -> int:
        return self.tokens * self.model.flops_per_token


def nearest_multiples(value: int, unit: int) -> list[str]:
    """Those of `unit` that stand beside `value`, for a message; 0 is none."""
    below = value // unit * unit
    return [str(n) for n in (below, below + unit) if n > 0]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as JSON-ready dicts."""
    return dataclasses.asdict(config)


# Settings that came after the first runs: at their defaults they define nothing, so that these runs stay what they are.
LATER = {
    "family",
    "optimizer",
    "embedding_lr",
    "head_lr",
    "momentum",
    "momentum_warmup_steps",
    "neuron_beta2",
    "cooldown",
}


def defining(section: ModelConfig | TrainConfig) -> dict[str, Any]:
    """The settings that tell a run from others."""
    defaults = {f.name: f.default for f in dataclasses.fields(section)}
    return {k: v for k, v in to_dict(section).items() if not (k in LATER and v == defaults[k])}


def from_dict(cls: type, data: dict[str, Any], where: str = "config") -> Any:
    """The inverse of `to_dict`. Raises ValueError for a key or a value that `cls` does not have."""
    hints = typing.get_type_hints(cls)
    if not isinstance(data, dict):
        raise ValueError(f"{where}: {data!r} is no table of settings")
    for key in data:
        if key not in hints:
            raise ValueError(f"{where}: unknown key {key!r}{_suggest(key, hints)}")
    values = {}
    for key, value in data.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            values[key] = from_dict(kind, value, f"{where}.{key}")
        else:
            values[key] = _typed(f"{where}.{key}", kind, value)
    missing = [
        f.name
        for f in dataclasses.fields(cls)
        if f.name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ValueError(f"{where}: missing {', '.join(missing)}")
    return cls(**values)


def override(config: RunConfig, settings: Iterable[str]) -> RunConfig:
    """`config` with settings such as "steps=20" or "train.lr=1e-3" applied.

    A key is a field's name, with its section in front where two sections have it; or `model`, which takes llm.c's
    descriptors ("d48", "gpt3:c1536") for all of the model's sizes.
    Raises ValueError for an unknown key (naming the nearest), an ambiguous one, or a value of another type.
    """
    return typing.cast(RunConfig, from_dict(RunConfig, changed(config, settings)))


def changed(config: RunConfig, settings: Iterable[str]) -> dict[str, Any]:
    """`config` as dicts with the settings applied; whether they go together is not looked at yet."""
    data = to_dict(config)
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise ValueError(f"--set {setting}: write key=value, such as steps=20")
        if key.strip() == "model":
            data["model"] = to_dict(model_from_descriptor(text.strip()))
            continue
        section, name = _locate(config, key.strip())
        kind = typing.get_type_hints(type(getattr(config, section)) if section else RunConfig)[name]
        value = _typed(key, kind, _parse(kind, text.strip()))
        (data[section] if section else data)[name] = value
    return data


def eval_settings(settings: Iterable[str]) -> dict[str, Any]:
    """Settings of EvalConfig alone, such as "hellaswag=items.jsonl" or "evals.dtype=bf16", by their key."""
    hints, found = typing.get_type_hints(EvalConfig), {}
    for setting in settings:
        key, separator, text = setting.partition("=")
        name = key.strip().removeprefix("evals.")
        if not separator or name not in hints:
            raise ValueError(f"--set {setting}: write one of {', '.join(f'{name}=…' for name in hints)}")
        found[name] = _typed(key, hints[name], _parse(hints[name], text.strip()))
    return found


def settable_keys(config: RunConfig) -> dict[str, Any]:
    """Every key that `override` takes, in full ("train.lr"), with its present value."""
    keys: dict[str, Any] = {"corpus": config.corpus}
    for section in _sections(config):
        for f in dataclasses.fields(getattr(config, section)):
            keys[f"{section}.{f.name}"] = getattr(getattr(config, section), f.name)
    return keys


def _sections(config: RunConfig) -> list[str]:
    return [f.name for f in dataclasses.fields(config) if dataclasses.is_dataclass(getattr(config, f.name))]


def _locate(config: RunConfig, key: str) -> tuple[str, str]:
    """(section, field) that `key` names; the section is "" for RunConfig's own fields."""
    known = settable_keys(config)
    matches = [full for full in known if full == key or full.split(".")[-1] == key]
    if not matches:
        names = list(known) + [full.split(".")[-1] for full in known]
        raise ValueError(f"unknown key {key!r}{_suggest(key, names)}; `gpt2 recipes NAME` lists them all")
    if len(matches) > 1:
        raise ValueError(f"key {key!r} is ambiguous: write one of {', '.join(matches)}")
    section, _, name = matches[0].rpartition(".")
    return section, name


def _parse(kind: Any, text: str) -> Any:
    """The value that `text` stands for, left as it is where it is not of that kind."""
    if kind is bool:
        return {"true": True, "false": False, "1": True, "0": False}.get(text.lower(), text)
    if kind is int and re.fullmatch(r"[+-]?\d[\d_,]*", text):
        return int(text.replace(",", "").replace("_", ""))
    if kind is float and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.lower()):
        return float(text)
    return text


def _typed(where: str, kind: Any, value: Any) -> Any:
    """`value` if it is of `kind`, an int being a good float; else ValueError."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{where}={value!r} is none of {', '.join(map(str, choices))}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"{where}={value!r} is not {_an(kind.__name__)}")
    if kind is float and not math.isfinite(value):  # 1e999, or JSON's NaN and Infinity
        raise ValueError(f"{where}={value} is not a finite number")
    return value


def _an(noun: str) -> str:
    nouns = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}
    return nouns.get(noun, noun)


def _suggest(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=3, cutoff=0.6)
    return f" (did you mean {' or '.join(dict.fromkeys(close))}?)" if close else ""
