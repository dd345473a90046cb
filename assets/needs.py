"""Which outputs in the store does a run refer to, or may it make, whatever of it has been made yet?"""

import logging
from collections.abc import Iterator

from assets.corpus import completion_output
from assets.items import hellaswag_output
from assets.making import Maker
from assets.run_config import documents_key, source_of
from storage import contents, objects
from training.config import SUITES

log = logging.getLogger(__name__)


def needs(maker: Maker, run: str) -> Iterator[str]:
    """The keys of a run's documents, shards and items; nothing here is made, and no run has to be finished."""
    config = maker.run_config(run)
    inputs = maker.inputs(run)
    yield from inputs.values()
    documents = {inputs["documents"]} if "documents" in inputs else _documents(maker, run, config.corpus)
    yield from documents
    if "tokens" not in inputs:  # being made, from these documents, which may still be on their way
        corpora = tuple(key.split("/")[1] for key in documents)
        tokens = objects.list_files(objects.join(maker.places.store, "tokens"))
        yield from {f"tokens/{name}" for s in tokens if (name := s.path.split("/")[0]).startswith(corpora)}
    if config.evals.hellaswag:
        yield hellaswag_output(config.evals).key
    if "tokens" in inputs:
        yield completion_output(maker, run, config.evals).key


def stages(run: str) -> Iterator[str]:
    """The keys of what a run may make of its own."""
    yield from (f"runs/{run}", *(f"runs/{run}/{stage}" for stage in ("export", "samples", "report")))
    yield from (f"runs/{run}/scores/{suite}" for suite in SUITES)


def _documents(maker: Maker, run: str, corpus: str) -> set[str]:
    """Their key is known once the source has been looked at; where it can't be, any in the store may be meant."""
    try:
        return {documents_key(source_of(maker.places, run, corpus))}
    except contents.failures() as error:
        log.warning("run %r has no documents yet and its corpus can't be read (%s): every corpus is kept", run, error)
        there = objects.list_files(objects.join(maker.places.store, "corpora"))
        return {f"corpora/{s.path.split('/')[0]}/documents" for s in there}
