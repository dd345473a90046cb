"""What does communication cost on paper? Bytes, link times and efficiency at 8, 64 and 512 GPUs.

    python -m benchmarks.scaling_model

Gradients are summed and weights gathered once a step, whatever the accumulation. With P parameters in bf16 and
shard groups of S ranks, each GPU sends 2P (S-1)/S bytes to sum and as many to gather; R replica groups then sum
the parts, 2 (2P/S) (R-1)/R. The sum travels under the last micro-step's backward pass, two thirds of its time;
the rest is taken as exposed.
"""

from dataclasses import dataclass

from training.model_config import ModelConfig, model_from_descriptor

NVLINK = 360e9  # bytes/s a GPU within a machine: what NCCL reaches of 450
NETWORK = 45e9  # between machines: of one 400 Gbit/s adapter a GPU
MACHINE = 8  # GPUs
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
    model: ModelConfig = model_from_descriptor(name)
    size = 2 * model.padded_parameters
    micro_step = MEASURED[name][0] / 1e3
    rate = NVLINK if shard <= MACHINE else NETWORK
    one_way = size * (shard - 1) / shard / rate
    groups = gpus // shard
    between = 2 * size / shard * (groups - 1) / groups / NETWORK
    backward = micro_step * 2 / 3
    return Step(micro_steps * micro_step, min(one_way, backward), max(0.0, one_way - backward) + one_way + between)


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
