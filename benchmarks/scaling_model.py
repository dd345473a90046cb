"""What does communication cost on paper? Bytes, link times and efficiency at 8, 64 and 512 GPUs.

    python -m benchmarks.scaling_model

The model is `training.plan.communication`, at an H200's links and rates.
"""

from dataclasses import dataclass

from training.model_config import model_from_descriptor
from training.plan import GPUS, LINK_SHARE, MACHINE, communication

# Milliseconds of one micro-step on one H200 (benchmarks/gpt2_training.json), and its sequences.
MEASURED = {"d12": (848.1 / 8, 64), "d48": (2343.4 / 8, 16)}


@dataclass(frozen=True)
class Step:
    compute: float  # seconds, all of these
    hidden: float
    exposed: float

    @property
    def efficiency(self) -> float:
        return self.compute / (self.compute + self.exposed)


def step(name: str, gpus: int, shard: int, micro_steps: int) -> Step:
    micro_step = MEASURED[name][0] / 1e3
    within = LINK_SHARE * GPUS["h200"].link
    return Step(micro_steps * micro_step, *communication(model_from_descriptor(name), gpus, shard, micro_step, within))


def main() -> None:
    print("| model | GPUs | shard group | tokens a step | compute, ms | hidden, ms | exposed, ms | efficiency |")
    print("|---|---|---|---|---|---|---|---|")
    for name, accumulation in (("d12", (1,)), ("d48", (1, 8))):
        for gpus in (8, 64, 512):
            for shard in sorted({MACHINE, gpus}):
                for micro_steps in accumulation:
                    found = step(name, gpus, shard, micro_steps)
                    tokens = MEASURED[name][1] * 1024 * micro_steps * gpus
                    times = " | ".join(f"{1e3 * t:,.1f}" for t in (found.compute, found.hidden, found.exposed))
                    print(f"| {name} | {gpus} | {shard} | {tokens:,} | {times} | {found.efficiency:.1%} |")


if __name__ == "__main__":
    main()
