"""How is a run trained, after its shards have been made or while they are?

Training reads shards in order and waits for those that are still to come, so it may begin with the first one. The
step that makes the shards then starts it in a thread, and the model's own step joins it. Records tell no difference:
the model is made from the whole tokens, whose record is written before the model's.
"""

import fcntl
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from queue import SimpleQueue
from subprocess import Popen
from typing import IO

import dagster as dg

from assets.failures import Interrupted, ProcessFailed
from assets.items import hellaswag_items, hellaswag_output
from assets.making import Maker, Output, Produced, StageConfig, chosen
from assets.observer import Observer
from assets.resources import POOL, Event, stop
from assets.run_config import DEFINITION, check_no_repeat, resuming
from assets.turns import turn_or_refusal
from storage import objects, records, starting_weights
from storage.items import FILES
from storage.records import Record
from training import launch
from training.arrival import stage_as_they_come
from training.config import RunConfig, defining, to_dict
from training.gpus import ranks_here
from training.processes import started

VERSION = "1"
WEIGHTS_VERSION = "1"
RESUME = {"exact": [], "anyway": ["--resume-anyway"], "no": ["--begin-anew"]}
WAIT = 0.2  # seconds between two looks at a process
KILL_SECONDS = 30.0  # in which torchrun, after the ranks' time to end, kills those that have not

OnEvent = Callable[[Event], None]


def trained_output(name: str, run: RunConfig, tokens: Record | Output) -> Output:
    """Made from its tokens, and from the weights that it starts from, if it does."""
    settings = {"model": defining(run.model), "train": defining(run.train)}
    given = [starting_output(run)] if run.train.init_from else []
    return Output("trained_model", f"runs/{name}", VERSION, settings, [tokens, *given])


def starting_output(run: RunConfig) -> Output:
    found = _starting_weights(run.train.init_from)
    return Output("starting_weights", f"weights/{found.name}", WEIGHTS_VERSION, found.identity)


def record_starting_weights(maker: Maker, run: RunConfig) -> None:
    """Their files' content, and the hub's commit."""
    if run.train.init_from:
        found = _starting_weights(run.train.init_from)
        facts = {"source": found.source, "revision": found.revision}
        maker.make(StageConfig(), starting_output(run), lambda _: Produced(files=found.files, metrics=facts))


@functools.cache  # they are hashed, and fetched where the hub has them
def _starting_weights(source: str) -> starting_weights.StartingWeights:
    return starting_weights.resolve(source)


def train(
    maker: Maker,
    name: str,
    run: RunConfig,
    tokens: str,
    output: Output,
    on_event: OnEvent,
    on_start: Callable[[Popen[str]], None] = lambda process: None,
) -> None:
    """Train the run on the shards of a local folder, in a process, until it ends."""
    ranks = ranks_here(run.machine.gpus)
    hold = Hold(on_start)
    with hold_run(maker, name, hold.lose) as lock:
        claim_run(maker, name, output.fingerprint)
        try:
            maker.launcher.run(
                "training.launch",
                [*_launch_arguments(run, ranks), "training.train", *_train_arguments(maker, name, run, tokens)],
                on_event,
                hold.begin,
                _grace(run),
                lock,
            )
        except (Interrupted, ProcessFailed) as ended:
            if not hold.lost.is_set():
                raise
            message = f"another machine trains run {name!r} now: this one stopped, its last checkpoint is saved"
            raise Interrupted(message) from ended


def claim_run(maker: Maker, run: str, fingerprint: str) -> None:
    """Refuse to train in a run folder that holds the weights of another definition, or what another run trains."""
    check_no_repeat(maker.places, run, fingerprint)
    url = objects.join(maker.places.store, "runs", run, DEFINITION)
    there = objects.read_json(url)["fingerprint"] if objects.exists(url) else fingerprint
    if there != fingerprint:
        raise ValueError(
            f"runs/{run} was trained from other tokens, settings or code ({there[:8]}, now {fingerprint[:8]}): "
            f"its weights are kept; train the new definition as another run, with --name"
        )
    objects.publish_json(url, {"fingerprint": fingerprint})


@contextmanager
def hold_run(maker: Maker, run: str, lost: Callable[[], None] = lambda: None) -> Iterator[IO[str]]:
    """Hold a run while it is trained here: two trainings in one folder would tear each other's files.

    Gives the open file that holds it, for the ranks: where this process is killed, they save a checkpoint, and who
    comes next waits for the last of them. `lost` is called, from a thread, where another machine has taken
    the run over, because this one did not reach the store.
    """
    say = functools.partial(maker.warn, "trained_model")
    path = maker.places.home / "locks" / f"{run}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            if started(int(holder := lock.read() or 0)) != "gone":
                raise ValueError(f"run {run!r} is being trained by process {holder}: wait for it or stop it") from error
            say(f"process {holder} was killed: waiting until its ranks have saved their checkpoint")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        with turn_or_refusal(maker.places.store, run, say, lost):  # of other machines on this store
            yield lock


class Hold:
    """Ends the process that trains once another machine has the run: two would write into one mirror."""

    def __init__(self, on_start: Callable[[Popen[str]], None]):
        self.on_start, self.lost = on_start, threading.Event()
        self.process: Popen[str] | None = None

    def begin(self, process: Popen[str]) -> None:
        self.process = process
        if self.lost.is_set():
            process.terminate()
        self.on_start(process)

    def lose(self) -> None:
        self.lost.set()
        if self.process is not None:
            self.process.terminate()  # at which the ranks save a checkpoint and end


def _grace(run: RunConfig) -> float:
    return launch.ranks_grace(run, ranks_here(run.machine.gpus) * run.machine.nnodes) + KILL_SECONDS


def _launch_arguments(run: RunConfig, ranks: int) -> list[str]:
    arguments = ["--held", "--gpus", str(ranks), "--restarts", str(run.machine.restarts)]
    if run.machine.nnodes > 1:
        arguments += ["--nnodes", str(run.machine.nnodes), "--rendezvous", run.machine.rendezvous]
    return arguments


def _train_arguments(maker: Maker, name: str, run: RunConfig, tokens: str) -> list[str]:
    """The run folder, which holds config.json from here on, and where its tokens and its mirror are.

    Only this start resumes as it was asked to: the next one, a retry or not, goes on from where it comes to.
    """
    folder, lasting = maker.folder(f"runs/{name}"), resuming(run)
    if run != lasting:
        maker.define(name, lasting)
    objects.publish_json(objects.join(folder, "config.json"), to_dict(lasting))
    arguments = [folder, "--tokens", tokens, *RESUME[run.machine.resume]]
    if run.train.hellaswag:
        items = maker.parent(hellaswag_output(run.evals).key, "eval_items")
        arguments += ["--items", objects.join(maker.stage(items), FILES[1])]
    if not objects.is_local(maker.places.store):
        arguments += ["--mirror", records.folder_url(maker.places.store, f"runs/{name}")]
    return arguments


class Training:
    """A training that a thread follows while this process makes its shards. What fails in it is raised by `join`."""

    def __init__(self, maker: Maker, name: str, run: RunConfig, tokens: Output, observer: Observer):
        self.maker, self.name, self.run, self.tokens, self.observer = maker, name, run, tokens, observer
        self.handle: OnEvent = self._show
        self.cancelled = threading.Event()
        self.process: Popen[str] | None = None
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self._follow, daemon=True)
        self.thread.start()

    def _follow(self) -> None:
        remote = records.folder_url(self.maker.places.store, self.tokens.key)
        local = self.maker.folder(self.tokens.key)
        output = trained_output(self.name, self.run, self.tokens)
        try:
            if stage_as_they_come(remote, local, self.cancelled, self._fail):
                self.maker.listener.started("trained_model")
                train(self.maker, self.name, self.run, local, output, lambda e: self.handle(e), self._began)
        except Exception as failure:
            self._fail(failure)

    def _began(self, process: Popen[str]) -> None:
        self.process = process
        if self.cancelled.is_set():
            stop(process, _grace(self.run))

    def _fail(self, failure: Exception) -> None:
        """Say why, once, and have the process end, which would wait for shards that do not come."""
        if self.failure is None:
            self.failure = failure
            self.handle({"event": "failed", "message": str(failure)})
            self._stop_process()

    def _show(self, event: Event) -> None:
        self.observer.see(event, lambda event: self.maker.listener.progressed("trained_model", event))

    def join(self, context: dg.AssetExecutionContext, progress: OnEvent) -> None:
        """Wait for it to end, with its events, in this thread and step from now on. Raises what it failed of."""
        self.observer.context = context
        events: SimpleQueue[Event] = SimpleQueue()
        self.handle = events.put
        try:
            while self.thread.is_alive() or not events.empty():
                if events.empty():
                    time.sleep(WAIT)
                else:
                    self.observer.see(events.get(), progress)
        except BaseException:
            self.stop()
            raise
        if self.failure:
            raise self.failure

    def stop(self) -> None:
        """Have it save a checkpoint and end; nothing happens where it has ended."""
        self._stop_process()
        self.thread.join()

    def _stop_process(self) -> None:
        self.cancelled.set()
        if self.process is not None and self.process.poll() is None:
            stop(self.process, _grace(self.run))


@contextmanager
def begun_early(
    context: dg.AssetExecutionContext, maker: Maker, run: RunConfig, tokens: Output
) -> Iterator[Callable[[], None]]:
    """Gives what begins the training of the run, once its tokens are being made, where this job trains it at all.

    If making them fails, training stops with a checkpoint, and the failure is that of the tokens.
    """
    name = context.partition_key
    wanted = name not in maker.trainings and _wanted(context, maker, name, run, tokens)
    if wanted and run.train.hellaswag:
        hellaswag_items(maker, StageConfig(), run.evals)
    turn = threading.Lock()  # progress is told by the threads of downloads

    def begin() -> None:
        nonlocal wanted
        with turn:
            if wanted and _claimed(context):
                maker.trainings[name] = Training(maker, name, run, tokens, Observer(context, maker, run))
            wanted = False

    try:
        yield begin
    except BaseException:
        stop_early(maker, name)
        _release(context)
        raise


def stop_early(maker: Maker, name: str) -> None:
    """Stop the training that has begun on tokens which turned out to be no good."""
    if training := maker.trainings.pop(name, None):
        training.stop()


def _wanted(context: dg.AssetExecutionContext, maker: Maker, name: str, run: RunConfig, tokens: Output) -> bool:
    """Whether this job trains the run, has to, and can do so before all shards are there."""
    output = trained_output(name, run, tokens)
    there, _ = output.reusable(maker.places.store)
    return chosen(context, "trained_model") and there is None and run.machine.nnodes == 1


def _claimed(context: dg.AssetExecutionContext) -> bool:
    """Take the pool for the model's step, which finds it taken by itself; never wait for it here."""
    pools = context.instance.event_log_storage
    pools.initialize_concurrency_limit_to_default(POOL)
    if all(limit.name != POOL for limit in pools.get_pool_limits()):
        return True
    if pools.claim_concurrency_slot(POOL, context.run_id, "trained_model").is_claimed:
        return True
    _release(context)
    return False


def _release(context: dg.AssetExecutionContext) -> None:
    context.instance.event_log_storage.free_concurrency_slot_for_step(context.run_id, "trained_model")
