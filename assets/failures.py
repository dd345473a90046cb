"""How can a launched process end other than well? Errors that the command line tells apart; no Dagster here."""

KEPT = "what is complete is kept, the same command goes on from there"
STOPPED = f"stopped; {KEPT}"  # what a signal comes to
KILLED = f"was killed (SIGKILL), as Linux does where memory runs out; {KEPT}"


class ProcessFailed(RuntimeError):
    """It ended with another status than 0; the message holds the end of its output."""


class CheckFailed(RuntimeError):
    """What was made did not pass a check that blocks what follows; it has no record."""


class Refused(ValueError):
    """It refused its input; the message is its own."""


class Interrupted(RuntimeError):
    """It stopped, because it was told to or its store is lost: training with a checkpoint saved, if it had the time."""
