"""How is a training shown in Dagster while it runs?"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path

import dagster as dg

from assets.making import Maker
from assets.resources import Event
from assets.shown import image
from evals import report
from storage import objects
from training.config import RunConfig, to_dict

OBSERVE_SECONDS = 300.0  # between two observations of a training: at most 300 a day reach the event log

log = logging.getLogger(__name__)


class Observer:
    """Shows a training in Dagster while it runs: at its first step, then every few minutes, never one a step."""

    def __init__(self, context: dg.AssetExecutionContext, maker: Maker, config: RunConfig):
        self.context = context  # of the step that the training runs in
        self.maker, self.config = maker, config
        self.seconds: list[float] = []  # of the steps since the last observation
        self.last = -math.inf

    def see(self, event: Event, progress: Callable[[Event], None]) -> None:
        progress(event)
        if event["event"] == "training_step":
            self.seconds.append(event["seconds"])
            if time.monotonic() - self.last >= OBSERVE_SECONDS:
                self.last = time.monotonic()
                try:
                    self.observe(event)
                except Exception as error:  # a picture, or Dagster's database, is no reason to end a training
                    message = f"step {event['step']} is not shown in Dagster, the training goes on: {error}"
                    log.exception(message)
                    progress({"event": "warning", "message": message})
                self.seconds = []

    def observe(self, event: Event) -> None:
        """The step's numbers, the hours left at the pace since the last observation, and the curve so far."""
        name = self.context.partition_key
        numbers = {key: value for key, value in event.items() if key != "event" and value is not None}
        pace = sum(self.seconds) / len(self.seconds)
        left = {"hours_left": (event["steps"] - event["step"]) * pace / 3600}
        main_log = Path(self.maker.folder(f"runs/{name}"), "main.log").read_text()
        png = report.live(report.ReportData(name, to_dict(self.config), main_log))
        plot = self.maker.places.home / "live" / f"{name}.png"
        objects.publish_bytes(str(plot), png)
        shown_as = {"loss_so_far": image("loss so far", png), "plot": dg.MetadataValue.path(str(plot))}
        self.context.log_event(dg.AssetObservation("trained_model", partition=name, metadata=numbers | left | shown_as))
