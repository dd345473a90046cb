"""How can a launched process end other than well? Errors that the command line tells apart; no Dagster here."""

STOPPED = "stopped; what is complete is kept, the same command goes on from there"  # what a signal comes to


class ProcessFailed(RuntimeError):
    """It ended with another status than 0; the message holds the end of its output."""


class CheckFailed(RuntimeError):
    """What was made did not pass a check that blocks what follows; it has no record."""


class Refused(ValueError):
    """It refused its input; the message is its own."""


class Interrupted(RuntimeError):
    """Training saved a checkpoint and stopped, because it was told to."""
