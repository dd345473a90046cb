"""Which outputs in the store does a run refer to, whatever of it has been made yet?"""

from collections.abc import Iterator

from assets.corpus import completion_output
from assets.items import hellaswag_output
from assets.making import Maker
from storage import objects, sources


def needs(maker: Maker, run: str) -> Iterator[str]:
    """The keys of a run's documents, shards and items; nothing here is made, and no run has to be finished."""
    config = maker.run_config(run)
    url = objects.join(maker.places.store, "runs", run, "inputs.json")
    inputs: dict[str, str] = objects.read_json(url) if objects.exists(url) else {}
    yield from inputs.values()
    if "documents" not in inputs:  # its name is known once its source has been looked at
        yield f"corpora/{sources.resolve(config.corpus).name}/documents"
    elif "tokens" not in inputs:  # being made, from these documents
        corpus = inputs["documents"].split("/")[1]
        tokens = objects.list_files(objects.join(maker.places.store, "tokens"))
        yield from {f"tokens/{name}" for s in tokens if (name := s.path.split("/")[0]).startswith(corpus)}
    if config.evals.hellaswag:
        yield hellaswag_output(config.evals).key
    if "tokens" in inputs:
        yield completion_output(maker, run, config.evals).key
