"""How fast is a GPU that is in no table? A micro-step of a run, from the first layers of its model, in seconds.

    python -m training.probe < CONFIG.json

The trainer's own kernels at the run's shapes, with one layer and with three: their difference is a layer's time.
CONFIG.json is a run's, its micro-batch and recompute level set. Prints one line of JSON.
"""

import json
import logging
import sys
from dataclasses import replace

from training import distributed
from training.bench import Bench
from training.config import RunConfig, from_dict
from training.distributed import World

FEW, MORE = 1, 3  # layers
MICRO_STEPS = 4  # a step: the optimizer's share is small, as in a run
REPEATS = 3  # after one step to warm up; the fastest counts


def micro_step_seconds(config: RunConfig, world: World) -> float:
    """Of all layers. Raises ValueError where the GPU is too busy with other work to tell a layer's time."""
    layers = config.model.layers
    if layers <= MORE:
        return _timed(config, world, layers)
    few, more = (_timed(config, world, n) for n in (FEW, MORE))
    if more <= few:
        took = f"{MORE} layers took {1e3 * more:.3g} ms and {FEW} took {1e3 * few:.3g}"
        raise ValueError(f"no time of a layer could be measured ({took}): is {world.device_name} busy? Try again")
    return few + (layers - FEW) * (more - few) / (MORE - FEW)


def _timed(config: RunConfig, world: World, layers: int) -> float:
    batch = MICRO_STEPS * config.machine.micro_batch * config.model.context * world.size
    train = replace(config.train, batch_tokens=batch)
    bench = Bench(replace(config, model=replace(config.model, layers=layers), train=train), world)
    times = []
    for number in range(1 + REPEATS):
        begin = bench.now()
        bench.step(number)
        times.append(bench.now() - begin)
    return min(times[1:]) / MICRO_STEPS


def main() -> int:
    logging.basicConfig(level=logging.WARNING)
    try:
        config = from_dict(RunConfig, json.load(sys.stdin))
        world = distributed.join()
        found = {"device": world.device_name, "micro_step_seconds": micro_step_seconds(config, world)}
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    print(json.dumps(found))
    distributed.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
