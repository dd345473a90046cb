"""Which runs are ready-made? Each recipe is a function that returns a whole configuration.

The GPT-2 recipes follow llm.c's scripts and its discussion 677; where llm.c has no script for a size of
the GPT-3 family, learning rate and batch are the GPT-3 paper's (table 2.1). The speedrun recipes are our own.
"""

import difflib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from training.config import EvalConfig, RunConfig, TrainConfig, changed, from_dict, override
from training.model_config import ModelConfig, model_from_descriptor

HALF_MILLION = 524_288
MILLION = 1_048_576
PUBLISHED_HELLASWAG = EvalConfig(hellaswag="published")  # without a network: said, and not scored


def demo() -> RunConfig:
    """The whole chain in minutes on two CPU cores, offline: a real GPT-2, small enough to learn there."""
    return RunConfig(
        recipe="demo",
        corpus="embedded",
        model=ModelConfig(layers=4, channels=96, heads=3, context=256),
        train=TrainConfig(
            steps=220,
            batch_tokens=1024,
            lr=5e-3,
            final_lr_fraction=0.0,
            warmup_steps=20,
            dtype="fp32",
            val_every=55,
            val_batches=1,
            val_sequences=32,
            sample_tokens=64,
            checkpoint_every=55,
        ),
        evals=EvalConfig(completion_items=100, harness_items=100),
    )


def gpt2_124m() -> RunConfig:
    """llm.c's GPT-2 124M: one epoch of 10B tokens."""
    return RunConfig(
        recipe="gpt2-124m",
        corpus="fineweb-edu-10B",
        model=model_from_descriptor("d12"),
        train=TrainConfig(
            steps=18_865, batch_tokens=HALF_MILLION, lr=6e-4, final_lr_fraction=0.0, checkpoint_every=5000
        ),
        evals=PUBLISHED_HELLASWAG,
    )


def gpt2_350m() -> RunConfig:
    """llm.c's GPT-2 350M: 31.5B tokens."""
    return RunConfig(
        recipe="gpt2-350m",
        corpus="fineweb-edu-100B",
        model=model_from_descriptor("d24"),
        train=TrainConfig(steps=60_000, batch_tokens=HALF_MILLION, lr=3e-4, final_lr_fraction=0.0),
        evals=PUBLISHED_HELLASWAG,
    )


def gpt2_774m() -> RunConfig:
    """llm.c's GPT-2 774M: 150B tokens."""
    return RunConfig(
        recipe="gpt2-774m",
        corpus="fineweb-edu-100B",
        model=model_from_descriptor("d36"),
        train=TrainConfig(
            steps=286_102,
            batch_tokens=HALF_MILLION,
            lr=2.5e-4,
            final_lr_fraction=0.0,
            checkpoint_every=4000,
        ),
        evals=PUBLISHED_HELLASWAG,
    )


def gpt2_1558m() -> RunConfig:
    """The run to reproduce: GPT-2 1558M on 33.6B tokens of FineWeb-Edu (24 hours on 8 H100 with llm.c)."""
    return RunConfig(
        recipe="gpt2-1558m",
        corpus="fineweb-edu-100B",
        model=model_from_descriptor("d48"),
        train=TrainConfig(steps=32_000, batch_tokens=MILLION, lr=6e-4),
        evals=PUBLISHED_HELLASWAG,
    )


def gpt2_1558m_400b() -> RunConfig:
    """The same model on 419B tokens, with updates skipped at a z-score of 5."""
    base = gpt2_1558m()
    train = replace(base.train, steps=400_000, skip_loss_z=5.0, skip_grad_z=5.0)
    return replace(base, recipe="gpt2-1558m-400b", train=train)


def finetune() -> RunConfig:
    """The discussion's second baseline: the released GPT-2 1558M, 1,000 steps at 1e-4 (loss 2.83 to 2.61).

    Its batch, schedule and warm-up are not stated there: those of the run to reproduce, without warm-up.
    """
    base = gpt2_1558m()
    train = replace(
        base.train,
        steps=1000,
        lr=1e-4,
        warmup_steps=0,
        checkpoint_every=500,
        init_from="openai-community/gpt2-xl",
    )
    return replace(base, recipe="finetune", train=train)


def gpt3_125m() -> RunConfig:
    """llm.c's GPT-3 125M: 300B tokens at a context of 2048."""
    return RunConfig(
        recipe="gpt3-125m",
        corpus="fineweb-edu-100B",
        model=model_from_descriptor("gpt3:c768"),
        train=TrainConfig(
            steps=572_204,
            batch_tokens=HALF_MILLION,
            lr=6e-4,
            skip_loss_z=7.0,
            skip_grad_z=7.0,
            checkpoint_every=10_000,
            keep_checkpoints=5,
            keep_every=50_000,
        ),
        evals=PUBLISHED_HELLASWAG,
    )


def gpt3_350m() -> RunConfig:
    """GPT-3 350M, the paper's learning rate and batch."""
    return _gpt3_like_125m("gpt3-350m", "gpt3:c1024", lr=3e-4)


def gpt3_760m() -> RunConfig:
    """GPT-3 760M, the paper's learning rate and batch."""
    return _gpt3_like_125m("gpt3-760m", "gpt3:c1536", lr=2.5e-4)


def gpt3_1_3b() -> RunConfig:
    """GPT-3 1.3B, the paper's learning rate and batch of a million tokens."""
    base = _gpt3_like_125m("gpt3-1.3b", "gpt3:c2048", lr=2e-4)
    return replace(base, train=replace(base.train, steps=286_102, batch_tokens=MILLION))


def _gpt3_like_125m(name: str, model: str, lr: float) -> RunConfig:
    base = gpt3_125m()
    return replace(base, recipe=name, model=model_from_descriptor(model), train=replace(base.train, lr=lr))


# The speed recipe's rates at 12 layers of 768 channels and 131,072 tokens a step, from which the rules below go on.
BASE_CHANNELS, BASE_BATCH = 768, 131_072
MATRIX_LR, EMBEDDING_LR, HEAD_LR = 0.02, 0.3, 0.004
TOKENS_PER_PARAMETER = 12  # of the blocks' matrices and the head: nanochat's horizon
DECAYED = 3.0  # Muon's rate, decay and steps multiplied: weights are a mean over the last third of a run's updates
MOST_DECAY = 0.2  # in short runs
MOMENTUM_WARMUP = 300  # steps, or a sixth of a short run's


def speedrun(name: str, model: ModelConfig, batch_tokens: int = 0, steps: int = 0, lr: float = 0.0) -> RunConfig:
    """The speed recipe for any size: every hyperparameter follows from the model's (docs/recipe.md).

    Steps: 12 tokens a parameter of the blocks' matrices and the head. Batch: grows as the square root of these tokens,
    in powers of two. Rates: Muon's is the same at every width, since its updates have the same effect there; those of
    embedding and head fall as 1 / sqrt(channels); all grow as the square root of the batch. Decay: with Muon's rate,
    such that weights forget over a third of the steps. A batch, steps or Muon's rate other than 0 stand in for what
    would follow.
    """
    tokens = _horizon(model)
    batch_tokens = batch_tokens or _power_of_two(
        BASE_BATCH * (tokens / _horizon(model_from_descriptor("modern:d12"))) ** 0.5
    )
    steps = steps or round(tokens / batch_tokens)
    batch, width = (batch_tokens / BASE_BATCH) ** 0.5, (BASE_CHANNELS / model.channels) ** 0.5
    lr = lr or MATRIX_LR * batch
    train = TrainConfig(
        steps=steps,
        batch_tokens=batch_tokens,
        optimizer="muon",
        lr=lr,
        embedding_lr=EMBEDDING_LR * batch * width,
        head_lr=HEAD_LR * batch * width,
        schedule="trapezoid",
        final_lr_fraction=0.0,
        warmup_steps=0,
        weight_decay=min(MOST_DECAY, DECAYED / (lr * steps)),
        momentum_warmup_steps=min(MOMENTUM_WARMUP, steps // 6),
        neuron_beta2=0.95,
        beta1=0.8,
        clip=0.0,
    )
    return RunConfig(
        name, "fineweb-edu-10B" if tokens < 10e9 else "fineweb-edu-100B", model, train, evals=PUBLISHED_HELLASWAG
    )


def _horizon(model: ModelConfig) -> int:
    return TOKENS_PER_PARAMETER * (model.block_matrices + model.vocab * model.channels)


def _power_of_two(value: float) -> int:
    return 2 ** round(math.log2(value))


def speedrun_124m() -> RunConfig:
    """The speed recipe, 12 layers of 768 channels: 1.5B tokens."""
    return speedrun("speedrun-124m", model_from_descriptor("modern:d12"))


def speedrun_350m() -> RunConfig:
    """The speed recipe, 24 layers of 1024 channels: 4.2B tokens."""
    return speedrun("speedrun-350m", model_from_descriptor("modern:d24"))


def speedrun_1558m() -> RunConfig:
    """The speed recipe, 48 layers of 1536 channels: 17.2B tokens."""
    return speedrun("speedrun-1558m", model_from_descriptor("modern:d48"))


# What llm.c's scripts and its discussion 677 say that their runs took.
REPORTED = {
    "gpt2-124m": "94 min, $20 on 8 A100",
    "gpt2-350m": "13.7 h, $200 on 8 A100",
    "gpt2-774m": "135 h, $2,000 on 8 A100",
    "gpt2-1558m": "24 h, $672 on 8 H100",
    "gpt3-125m": "24 h, $336 on 8 A100",
}

ANY_SIZE = "modern:"  # before a depth, as in modern:d20: the speed recipe for a size that has no name
RECIPES: dict[str, Callable[[], RunConfig]] = {
    "demo": demo,
    "gpt2-124m": gpt2_124m,
    "gpt2-350m": gpt2_350m,
    "gpt2-774m": gpt2_774m,
    "gpt2-1558m": gpt2_1558m,
    "gpt2-1558m-400b": gpt2_1558m_400b,
    "finetune": finetune,
    "gpt3-125m": gpt3_125m,
    "gpt3-350m": gpt3_350m,
    "gpt3-760m": gpt3_760m,
    "gpt3-1.3b": gpt3_1_3b,
    "speedrun-124m": speedrun_124m,
    "speedrun-350m": speedrun_350m,
    "speedrun-1558m": speedrun_1558m,
}


def recipe(name: str, settings: Sequence[str] = ()) -> RunConfig:
    """The recipe of that name, or the speed recipe at "modern:d20" or "modern:d20c1024", with settings ("steps=20").

    Where a setting changes a speed recipe's model, batch, steps or lr, the rest follows, but for what is set.
    Raises ValueError with the nearest names for an unknown one, and as `override` for a setting.
    """
    if name.startswith(ANY_SIZE):
        base = speedrun(name, model_from_descriptor(name))
    elif name in RECIPES:
        base = RECIPES[name]()
    else:
        close = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.4)
        known = f"{', '.join(RECIPES)}, or {ANY_SIZE}d20"
        raise ValueError(
            f"unknown recipe {name!r}: " + (f"did you mean {' or '.join(close)}?" if close else f"choose from {known}")
        )
    if name.startswith((ANY_SIZE, "speedrun-")):
        base = _derived_anew(base, settings)
    return override(base, settings)


def _derived_anew(base: RunConfig, settings: Sequence[str]) -> RunConfig:
    """The speed recipe for the model, the batch, the steps and Muon's rate that the settings name."""
    data = changed(base, settings)
    model = from_dict(ModelConfig, data["model"], "model")
    if model.family != base.model.family:
        return base
    train = from_dict(TrainConfig, data["train"], "train")
    keys = {setting.partition("=")[0].strip() for setting in settings}
    chosen = {key: getattr(train, key) for key in ("batch_tokens", "steps", "lr") if keys & {key, f"train.{key}"}}
    return speedrun(base.recipe, model, **chosen)
