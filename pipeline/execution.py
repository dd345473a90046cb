"""How is a job run from the command line? In this process, in the same instance that the UI shows."""

import difflib
import os
import signal
from collections.abc import Sequence
from types import FrameType
from typing import Any

import dagster as dg
from dagster._core.errors import DagsterAssetCheckFailedError

from assets.failures import KEPT, STOPPED, CheckFailed, Interrupted
from pipeline import definitions, instance
from pipeline.terminal import Terminal
from storage import objects
from storage.lineage import Lineage
from storage.places import Places

LOG_QUIETLY = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def execute(
    places: Places,
    job: str,
    run: str,
    terminal: Terminal,
    only: Sequence[str] = (),
    recompute: Sequence[str] = (),
) -> str:
    """Execute a job for the partition `run` -> Dagster's run id. Raises what the failing stage raised."""
    return _execute(
        places,
        terminal,
        job,
        definitions.rescore(recompute) if recompute else {},
        partition_key=run,
        asset_selection=[dg.AssetKey(name) for name in only] or None,
    )


def execute_model(places: Places, terminal: Terminal, config: dict[str, Any]) -> str:
    """Score one model that is no run -> Dagster's run id. `config` is that of assets.models.ModelConfig."""
    return _execute(places, terminal, "score_models", {"ops": {"score_model": {"config": config}}})


def _execute(
    places: Places, terminal: Terminal, job: str, config: dict[str, Any], partition_key: str = "", **options: Any
) -> str:
    with instance.opened(places) as dagster:
        for dead in instance.sweep(dagster, places):
            terminal.console.print(f"  [yellow]![/yellow] run {dead[:8]} had died; it is marked as failed")
        for holder in instance.holders(dagster):
            terminal.console.print(
                f"  [yellow]![/yellow] the cards are held by {holder}; training and evals wait for it"
            )
        if partition_key:
            dagster.add_dynamic_partitions("run", [partition_key])
            options["partition_key"] = partition_key
        signal.signal(signal.SIGTERM, _as_interrupt)
        try:
            with instance.swept(dagster, places):
                result = (
                    definitions.build(terminal)
                    .resolve_job_def(job)
                    .execute_in_process(instance=dagster, run_config=LOG_QUIETLY | config, **options)
                )
        except dg.DagsterExecutionInterruptedError as interrupted:  # Dagster's name for it, within a step
            raise Interrupted(STOPPED) from interrupted
        except DagsterAssetCheckFailedError as failed:
            raise CheckFailed("; ".join(f"{asset}: {why}" for asset, why in terminal.failed.items())) from failed
        except Exception as error:
            if refusal := objects.refusal(error):  # by now that is no bad input
                raise Interrupted(f"{refusal}; {KEPT}") from error
            raise
        finally:
            terminal.close()
    # Once: the stages have added what they made. After a run that fails, the next command that asks does it.
    Lineage(places.lineage).ingest(places.store)
    return result.run_id


def _as_interrupt(number: int, frame: FrameType | None) -> None:
    """SIGTERM ends a run as Ctrl-C does: Dagster knows how to stop a step at that, with its checkpoint saved."""
    os.kill(os.getpid(), signal.SIGINT)


def stages(only: Sequence[str]) -> list[str]:
    """The assets that `--only` names: by their own name or by their group's. Raises ValueError for others."""
    graph: Any = definitions.defs.resolve_asset_graph()
    groups: dict[str, list[str]] = {}
    for key in graph.toposorted_asset_keys:
        groups.setdefault(graph.get(key).group_name, []).append(key.to_user_string())
    names = [name for members in groups.values() for name in members]
    for word in only:
        if word not in groups and word not in names:
            near = difflib.get_close_matches(word, [*groups, *names], n=2)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ValueError(f"--only {word}: {hint}choose from {', '.join([*groups, *names])}")
    return [name for group, members in groups.items() for name in members if {name, group} & set(only)]
