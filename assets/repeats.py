"""Has another run of the store trained what this one would train? Asked before anything of it is made."""

from assets.making import Maker, Output
from assets.run_config import check_no_repeat, trainings
from assets.tokens import tokens_output
from assets.trainer import trained_output
from storage import records
from training.config import RunConfig


def check_new(maker: Maker, run: str, config: RunConfig, documents: Output) -> None:
    """Raises ValueError, naming the other run.

    Where the documents have not been made here, no other run can have read them, or what it read is not known now: the
    training itself asks again.
    """
    store = maker.places.store
    there = records.read_record(store, documents.key) if trainings(maker.places) else None
    if there is not None and there.fingerprint == documents.fingerprint:
        tokens = tokens_output(config, there, there.metrics["text_bytes"])
        check_no_repeat(maker.places, run, trained_output(run, config, tokens).fingerprint)
