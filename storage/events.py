"""How does a training or eval process tell whoever launched it how far it is?"""

import json
import logging
import os
import sys
from typing import Any

EVENTS_VARIABLE = "GPT2_EVENTS"

log = logging.getLogger("gpt2")


def emit(kind: str, **fields: Any) -> None:
    """Report progress: one JSON line on stdout where a launcher asked for it, a readable log line elsewhere."""
    if os.environ.get(EVENTS_VARIABLE) == "1":
        try:
            sys.stdout.write(json.dumps({"event": kind, **fields}) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # whoever launched this has died: a signal is coming, and a checkpoint to be saved
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:
        log.info("%s %s", kind, " ".join(f"{key}={_short(value)}" for key, value in fields.items()))


def warn(message: str) -> None:
    """Tell whoever launched this process what goes wrong while it goes on; a person reads it in the log anyway."""
    if os.environ.get(EVENTS_VARIABLE) == "1":
        emit("warning", message=message)


def refuse(message: str) -> None:
    """Tell whoever launched this process why it refuses its input; a person reads it in the log anyway."""
    if os.environ.get(EVENTS_VARIABLE) == "1":
        emit("refused", message=message)


def parse(line: str) -> dict[str, Any] | None:
    """The event that a line of a process's output holds, or None for any other line."""
    if not line.startswith('{"event": '):
        return None
    return json.loads(line)


def _short(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)
