"""How do a corpus's files become shards, and a run begin on them, while others are still being fetched?

The files come from the hub in the step that makes the documents. Each that is whole is tokenized there, in processes
beside the downloads, and shards are cut as soon as they are full; the step that makes the shards goes on from there.
Which shards they are is known before the first file is: the hub's list and the files' ends define them.
"""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial

import dagster as dg

from assets import trainer
from assets.making import Maker, Output, chosen
from assets.resources import Event
from assets.tokens import Pace, tokens_output, work_folder
from assets.turns import turn
from storage import records, sources
from training import tokenization
from training.config import RunConfig


@contextmanager
def tokenized_ahead(
    context: dg.AssetExecutionContext,
    maker: Maker,
    source: sources.Source,
    documents: Output,
    progress: Callable[[Event], None],
) -> Iterator[sources.Progress]:
    """Within this, what has come from the hub becomes shards, and training begins on them, if this job does that.

    Gives what is to be told how many bytes have come, of how many; the tokens are told beside them.
    """
    run = maker.run_config(context.partition_key)
    told: Event = {"event": "bytes", "done": 0, "total": 0}

    def tell(**news: float) -> None:
        told.update(news)
        progress(dict(told))

    with ExitStack() as stack:
        if isinstance(source, sources.Hub) and _by_this_job(context, run):
            tokens = tokens_output(run, documents, source.text_bytes(tokenization.ENOUGH_TEXT))
            stack.enter_context(turn(maker.places.store, tokens.key, partial(maker.warn, "documents")))
            if tokens.reusable(maker.places.store)[0] is None:
                begin = stack.enter_context(trainer.begun_early(context, maker, run, tokens))
                pace = Pace(lambda event: tell(tokens=event["tokens"], tokens_per_second=event["tokens_per_second"]))

                def tell_tokens(made: int, done: int, total: int) -> None:
                    begin()
                    pace.tell(made, done, total)

                stack.enter_context(_at_work(maker, run, source, documents, tokens, tell_tokens))
        yield lambda done, total: tell(done=done, total=total)


def _by_this_job(context: dg.AssetExecutionContext, run: RunConfig) -> bool:
    """Whether it makes the shards, too, and alone: other machines can't know yet which pieces there are."""
    return chosen(context, "token_shards") and run.tokenize.engine == "processes" and not run.tokenize.shared


@contextmanager
def _at_work(
    maker: Maker,
    run: RunConfig,
    source: sources.Hub,
    documents: Output,
    tokens: Output,
    progress: Callable[[int, int, int], None],
) -> Iterator[None]:
    store, ended = maker.places.store, threading.Event()
    folder = records.folder_url(store, documents.key)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(
            tokenization.tokenize_ahead,
            lambda: source.whole(folder),
            out=records.folder_url(store, tokens.key),
            corpus=source.name,
            shard_tokens=tokens.config["shard_tokens"],
            work=work_folder(maker, tokens.key),
            workers=run.machine.workers or maker.cores,
            progress=progress,
            ended=ended,
            root=store,
        )
        ahead.add_done_callback(lambda future: _tell_failure(maker, future))
        try:
            yield
        finally:
            ended.set()


def _tell_failure(maker: Maker, ahead: Future[None]) -> None:
    """The documents are none the worse for it; the step that makes the shards tries again, and says what fails."""
    if failure := ahead.exception():
        message = f"stopped tokenizing ahead of the downloads: {failure}"
        maker.listener.progressed("documents", {"event": "warning", "message": message})
