"""Where do HellaSwag's items come from in a run? Made once for a store, from the place that the run names."""

from collections.abc import Callable

from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import Event
from storage import items, objects, records
from storage.records import Record
from training.config import EvalConfig

ITEMS_VERSION = "2"


def hellaswag_output(settings: EvalConfig, revision: str = "") -> Output:
    """HellaSwag's validation items, by their file's content or, where they have one, by their commit on the hub."""
    version = items.hellaswag_version(settings.hellaswag)
    definition = {"suite": "hellaswag", "version": version} | ({"revision": revision} if revision else {})
    name = objects.safe_name(version if "hub" in version or ":" in version else version[:8])
    return Output("eval_items", f"eval_items/hellaswag-{name}", ITEMS_VERSION, definition)


def hellaswag_items(maker: Maker, config: StageConfig, settings: EvalConfig) -> Record:
    """Those of the hub stay at the commit that the store first had, unless they are asked for anew."""
    there = None if config.recompute else hellaswag_at_hand(maker, settings)
    revision = revision_at_hand(there) or items.revision_of(settings.hellaswag)
    output = hellaswag_output(settings, revision)
    out = records.folder_url(maker.places.store, output.key)

    def produce(progress: Callable[[Event], None]) -> Produced:
        files = items.hellaswag(settings.hellaswag, out, str(maker.places.home / "downloads"), revision)
        return Produced(files=files, rows=items.HELLASWAG_ITEMS)

    made, _ = maker.make(config, output, produce)
    return made.record


def hellaswag_at_hand(maker: Maker, settings: EvalConfig) -> Record | None:
    """The record of the items, where a place is named and they could be had from there."""
    return records.read_record(maker.places.store, hellaswag_output(settings).key) if settings.hellaswag else None


def revision_at_hand(record: Record | None) -> str:
    """The commit that items were fetched at; empty where they are not there, or come from no hub."""
    return str(record.config.get("revision", "")) if record else ""
