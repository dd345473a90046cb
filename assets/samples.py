"""What does the finished model write? Twenty texts from one prompt, the same for every run."""

from collections.abc import Callable

import dagster as dg

from assets.making import Maker, Output, Produced, StageConfig
from assets.resources import POOL, RUNS, Event
from assets.shown import materialize
from storage import objects, records
from storage.records import Record
from training.config import SAMPLES, TEMPERATURE, TOP_K, UNICORN, RunConfig
from training.gpus import gpu_count

VERSION = "1"
FILE = "unicorns.txt"
SHOWN = 3000  # characters, in Dagster


@dg.asset(
    partitions_def=RUNS,
    group_name="training",
    kinds={"pytorch"},
    code_version=VERSION,
    deps=["trained_model"],
    pool=POOL,
)
def samples(
    context: dg.AssetExecutionContext, config: StageConfig, maker: dg.ResourceParam[Maker]
) -> dg.MaterializeResult:
    """Twenty continuations of GPT-2's unicorn prompt, as long as the run's sample_tokens."""
    name = context.partition_key
    run = maker.run_config(name)
    trained = maker.parent(f"runs/{name}", "trained_model")
    output = samples_output(name, run, trained)

    def produce(progress: Callable[[Event], None]) -> Produced:
        out = objects.join(maker.folder(output.key), FILE)
        options = [f"--{key.replace('_', '-')}={value}" for key, value in output.config.items() if key != "prompt"]
        maker.launcher.run("training.sample", [maker.stage(trained), UNICORN, *options, "--out", out], progress)
        return Produced(
            paths=[FILE],
            rows=SAMPLES,
            metrics={"tokens_each": output.config["tokens"]},
            gpus=min(gpu_count(), 1),
            price=run.machine.price_per_gpu_hour,
        )

    made, _ = maker.make(config, output, produce)
    text = read(maker, made.record)[:SHOWN]
    return materialize(made, metadata={"samples": dg.MetadataValue.md(f"```\n{text}\n```")})


def samples_output(name: str, run: RunConfig, trained: Record) -> Output:
    defining = {"prompt": UNICORN, "count": SAMPLES, "tokens": max(1, run.train.sample_tokens), "seed": 0}
    return Output(
        "samples", f"runs/{name}/samples", VERSION, defining | {"temperature": TEMPERATURE, "top_k": TOP_K}, [trained]
    )


def read(maker: Maker, record: Record) -> str:
    return objects.read_text(records.file_url(maker.places.store, record.key, FILE))
