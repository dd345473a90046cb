"""What does a run take on given GPUs? Memory by line, the micro-batch that fits, seconds a step, hours, dollars.

Seconds come from the MFU measured on one H100 or H200, the GPU's peak and, between GPUs, the model of
docs/scaling.md; a GPU that is in no table is measured by `probe.py`.

Where a run does not fit, three things give way, in this order: the micro-batch, then recompute rises, then the
fp32 master weights go (stochastic rounding in their place). The last changes the numbers, so it is never done
silently: `settle` sets `master_weights=false` in the configuration, where it is recorded, before a run has begun,
and whoever calls it says so; the trainer refuses to do so by itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from training.config import RunConfig, TrainConfig
from training.metrics import PEAK_FLOPS, peak_flops
from training.model_config import ModelConfig

GIB = 2**30
LARGEST_MICRO_BATCH = 64  # sequences; more has brought nothing since the matmuls are full
SHARE_OF_MEMORY = 0.97  # of a GPU's: what fragmentation leaves
DISK_RATE = 300e6  # bytes/s of a disk that checkpoints are written to: a slow one
ENDING = 30.0  # seconds for the ranks to agree, and to leave
HEAD_BYTES = 400 * 2**20  # logits of one chunk, as the fused head holds them
CUDA_BYTES = 1.3 * GIB  # context and libraries: outside of PyTorch's allocator, 1.0 to 1.25 GiB measured
# MFU of whole steps on one GPU, d12 and d48, by channels: benchmarks/gpt2_training.json, and for the H100 the mean of
# two cards in benchmarks/results/scaling_2_gpus.json. fp8 was measured on an H200 alone.
MEASURED_MFU = {"H200": ((768, 0.502), (1600, 0.555)), "H100 80GB": ((768, 0.470), (1600, 0.529))}
MEASURED_MFU_FP8 = ((768, 0.536), (1600, 0.664))
# llm.c's: on one H200 for d12, and on 8 H100 for d48, where a step of 1,048,576 tokens took 2.75 s.
LLM_C_MFU = ((768, 0.461), (1600, 0.473))
LLM_C_PRICE = 28.0  # dollars an hour for 8 H100
LINK_SHARE = 0.8  # of a link's rate by its data sheet: what NCCL reaches, 360 of 450 GB/s
NETWORK = 45e9  # bytes/s between machines: of one 400 Gbit/s adapter a GPU
MACHINE = 8  # GPUs


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: float  # GiB that programs can have
    peak: float  # dense bf16 FLOP/s
    link: float = 0.0  # bytes/s one way to the others of a machine, by the data sheet: NVLink or PCI Express
    hopper: bool = False  # has the fp8 products that the kernels take


GPUS = {
    "h100": Gpu("H100 80GB", 79.2, PEAK_FLOPS["H100"], 450e9, hopper=True),
    "h200": Gpu("H200", 139.8, PEAK_FLOPS["H200"], 450e9, hopper=True),
    "a100": Gpu("A100 80GB", 79.2, PEAK_FLOPS["A100"], 300e9),
    "a100-40": Gpu("A100 40GB", 39.4, PEAK_FLOPS["A100"], 300e9),
    "b200": Gpu("B200", 178.0, PEAK_FLOPS["B200"], 900e9),
    "l40s": Gpu("L40S", 44.4, PEAK_FLOPS["L40S"], 32e9),
    "rtx4090": Gpu("RTX 4090", 23.5, PEAK_FLOPS["RTX 4090"], 32e9),
}


@dataclass(frozen=True)
class Plan:
    micro_batch: int
    micro_steps: int
    recompute: int
    master_weights: bool
    memory: dict[str, float]  # bytes a GPU, by line

    @property
    def total(self) -> float:
        return sum(self.memory.values())


@dataclass(frozen=True)
class Cost:
    mfu: float | None  # of one GPU; None where its peak is not known
    efficiency: float | None  # of all GPUs against as many times one; None where it is not known
    seconds_per_step: float
    hours: float
    dollars: float | None


HERE = "here"  # the GPU of this machine


def gpu(name: str, names_here: Sequence[str] = (), gib_here: float = 0.0) -> Gpu:
    """The GPU of that name; one that is in no table must be this machine's, which a probe can measure.

    Raises ValueError for any other, and for "here" where there is none.
    """
    here = names_here[0] if names_here else ""
    if name.lower() in GPUS:
        return GPUS[name.lower()]
    if not here:
        raise ValueError(
            f"GPU {name!r} is in no table, and this machine has none that could be measured: choose from "
            f"{', '.join(GPUS)}, or ask again on a machine with that GPU"
        )
    if name.lower() != HERE and _letters(name) not in _letters(here):
        raise ValueError(f"unknown GPU {name!r}: choose from {', '.join(GPUS)}, or `here` for this machine's {here}")
    return Gpu(here, gib_here, peak_flops(here) or 0.0)


def check(config: RunConfig, device: Gpu) -> None:
    """Refuse what the trainer would: fp8 on a GPU of the table without it.

    A GPU that is in no table is found out by measuring it.
    """
    if config.train.fp8 and device in GPUS.values() and not device.hopper:
        have = ", ".join(name for name, known in GPUS.items() if known.hopper)
        raise ValueError(
            f"fp8=true is for Hopper GPUs ({have}), which the {device.name} is not: choose one, or leave fp8 out"
        )


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def memory(config: RunConfig, ranks: int, micro_batch: int, recompute: int) -> dict[str, float]:
    """Bytes a GPU needs at the peak of a step, by line."""
    model, train = config.model, config.train
    width = 2 if train.dtype == "bf16" else 4
    shard = config.machine.shard_ranks or ranks
    filled = -(-model.layers // shard) * shard if train.optimizer == "muon" else model.layers  # whole blocks a rank
    model = replace(model, layers=filled)
    parameters = model.padded_parameters
    tokens = micro_batch * model.context
    unit = tokens * model.channels * width  # one tensor of the residual stream's size
    lines = {
        "weights": parameters * width,
        "gradients": parameters * width * (1 + (1 / shard if shard > 1 else 0)),
        "optimizer state": _state_bytes(model, train) / shard,
        "activations": tokens * config.model.layers * _kept_bytes(model, recompute, train.fp8) * width / 2,
        # As measured: 10 of the 13 tensors are cuDNN's workspace for the deterministic backward pass of attention.
        "head or one block's backward": max(
            7.5 * unit + min(HEAD_BYTES, tokens * model.padded_vocab * width),
            13 * unit + tokens * _block_bytes(model, recompute, train.fp8) * width / 2,
        )
        + model.padded_vocab * model.channels * width,  # the gradient of the head's weight
        "CUDA": CUDA_BYTES,
    }
    return {name: float(size) for name, size in lines.items()}


def _state_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """AdamW's two moments, or Muon's one, and the fp32 master behind bf16 weights."""
    masters = 4 if train.dtype == "bf16" and train.master_weights else 0
    moments = 8 * model.padded_parameters - (4 * model.block_matrices if train.optimizer == "muon" else 0)
    return moments + masters * model.padded_parameters


def _kept_bytes(model: ModelConfig, recompute: int, fp8: bool) -> int:
    """Bytes a token and layer that wait for the backward pass, in bf16.

    The two residual streams, queries, keys and values, attention's output, GELU's input and, at level 0, its
    output (fp8 computes it again); beside them fp32 statistics: two a LayerNorm, one a head. Level 3 keeps the
    block's input alone.
    """
    C = model.channels
    if recompute == 3:
        return 2 * C
    if model.family == "nanochat":  # squared ReLU's input is not kept; one statistic a norm, three a head
        return 2 * (2 * C + 3 * C + C + 4 * C) + 4 * (2 + 3 * model.heads)
    output = 4 * C if recompute == 0 and not fp8 else 0
    return 2 * (2 * C + 3 * C + C + 4 * C + output) + 4 * (4 + model.heads)


def _block_bytes(model: ModelConfig, recompute: int, fp8: bool) -> int:
    """Bytes a token that are computed again for one block's backward pass; nanochat's in fp8: the stream's gradient."""
    if model.family == "nanochat":
        return model.channels if fp8 else 0
    again = 8 * model.channels if recompute or fp8 else 0
    return again + (_kept_bytes(model, 1, fp8) if recompute == 3 else 0)


def micro_batches(config: RunConfig, ranks: int) -> list[int]:
    """Sequences a rank and micro-step that divide the batch, largest first."""
    sequences = config.train.batch_tokens // config.model.context // ranks
    return [n for n in range(min(sequences, LARGEST_MICRO_BATCH), 0, -1) if sequences % n == 0]


def fit(config: RunConfig, ranks: int, gib: float) -> Plan:
    """The least recompute that fits `gib` GiB a GPU, and with it the largest micro-batch; a set one is kept.

    Raises ValueError where nothing fits, saying how much the least takes.
    """
    plans = list(_plans(config, ranks))
    for plan in plans:
        if plan.total <= gib * GIB:
            return plan
    least = min(plans, key=lambda plan: plan.total)
    raise ValueError(
        f"{config.recipe} needs {least.total / GIB:.1f} GiB a GPU at the least (micro-batch {least.micro_batch}, "
        f"recompute {least.recompute}), {gib:.1f} are there: take more GPUs, which share the optimizer's state"
    )


def limit(config: RunConfig, gib: float) -> float:
    """GiB that training may take of a GPU that has `gib`: what `memory_gib` says, or all but what fragments."""
    return min(config.machine.memory_gib or SHARE_OF_MEMORY * gib, gib)


def settle(config: RunConfig, ranks: int, gib: float) -> RunConfig:
    """`config` as it can be trained in `gib` GiB a GPU: without fp32 masters where nothing less makes it fit.

    Raises ValueError where nothing fits at all.
    """
    return replace(config, train=replace(config.train, master_weights=fit(config, ranks, gib).master_weights))


def _plans(config: RunConfig, ranks: int) -> Iterator[Plan]:
    """Every way to run it, in the order in which things give way."""
    machine, train = config.machine, config.train
    sequences = train.batch_tokens // config.model.context // ranks
    for masters in [True, False] if train.master_weights and train.dtype == "bf16" else [train.master_weights]:
        changed = replace(config, train=replace(train, master_weights=masters))
        levels = (0, 1, 3) if config.model.family == "gpt2" else (0,)
        for recompute in levels if machine.recompute < 0 else (machine.recompute,):
            for micro in [machine.micro_batch] if machine.micro_batch else micro_batches(config, ranks):
                yield Plan(micro, sequences // micro, recompute, masters, memory(changed, ranks, micro, recompute))


def cost(config: RunConfig, plan: Plan, device: Gpu, ranks: int, dollars_an_hour: float | None) -> Cost:
    """Time and money at the card's MFU; recompute adds its share of the forward pass, communication what is exposed."""
    mfu = card_mfu(config, device)
    again = {0: 1.0, 1: 1.01, 2: 1.01, 3: 4 / 3}[plan.recompute]
    flops = config.train.batch_tokens * config.model.flops_per_token * again
    compute = flops / (ranks * device.peak * mfu)
    machine = min(config.machine.gpus or MACHINE, MACHINE)
    shard = config.machine.shard_ranks or ranks
    _, exposed = communication(
        config.model, ranks, shard, compute / plan.micro_steps, LINK_SHARE * device.link, machine
    )
    return _cost(config, mfu, compute / (compute + exposed), compute + exposed, dollars_an_hour)


def card_mfu(config: RunConfig, device: Gpu) -> float:
    """Of one GPU of the table: as measured, or as an H200's; fp8's gain is the H200's."""
    model, on_h200 = config.model, MEASURED_MFU["H200"]
    mfu = expected_mfu(model, MEASURED_MFU.get(device.name, on_h200))
    return mfu * expected_mfu(model, MEASURED_MFU_FP8) / expected_mfu(model, on_h200) if config.train.fp8 else mfu


def mfu_origin(config: RunConfig, device: Gpu) -> str:
    """What `card_mfu` rests on, in words."""
    narrowest = MEASURED_MFU["H200"][0][0]
    if config.train.dtype != "bf16" or config.model.channels < narrowest:
        return f"as in bf16 with {narrowest} channels or more: this run is slower"
    if device.name not in MEASURED_MFU:
        return "as on an H200, not measured on this card"
    if config.train.fp8 and device.name != "H200":
        return "fp8's gain as on an H200, not measured on this card"
    return f"measured on one {device.name}"


def communication(
    model: ModelConfig, ranks: int, shard: int, micro_step: float, within: float, machine: int = MACHINE
) -> tuple[float, float]:
    """Seconds a step, hidden and exposed, where a GPU sends `within` bytes/s in its machine of so many GPUs.

    Gradients are summed and weights gathered once a step, whatever the accumulation. With P parameters in bf16 and
    shard groups of S ranks, each GPU sends 2P (S-1)/S bytes to sum and as many to gather; R replica groups then sum
    the parts, 2 (2P/S) (R-1)/R. The sum travels under the last micro-step's backward pass, two thirds of its time;
    the rest is taken as exposed.
    """
    size, groups = 2 * model.padded_parameters, ranks // shard
    between = min(within, NETWORK)
    one_way = size * (shard - 1) / shard / (within if shard <= machine else between)
    summed = 2 * size / shard * (groups - 1) / groups / between
    hidden = min(one_way, micro_step * 2 / 3)
    return hidden, one_way - hidden + one_way + summed


def probed_cost(
    config: RunConfig, plan: Plan, device: Gpu, ranks: int, micro_step: float, dollars_an_hour: float | None
) -> Cost:
    """Time and money where a micro-step takes so many seconds."""
    seconds = plan.micro_steps * micro_step
    flops = config.train.batch_tokens * config.model.flops_per_token
    mfu = flops / seconds / (ranks * device.peak) if device.peak else None
    return _cost(config, mfu, None if ranks > 1 else 1.0, seconds, dollars_an_hour)


def llm_c_cost(config: RunConfig) -> Cost:
    """What a recipe takes, or would take, with llm.c on 8 H100."""
    mfu = expected_mfu(config.model, LLM_C_MFU)
    seconds = config.train.batch_tokens * config.model.flops_per_token / (8 * GPUS["h100"].peak * mfu)
    return _cost(config, mfu, None, seconds, LLM_C_PRICE)


def _cost(
    config: RunConfig, mfu: float | None, efficiency: float | None, seconds: float, dollars_an_hour: float | None
) -> Cost:
    hours = seconds * config.train.steps / 3600
    return Cost(mfu, efficiency, seconds, hours, None if dollars_an_hour is None else hours * dollars_an_hour)


def checkpoint_bytes(config: RunConfig) -> int:
    width = 2 if config.train.dtype == "bf16" else 4
    return config.model.padded_parameters * width + _state_bytes(config.model, config.train)


def shutdown_seconds(config: RunConfig, ranks: int) -> float:
    """What a training that is told to end may need: the step that it is in on the slowest GPU of the table, a
    checkpoint that is being written, and the last one."""
    flops = config.train.batch_tokens * config.model.flops_per_token
    slowest = min(device.peak for device in GPUS.values()) * MEASURED_MFU["H200"][0][1]
    return ENDING + flops / (ranks * slowest) + 2 * checkpoint_bytes(config) / DISK_RATE


def expected_mfu(model: ModelConfig, measured: tuple[tuple[int, float], ...]) -> float:
    """Between the two measured widths by a straight line, beyond them as at the nearer."""
    (low, at_low), (high, at_high) = measured
    share = min(1.0, max(0.0, (model.channels - low) / (high - low)))
    return at_low + share * (at_high - at_low)
