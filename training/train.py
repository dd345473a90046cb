"""How does a model learn? The training loop, run by every rank under torchrun.

    torchrun --nproc-per-node N -m training.train RUN_FOLDER --tokens FOLDER [--mirror s3://…/runs/RUN]

RUN_FOLDER holds config.json and gets main.log, metrics.jsonl, train.log, checkpoints/ and samples.txt. A run
that has a checkpoint goes on from it. Exit status: 0 when all steps are done, 75 when a signal ended the run
(after a checkpoint), 2 for bad input.
"""

import argparse
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch

from storage import events, objects, records
from storage.checkpoints import complete
from storage.shards import Choice, read_choices
from training import distributed, sample, validation
from training.assemble import assemble, fitted
from training.checkpoint import (
    Checkpointer,
    Keep,
    check_definition,
    check_whole,
    checkpoint_folder,
    definition,
    drop_checkpoints,
    load_model,
    load_optimizer,
    newest,
    pass_over_damaged,
    read_state,
)
from training.config import RunConfig, from_dict, to_dict
from training.distributed import World
from training.energy import EnergyMeter
from training.health import examine
from training.launch import INTERRUPTED, is_restart, report_status
from training.loader import training_loader, validation_loader
from training.metrics import RunLog, utilization
from training.mirror import Mirror, fetch_newest
from training.optim import clip_scale
from training.outliers import OutlierWindow, divergence, is_outlier
from training.processes import die_with_parent
from training.schedule import learning_rate

DIVERGED = FAILED = 1  # exit status
MOST_REWINDS = 3
REWIND_STEPS = 32  # a divergence may have begun this many steps before it is seen
LAST_TRIES, RETRY = 60, 30.0  # of the save after the last step, where it fails, and seconds between them
LAST_UPLOAD = 1800.0  # seconds of trying, where what the last step saved can't be copied to the mirror
LAST_WRITE = 60.0  # seconds at most that a rank which fails leaves to the checkpoint that is being written

log = logging.getLogger("gpt2.train")


@dataclass
class Progress:
    """What the next step depends on beside the weights and the optimizer's state."""

    step: int = 0  # updates tried so far; also the number of the next one
    position: int = 0  # sequences of the order that are used up
    skipped: int = 0  # updates left out as outliers
    skips_in_a_row: int = 0
    rewinds: int = 0  # to an earlier checkpoint, after the run had diverged
    seconds: float = 0.0  # spent in steps
    losses: OutlierWindow = field(default_factory=OutlierWindow)
    norms: OutlierWindow = field(default_factory=OutlierWindow)

    @classmethod
    def of(cls, state: dict[str, Any]) -> "Progress":
        kept = {f.name: state[f.name] for f in fields(cls)}
        windows = {key: OutlierWindow(**kept[key]) for key in ("losses", "norms")}
        return cls(**{**kept, **windows})


class Stop:
    """Whether a signal asked this rank to end. The ranks agree on it at the end of each step."""

    def __init__(self) -> None:
        self.asked = self.agreed = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True


class Trainer:
    def __init__(
        self,
        config: RunConfig,
        run: str,
        tokens: str,
        world: World,
        stop: Stop,
        mirror: str | None = None,
        items: str | None = None,
    ) -> None:
        self.config = config = fitted(config, world)
        self.run, self.world, self.stop = run, world, stop
        self.micro_batch = config.machine.micro_batch
        self.micro_steps = config.train.batch_tokens // (config.model.context * self.micro_batch * world.size)
        order = (config.model.context, config.train.order_seed, config.train.shuffle)
        self.load = training_loader(tokens, *order, world.device)
        self.streaming = True  # some rank may have shards still to come
        checkpoint = newest(run)
        self.definition = definition(config, world.device_name, self.load.order.shard_tokens)
        self.progress = self.resume(checkpoint)
        self.items = _items(config, items)
        self.load_validation = validation_loader(tokens, config.model.context, world.device)
        self.model, self.optimizer = assemble(config, world, checkpoint)
        keep = Keep(config.train.keep_checkpoints, config.train.keep_every)
        self.mirror = Mirror(run, mirror, keep) if mirror and world.is_first else None
        self.checkpoints = Checkpointer(run, world, keep, self.mirror)
        self.checkpoints.reserve(self.optimizer)
        self.stopped = 0.0  # seconds that the last save held up the steps
        self.saved = self.progress.step if checkpoint else -1
        self.log = RunLog(run if world.is_first else None, self.progress.step)
        self.energy = EnergyMeter(world.device)

    def resume(self, checkpoint: Path | None) -> Progress:
        """Raises ValueError for a checkpoint of another definition, unless `resume` is "anyway"."""
        shape = f"{self.world.size} ranks, {self.micro_steps} micro-steps of {self.micro_batch} sequences"
        if checkpoint is None:
            log.info("starting from step 0: %s", shape)
            return Progress()
        state = read_state(checkpoint)
        check_definition(state, self.definition, self.config.machine.resume == "anyway")
        log.info("resumed from %s: %s", checkpoint, shape)
        commit, now = state.get("commit"), records.code_state()[0]
        if commit != now:
            log.info("written by commit %s, this is %s", commit, now)
        if (state["ranks"], state["micro_batch"]) != (self.world.size, self.micro_batch):
            then = f"{state['ranks']} ranks with micro-batches of {state['micro_batch']}"
            log.info("written by %s: the same sequences in the same order, losses equal within rounding", then)
        return Progress.of(state)

    def loop(self) -> int:
        """Train to the last step -> exit status."""
        train, progress = self.config.train, self.progress
        while True:
            last = progress.step == train.steps
            if self.stop.agreed or last or _due(progress.step, train.checkpoint_every):
                self.save()
            if self.stop.agreed:
                return INTERRUPTED
            if last or progress.step == 0 or _due(progress.step, train.val_every):
                self.validate()
            if last or _due(progress.step, train.sample_every):
                self.sample()
            if last:
                return 0
            self.await_data()
            if self.stop.agreed:
                continue
            self.step()
            reason = divergence(progress.skips_in_a_row, progress.losses)
            if reason and not self.rewind(reason):
                return DIVERGED

    def end(self, status: int) -> int:
        """Return once what was saved last is whole, and copied -> exit status. No rank ends before that, which would
        make torchrun end the others."""
        tries = LAST_TRIES if status == 0 else 1  # after a signal there is no time
        while not (saved := self.checkpoints.settle()) and tries > 1:
            time.sleep(RETRY)
            tries -= 1
            self.saved = -1
            self.save()
            if self.world.sums([float(self.stop.asked)]) > [0.0]:
                tries = 1
        copied = True
        with self.world.first_alone("mirror") as first:
            if first and self.mirror:
                copied = self.mirror.finish(LAST_UPLOAD if status == 0 else 0.0)
            if first:
                self.checkpoints.drop_old()
        copied = self.world.sums([float(not copied)]) == [0.0]
        if not saved:
            log.error("the last checkpoint is not saved: what came after step %s is lost", complete(self.run)[-1:])
        if status == 0 and not copied:
            log.error("the last checkpoint is not copied to the mirror: the same command again makes that good")
        return status if saved and (copied or status != 0) else FAILED

    def await_data(self) -> None:
        """Return once every rank has the next step's sequences, or is asked to end: all of them decide the same."""
        until = self.sequences + (0 if self.config.train.overfit else self.progress.position)
        while self.streaming and not self.stop.agreed:
            self.world.reached(self.progress.step)  # waiting for data is no hanging
            here = [self.load.has(until), self.load.complete, self.stop.asked]
            have, complete, stop = self.world.sums([float(yes) for yes in here])
            self.streaming, self.stop.agreed = complete < self.world.size, stop > 0
            if have == self.world.size:
                return
            self.load.arrivals.pause()

    def rewind(self, reason: str) -> bool:
        """Go back to a checkpoint from before the divergence, and on past the data since -> whether that was done."""
        p, train = self.progress, self.config.train
        self.checkpoints.settle()
        good = [step for step in complete(self.run) if step <= p.step - REWIND_STEPS]
        if train.on_divergence == "stop" or p.rewinds == MOST_REWINDS or not good:
            log.error(
                "diverged at step %d: %s. Nothing was saved since; the checkpoints are of steps %s. Lower lr, set "
                "skip_loss_z and skip_grad_z, or on_divergence=rewind", p.step, reason, complete(self.run),
            )  # fmt: skip
            return False
        log.warning("diverged at step %d: %s; back to step %d, past the data since", p.step, reason, good[-1])
        self.checkpoints.drop_after(good[-1])
        checkpoint = checkpoint_folder(self.run, good[-1])
        load_model(checkpoint, self.model)
        load_optimizer(checkpoint, self.optimizer)
        there = Progress.of(read_state(checkpoint))
        for name in ("step", "skipped", "skips_in_a_row", "losses", "norms"):
            setattr(p, name, getattr(there, name))
        p.rewinds += 1
        self.log.cut_back(p.step, "rewind")
        self.saved = -1  # the checkpoint is written anew, with the position past the data
        self.save()
        return True

    def step(self) -> None:
        """One optimizer step over `batch_tokens` tokens."""
        started, p = time.perf_counter(), self.progress
        self.world.reached(p.step)
        lr = learning_rate(self.config.train, p.step)
        share = self.backward()
        self.world.reached(p.step, backward_done=True)
        shares: list[float | torch.Tensor] = [share, self.optimizer.squared_norm()]
        joules = self.energy.joules()  # NaN, as a sum is with it, where a rank can't read its own
        energy = math.nan if joules is None else joules
        loss, squared, stop, energy = self.world.sums([*shares, float(self.stop.asked), energy])
        self.stop.agreed, norm = stop > 0, squared**0.5
        loss_z, norm_z = p.losses.score(loss), p.norms.score(norm)
        train = self.config.train
        if is_outlier(loss_z, train.skip_loss_z) or is_outlier(norm_z, train.skip_grad_z):
            p.skipped += 1
            p.skips_in_a_row += 1
            self.log.skip(p.step, max(loss_z, norm_z))
        else:
            p.skips_in_a_row = 0
            self.optimizer.step(p.step, lr, clip_scale(train.clip, norm))
        self.log.training(p.step, loss, lr, norm)
        self.report(loss, lr, norm, time.perf_counter() - started, None if math.isnan(energy) else energy)
        p.step += 1
        p.position += self.sequences

    @property
    def sequences(self) -> int:
        return self.micro_batch * self.micro_steps * self.world.size

    def backward(self) -> torch.Tensor:
        """Accumulate the step's gradients -> this rank's share of the mean loss."""
        self.optimizer.zero_gradients()
        share = 1.0 / (self.micro_steps * self.world.size)
        start = 0 if self.config.train.overfit else self.progress.position
        total = torch.zeros((), device=self.world.device)
        for micro_step in range(self.micro_steps):
            first = start + (micro_step * self.world.size + self.world.rank) * self.micro_batch
            tokens, targets = self.load(range(first, first + self.micro_batch))
            self.optimizer.expect(last_micro_step=micro_step == self.micro_steps - 1)
            loss = self.model(tokens, targets) * share
            loss.backward()
            total += loss.detach()
        return total

    def validate(self) -> None:
        step, train = self.progress.step, self.config.train
        sequences = train.val_batches * train.val_sequences
        loss = validation.mean_loss(self.model, self.load_validation, sequences, self.micro_batch, self.world)
        self.log.validation(step, loss)
        if self.world.is_first:
            events.emit("validation", step=step, loss=loss)
        if train.hellaswag:
            self.log.accuracy(step, validation.choice_accuracy(self.model, self.items, self.world))

    def sample(self) -> None:
        if self.world.is_first:
            made = sample.generate(self.model, [], self.config.train.sample_tokens, seed=self.config.train.init_seed)
            sample.record(self.run, self.progress.step, sample.text_of(made))

    def save(self) -> None:
        p, started = self.progress, time.perf_counter()
        if p.step != self.saved:
            state = {**asdict(p), "ranks": self.world.size, "micro_batch": self.micro_batch}
            state |= {"config": to_dict(self.config), "definition": self.definition, "commit": records.code_state()[0]}
            self.checkpoints.save(p.step, self.optimizer, state, self.log.sync)
            self.saved, self.stopped = p.step, time.perf_counter() - started
            log.info("step %d is being saved: the copy to host memory held it up for %.3f s", p.step, self.stopped)

    def report(self, loss: float, lr: float, norm: float, seconds: float, joules: float | None) -> None:
        p, world, config = self.progress, self.world, self.config
        p.seconds += seconds
        rate = config.train.batch_tokens / seconds
        shown: dict[str, Any] = {"loss": loss, "lr": lr, "norm": norm, "tokens_per_second": rate}
        shown["mfu"] = utilization(rate, config.model.flops_per_token, world.size, world.device_name)
        shown["seconds"] = seconds
        hours = p.seconds / 3600 * world.size
        kept: dict[str, Any] = {"position": p.position, "skipped": p.skipped, "joules": joules}
        kept["cost"] = hours * config.machine.price_per_gpu_hour or None  # no price is told: not known
        kept["save_seconds"], self.stopped = self.stopped, 0.0
        if world.is_first:
            self.log.metrics(p.step, **shown, **kept, **self.health())
            events.emit("training_step", step=p.step + 1, steps=config.train.steps, **shown)

    def health(self) -> dict[str, Any]:
        every = self.config.train.health_every
        found: dict[str, Any] = {}
        if self.world.device.type == "cuda":
            found["memory"] = torch.cuda.max_memory_allocated()
        if every and self.progress.step % every == 0:
            tokens, _ = self.load([self.progress.position])
            found |= examine(self.model, self.optimizer, tokens)
        return found


def _items(config: RunConfig, path: str | None) -> list[Choice]:
    if not config.train.hellaswag:
        return []
    if path is None:
        raise ValueError("hellaswag=true needs --items, the file of HellaSwag's items")
    return read_choices(path)


def _due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="training.train", description="Train the run of a folder.")
    parser.add_argument("run", help="folder with config.json")
    parser.add_argument("--tokens", required=True, help="folder with token shards")
    parser.add_argument("--mirror", help="location that every checkpoint is copied to, and fetched from")
    parser.add_argument("--items", help="HellaSwag's items in llm.c's format, for hellaswag=true")
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--resume-anyway", action="store_true", help="from a checkpoint of another configuration")
    choice.add_argument("--begin-anew", action="store_true", help="drop the run's checkpoints first")
    options = parser.parse_args(argv)
    die_with_parent(os.getppid())
    try:
        trainer = prepare(options)
    except ValueError as error:
        log.error("%s", error)
        events.refuse(str(error))
        report_status(2)
        return 2
    try:
        status = trainer.end(trainer.loop())
    except RuntimeError:  # of a collective, mostly, which says neither where nor who
        world = trainer.world
        log.error("rank %d failed at step %d. %s", world.rank, trainer.progress.step, world.where())
        raise
    finally:  # an eval or a sample may have failed while the checkpoint before it was being written
        trainer.checkpoints.here.wait(LAST_WRITE)
    report_status(status)
    distributed.leave()
    return status


def prepare(options: argparse.Namespace) -> Trainer:
    config = from_dict(RunConfig, objects.read_json(objects.join(options.run, "config.json")))
    if options.resume_anyway or options.begin_anew:
        resume: Literal["anyway", "no"] = "anyway" if options.resume_anyway else "no"
        config = replace(config, machine=replace(config.machine, resume=resume))
    os.environ.setdefault("TORCH_FR_DUMP_TEMP_FILE", f"{options.run}/flight_recorder_rank_")  # NCCL's, on a timeout
    world = distributed.join(config.machine.shard_ranks, config.machine.timeout)
    stop = Stop()  # not before: a signal ends ranks that are still being loaded, and no other is to wait for them
    _log_to(options.run, world)
    distributed.watch(world, config.machine.timeout)
    with world.first_alone("checkpoints") as first:
        if first and config.machine.resume == "no" and not is_restart():
            drop_checkpoints(options.run, options.mirror)
        elif first:
            find_checkpoint(options.run, options.mirror)
    return Trainer(config, options.run, options.tokens, world, stop, options.mirror, options.items)


def find_checkpoint(run: str, mirror: str | None) -> None:
    """Have the run folder's newest complete checkpoint be the newest that is whole, here or at the mirror.

    Raises ValueError where there are only damaged ones.
    """
    pass_over_damaged(run)
    if mirror:
        try:
            fetch_newest(mirror, run)
        except objects.failures() as error:
            if not is_restart():
                raise
            log.warning("%s can't be asked for a newer checkpoint (%s): going on from what is here", mirror, error)
    check_whole(run)


def _log_to(run: str, world: World) -> None:
    """The first rank's events go to train.log and the terminal, the errors of all to the terminal."""
    terminal = logging.StreamHandler()
    handlers: list[logging.Handler] = [terminal]
    if world.is_first:
        handlers.append(logging.FileHandler(Path(run, "train.log")))
    level = logging.INFO if world.is_first else logging.ERROR
    form = "%(asctime)s %(message)s" if world.is_first else f"rank {world.rank}: %(message)s"
    logging.basicConfig(level=level, format=form, handlers=handlers, force=True)


if __name__ == "__main__":
    sys.exit(main())
