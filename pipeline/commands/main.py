"""The `gpt2` command: every group of commands in one place, and what a failure says."""

import io
import sys
import warnings
from typing import TYPE_CHECKING

from assets.failures import STOPPED, CheckFailed, Interrupted, ProcessFailed

if TYPE_CHECKING:  # a second goes by until all is loaded: Ctrl-C in it is for `main` to answer
    import typer

HELP = "Reproduce GPT-2: FineWeb-Edu to tokens, training, export, evals and a report, with the lineage of it all."
INTERRUPTED = 130  # what Typer ends with, without a word, at Ctrl-C


def build(asked: str = "") -> "typer.Typer":
    """The command. Where its first word `asked` for the lineage, it is without the others: they load longer than an
    answer takes."""
    import typer

    from pipeline.commands import lineage

    app = typer.Typer(
        help=HELP,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    if asked != "lineage":
        from pipeline.commands import compare, evals, model, run, store

        for group in (run, evals, model, compare):
            group.add_to(app)
    app.add_typer(lineage.app, name="lineage")
    if asked != "lineage":
        app.add_typer(store.app, name="store")
    return app


def main() -> None:
    """Exit status 0: done; 2: bad input, one line that names the value and the fix; 1: anything else."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without Unicode shows ? for what it has no sign for
    warnings.filterwarnings("ignore", message=".*is currently in beta")  # of Dagster's own code, about itself
    try:
        build(*sys.argv[1:2])(prog_name="gpt2")
    except ValueError as error:
        sys.exit(_say(str(error), 2))
    except (CheckFailed, Interrupted, ProcessFailed) as error:
        sys.exit(_say(str(error), 1))
    except KeyboardInterrupt:
        sys.exit(_say(STOPPED, 1))
    except SystemExit as ended:
        if ended.code == INTERRUPTED:
            sys.exit(_say(STOPPED, 1))
        raise
    except Exception as error:
        from storage import objects

        if refusal := objects.refusal(error):
            sys.exit(_say(refusal, 2))
        raise


def _say(message: str, status: int) -> int:
    sys.stderr.write(f"gpt2: {message}\n")
    return status


if __name__ == "__main__":
    main()
