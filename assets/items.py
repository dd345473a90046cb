"""Where do HellaSwag's items come from in a run? Made once for a store, from the place that the run names."""

from collections.abc import Callable

from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import Event
from storage import items, records
from storage.records import Record
from storage.sources import safe_name
from training.config import EvalConfig

ITEMS_VERSION = "2"


def hellaswag_output(settings: EvalConfig) -> Output:
    """HellaSwag's validation items, by their file's content; the hub's copy is the published one."""
    version = items.hellaswag_version(settings.hellaswag)
    definition = {"suite": "hellaswag", "version": version}
    name = safe_name(version if "hub" in version or ":" in version else version[:8])
    return Output("eval_items", f"eval_items/hellaswag-{name}", ITEMS_VERSION, definition)


def hellaswag_items(maker: Maker, config: StageConfig, settings: EvalConfig) -> Record:
    output = hellaswag_output(settings)
    out = records.folder_url(maker.places.store, output.key)

    def produce(progress: Callable[[Event], None]) -> Produced:
        files = items.hellaswag(settings.hellaswag, out, str(maker.places.home / "downloads"))
        return Produced(files=files, rows=items.HELLASWAG_ITEMS)

    made, _ = maker.make(config, output, produce)
    return made.record


def hellaswag_at_hand(maker: Maker, settings: EvalConfig) -> Record | None:
    """The record of the items, where a place is named and they could be had from there."""
    return records.read_record(maker.places.store, hellaswag_output(settings).key) if settings.hellaswag else None
