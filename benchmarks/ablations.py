"""What does each ingredient of the speed recipe bring? The recipe with one taken out, or one more put in.

    python -m benchmarks.ablations --corpus TOKENS_OR_PARQUET --val TOKENS_OR_PARQUET [--only NAME …] [--at-once 4]
        [--recipe modern:d6c384] [--seeds 1] [--steps 300] [--set key=value …] [--json FILE]

A variant is a setting, or a patch of the training code that is applied in the process that trains. Those of the
architecture run on the model as autograd runs it, because the fused kernels know one architecture alone, and stand
beside a base that does the same; the others on the fused kernels, where the machine has them. Only losses are
compared, so runs may share a GPU. A difference is the mean over seeds of a variant's loss less its base's of the
same seed: below zero the variant is better. Rates are the recipe's for every variant, but where its line says more.

FILE and --runs are as for `benchmarks.time_to_loss`.
"""

import argparse
import functools
import itertools
import math
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.time_to_loss import Job, configure, mean, measure, parsed, parser_of, seeds
from benchmarks.token_corpora import Corpora
from storage.shards import is_of
from storage.tokenizer import EOT
from training import assemble, loader, modern, muon, train
from training.config import TrainConfig
from training.modern import MLP, Attention, Modern
from training.muon import ShardedMuon
from training.optim import Bucket
from training.train import Trainer

Put = Callable[[Any, str, Any], None]  # setattr, or what a test takes back
LOGIT_ROWS = 4096  # at once: 0.8 GiB in fp32
EMBEDDING_STD = 0.02  # GPT-2's
JORDAN = (3.4445, -4.7750, 2.0315)


# The architecture. `plain` comes before each of them.


def plain(put: Put) -> None:
    """the recipe without the fused kernels: blocks compiled one by one, logits in parts"""

    def accelerate(model: Modern, device: torch.device, recompute: int, fp8: bool, *_: Any) -> bool:
        if fp8:
            raise ValueError("fp8 is the fused kernels': leave it out, or take --only training")
        return False

    put(assemble, "accelerate", accelerate)
    put(Modern, "forward", loss_in_parts)


def loss_in_parts(model: Modern, tokens: Tensor, targets: Tensor) -> Tensor:
    """As `Modern.forward`, but with LOGIT_ROWS rows of logits in memory at a time."""
    x = model.hidden(tokens).flatten(0, 1)
    summed = _compiled_loss() if x.device.type == "cuda" else summed_loss
    parts = zip(x.split(LOGIT_ROWS), targets.flatten().split(LOGIT_ROWS), strict=True)
    sums = [checkpoint(summed, model, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
    return torch.stack(sums).sum() / len(x)


def summed_loss(model: Modern, x: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(model.head_logits(x).float(), targets, reduction="sum")


@functools.cache
def _compiled_loss() -> Callable[..., Tensor]:
    return torch.compile(summed_loss)


def no_rotary(put: Put) -> None:
    """no positions at all"""
    put(modern, "rotate", lambda x, cos, sin: x)


def no_qk_norm(put: Put) -> None:
    """queries and keys rotated, not normalized"""

    def qkv(self: Attention, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.c_attn(x).view(*x.shape[:2], 3, self.heads, -1).unbind(2)
        return modern.rotate(q, cos, sin), modern.rotate(k, cos, sin), v

    put(Attention, "qkv", qkv)


def gelu(put: Put) -> None:
    """GELU for squared ReLU"""
    put(MLP, "forward", lambda self, x: self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))


def no_cap(put: Put) -> None:
    """logits not capped"""
    put(Modern, "head_logits", lambda self, x: F.linear(x, self.head.weight[: self.config.vocab]))


def no_embedding_norm(put: Put) -> None:
    """no norm behind the embedding, which begins as N(0, 1) as before"""

    def hidden(self: Modern, tokens: Tensor) -> Tensor:
        angles = modern.rotations(tokens.shape[1], self.config.head_size, tokens.device)
        x = self.wte(tokens)
        for block in self.blocks:
            x = block(x, *angles)
        return modern.norm(x)

    put(Modern, "hidden", hidden)


def gpt2_embedding(put: Put) -> None:
    """no norm behind the embedding, which begins as N(0, 0.02); its rate times 0.02 too"""
    no_embedding_norm(put)
    init, layout = Modern.init_weights, ShardedMuon.layout

    def init_weights(self: Modern, seed: int) -> None:
        init(self, seed)
        self.wte.weight.data.mul_(EMBEDDING_STD)

    def slower(self: ShardedMuon, model: Modern) -> list[Bucket]:
        buckets = layout(self, model)
        head, (embedding, rate) = self.tables
        self.tables = [head, (embedding, rate * EMBEDDING_STD)]
        return buckets

    put(Modern, "init_weights", init_weights)
    put(ShardedMuon, "layout", slower)


def no_zero_init(put: Put) -> None:
    """residual projections and head begin like the other matrices, not at zero"""
    init = Modern.init_weights

    def init_weights(self: Modern, seed: int) -> None:
        init(self, seed)
        generator = torch.Generator().manual_seed(seed + 1)
        for name, weight in self.named_parameters():
            if name.endswith(("c_proj.weight", "head.weight")):
                bound = math.sqrt(3.0 / weight.shape[1])
                weight.data.uniform_(-bound, bound, generator=generator)

    put(Modern, "init_weights", init_weights)


# The training.


def base(put: Put) -> None:
    """the recipe"""


def adamw(put: Put) -> None:
    """AdamW for the blocks' matrices, at a twentieth of Muon's rate: 1e-3 at 131,072 tokens a step"""
    bucket_of = ShardedMuon._bucket_of

    def with_moments(self: ShardedMuon, *words: Any) -> Bucket:
        bucket = bucket_of(self, *words)
        momentum = bucket.state.pop("momentum")
        bucket.state |= {"exp_avg": momentum, "exp_avg_sq": torch.zeros_like(momentum)}
        return bucket

    def update(self: ShardedMuon, some: slice, step: int, lr: float, scale: float) -> None:
        for bucket in self.own[some]:
            self.adamw(bucket, step, lr / 20, scale, self.config.weight_decay)

    put(ShardedMuon, "_bucket_of", with_moments)
    put(ShardedMuon, "_muon", update)


def jordan(put: Put) -> None:
    """five Newton-Schulz steps with Jordan's coefficients for Polar Express"""
    put(muon, "COEFFICIENTS", (JORDAN,) * 5)


def qkv_as_one(put: Put) -> None:
    """the weights of queries, keys and values orthogonalized as one matrix, scaled by sqrt(3)"""
    apart = muon.orthogonalize_blocks

    def together(flat: Tensor, channels: int, neurons: Tensor, beta2: float) -> None:
        qkv, squares = flat[:, : 3 * channels**2], neurons[:, : 3 * channels]
        stacked, before = muon.orthogonalize(qkv.reshape(len(flat), 3 * channels, channels)), squares.clone()
        apart(flat, channels, neurons, beta2)
        if beta2:
            muon.even_out(stacked, squares.copy_(before), beta2, dim=-1)
        qkv.copy_(stacked.flatten(1) * 3**0.5)

    put(muon, "orthogonalize_blocks", together)


def no_scaling(put: Put) -> None:
    """updates not scaled by sqrt(rows / columns)"""
    scaled = muon.orthogonalize_blocks

    def unscaled(flat: Tensor, channels: int, neurons: Tensor, beta2: float) -> None:
        scaled(flat, channels, neurons, beta2)
        flat[:, 4 * channels**2 : 8 * channels**2] /= 4**0.5

    put(muon, "orthogonalize_blocks", unscaled)


def no_nesterov(put: Put) -> None:
    """the momentum alone, without Nesterov's look ahead"""

    def accumulate(passes: muon.Passes, gradients: Tensor, momenta: Tensor, updates: Tensor, *words: float) -> None:
        passes.accumulate(gradients, momenta, updates, *words)
        updates.copy_(momenta)

    _replace_pass(put, "accumulate", accumulate)


def plain_decay(put: Put) -> None:
    """all weights decay, not only where it goes the update's way"""

    def apply(passes: muon.Passes, weights: Tensor, masters: Tensor, updates: Tensor, lr: float, decay: float) -> None:
        masters.mul_(1.0 - lr * decay)
        passes.apply(weights, masters, updates, lr, 0.0)

    _replace_pass(put, "apply", apply)


def _replace_pass(put: Put, name: str, function: Callable[..., None]) -> None:
    """One of Muon's two passes over memory by a function that has them as its first argument."""
    made = muon._passes

    def replaced(device: torch.device) -> muon.Passes:
        passes = made(device)
        return passes._replace(**{name: functools.partial(function, passes)})

    put(muon, "_passes", replaced)


def batch_schedule(put: Put) -> None:
    """the first third of the tokens at half the batch, all rates times sqrt(1/2)"""
    whole, update, rate = Trainer.step, ShardedMuon.step, train.learning_rate
    numbers = itertools.count()  # of updates: two a step at first, so that tokens and schedule keep their steps

    def early(config: TrainConfig, step: int) -> bool:
        return step < config.steps // 3

    def learning_rate(config: TrainConfig, step: int) -> float:
        return rate(config, step) * (0.5**0.5 if early(config, step) else 1.0)

    def step(self: Trainer) -> None:
        p, config, micro_steps = self.progress, self.config.train, self.micro_steps
        if early(config, p.step):
            if micro_steps % 2:
                raise ValueError("half a batch wants an even number of micro-steps: take a smaller --micro-batch")
            self.micro_steps //= 2
            self.backward()
            self.optimizer.squared_norm()
            self.optimizer.step(p.step, learning_rate(config, p.step), 1.0)
            p.position += self.sequences
        whole(self)
        self.micro_steps = micro_steps

    put(train, "learning_rate", learning_rate)
    put(ShardedMuon, "step", lambda self, step, lr, scale: update(self, next(numbers), lr, scale))
    put(Trainer, "step", step)


def short_sequences(put: Put) -> None:
    """in the first half of the steps each sequence is two of half the length"""
    backward = Trainer.backward

    def halved(self: Trainer) -> Tensor:
        load = self.load
        if self.progress.step < self.config.train.steps // 2:
            self.load = lambda positions: tuple(t.view(2 * len(t), -1) for t in load(positions))  # type: ignore[assignment]
        total = backward(self)
        self.load = load
        return total

    put(Trainer, "backward", halved)


class Aligned:
    """A shard of which each row is moved on to the first document that begins in it, where one does."""

    def __init__(self, tokens: np.ndarray) -> None:
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: slice) -> np.ndarray:
        tokens = self.tokens[row]
        first = int((tokens == EOT).argmax())  # 0 where there is none
        moved = self.tokens[row.start + first : row.stop + first]
        return moved if len(moved) == len(tokens) else tokens


def aligned_documents(put: Put) -> None:
    """sequences begin where a document does, if one begins in them"""
    opened = loader.open_shard

    def open_shard(path: str) -> Any:
        return Aligned(opened(path)) if is_of(path, "train") else opened(path)

    put(loader, "open_shard", open_shard)


def averaged(put: Put) -> None:
    """the mean of the weights after each of the last tenth of the steps, over which the rate stays as it had become"""
    take, rate = Trainer.step, train.learning_rate
    sums: list[Tensor] = []

    def first(config: TrainConfig) -> int:
        return config.steps - max(3, config.steps // 10)

    def step(self: Trainer) -> None:
        take(self)
        config, buckets = self.config.train, self.optimizer.buckets
        if self.progress.step <= first(config):
            return
        sums[:] = sums or [torch.zeros_like(bucket.part, dtype=torch.float32) for bucket in buckets]
        for total, bucket in zip(sums, buckets, strict=True):
            total += self.optimizer.precise(bucket)
            if self.progress.step == config.steps:
                bucket.part.copy_(total / (config.steps - first(config)))

    put(train, "learning_rate", lambda config, step: rate(config, min(step, first(config))))
    put(Trainer, "step", step)


# By name: settings, or a function that patches. A group's first is its base.
ARCHITECTURE: dict[str, str | Callable[[Put], None]] = {
    "base-plain": plain,
    "no-rotary": no_rotary,
    "no-qk-norm": no_qk_norm,
    "gelu": gelu,
    "no-cap": no_cap,
    "no-embedding-norm": no_embedding_norm,
    "gpt2-embedding": gpt2_embedding,
    "no-zero-init": no_zero_init,
    "heads-of-64": "heads={heads_of_64}",
}
TRAINING: dict[str, str | Callable[[Put], None]] = {
    "base": base,
    "adamw": adamw,
    "jordan": jordan,
    "qkv-as-one": qkv_as_one,
    "no-scaling": no_scaling,
    "no-nesterov": no_nesterov,
    "no-normuon": "neuron_beta2=0",
    "no-decay": "weight_decay=0",
    "plain-decay": plain_decay,
    "no-momentum-warmup": "momentum_warmup_steps=0",
    "no-cooldown": "cooldown=0",
    "all-cooldown": "cooldown=1",
    "clip": "clip=1",
    "batch-schedule": batch_schedule,
    "short-sequences": short_sequences,
    "aligned-documents": aligned_documents,
    "averaged": averaged,
}
GROUPS = {"architecture": ARCHITECTURE, "training": TRAINING}
VARIANTS = ARCHITECTURE | TRAINING


def base_of(name: str) -> str:
    return next(iter(ARCHITECTURE if name in ARCHITECTURE else TRAINING))


def apply(name: str, put: Put) -> None:
    """Patch the training code of this process."""
    for each in dict.fromkeys((base_of(name), name)):
        change = VARIANTS[each]
        if callable(change):
            change(put)


def settings(name: str, options: argparse.Namespace) -> list[str]:
    config = configure(options.recipe, options.set, 1, options)
    return [] if callable(VARIANTS[name]) else [described(name, config.model.channels)]


def described(name: str, channels: int) -> str:
    """The setting of a variant that is one, else what its patch does."""
    change = VARIANTS[name]
    if callable(change):
        return str(change.__doc__)
    return change.format(heads_of_64=channels // 64)


def jobs(options: argparse.Namespace, corpora: Corpora) -> list[Job]:
    """The chosen variants, each group's base first, over the seeds. Raises ValueError for another kind of recipe."""
    base = configure(options.recipe, options.set, 1, options)
    if (base.model.family, base.train.optimizer) != ("nanochat", "muon"):
        raise ValueError(f"--recipe {options.recipe} is not the speed recipe with Muon, whose ingredients these are")
    names = [name for name in VARIANTS if name in options.only or name in map(base_of, options.only)]
    return [
        Job(name, seed, configure(options.recipe, [*options.set, *settings(name, options)], seed, options), corpora,
            ("benchmarks.ablations", "--patch", name))
        for name in names for seed in seeds(options)
    ]  # fmt: skip


def table(results: Sequence[dict[str, Any]]) -> str:
    """A line a variant: its loss, and how far that is from its base's of the same seed."""
    made = {(r["variant"], r["seed"]): r["final_loss"] for r in results if "failed" not in r}
    lines = ["| variant | what it is | final validation loss | difference to base |", "|---|---|---|---|"]
    for name in dict.fromkeys(r["variant"] for r in results):
        config = next(r["config"] for r in results if r["variant"] == name)
        what = described(name, config["model"]["channels"])
        losses = {seed: loss for (variant, seed), loss in made.items() if variant == name}
        apart = [loss - made[base_of(name), seed] for seed, loss in losses.items() if (base_of(name), seed) in made]
        difference = "-" if name == base_of(name) or not apart else mean(apart, ".4f")
        sign = "+" if difference != "-" and statistics.mean(apart) > 0 else ""
        lines.append(f"| {name} | {what} | {mean([*losses.values()], '.4f')} | {sign}{difference} |")
    lines += [f"  {r['variant']}, seed {r['seed']}: {r['failed']}" for r in results if "failed" in r]
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = parser_of("ablations", __doc__)
    parser.set_defaults(recipe="modern:d6c384", steps=300, micro_batch=32, val_every=0)
    names = [*GROUPS, *VARIANTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", default=[*GROUPS], help=", ".join(names))
    options = parsed(parser)
    options.only = [name for given in options.only for name in GROUPS.get(given, (given,))]
    return options


def main() -> int:
    if sys.argv[1:2] == ["--patch"]:  # the process that trains
        apply(sys.argv[2], setattr)
        return train.main(sys.argv[3:])
    options = arguments()
    return measure(options, lambda corpora: jobs(options, corpora), table)


if __name__ == "__main__":
    sys.exit(main())
