"""How do gradients change the weights? AdamW with its state sharded over the ranks (ZeRO-1).

The parameters of a block, and those outside the blocks, lie in one flat buffer each, a bucket, and so do
their gradients. In the last micro-step each bucket's gradients are summed over the ranks as soon as its
backward pass is done (reduce-scatter); each rank then updates its part of every bucket, and the parts are
gathered while the next bucket is updated. One rank owns the whole of every bucket and sends nothing.

Weights are fp32, or bf16 with fp32 masters, or bf16 alone with stochastic rounding.
"""

import importlib.util
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.adamw import adamw

from training.config import TrainConfig
from training.distributed import World, finish

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
ROUNDING_STRIDE = 1_000_003  # a prime: (step, bucket) pairs get different rounding seeds


@dataclass
class Bucket:
    """Parameters that are reduced and updated together: matrices first, then vectors, then padding."""

    name: str
    number: int  # tells its random numbers from those of others
    parameters: list[tuple[str, nn.Parameter]]
    decayed: int  # leading elements that weight decay applies to
    size: int  # elements without the padding
    weights: Tensor  # flat, padded to a multiple of the shard group's ranks
    gradients: Tensor  # flat, as `weights`
    start: int  # of this rank's part
    stop: int
    gradient: Tensor  # this rank's part of the summed gradients
    state: dict[str, Tensor]  # this rank's part, fp32: exp_avg, exp_avg_sq, and master behind bf16 weights
    stored: str  # name that checkpoints keep the state under
    offset: int  # of this rank's part in what is kept under that name
    whole: int  # elements that are kept under that name
    missing: int = 0  # parameters whose gradient is still to come in this micro-step
    left: bool = False  # whether the gradients are on their way to the other ranks
    pending: list[dist.Work | None] = field(default_factory=list)

    @property
    def part(self) -> Tensor:
        """This rank's part of the weights."""
        return self.weights[self.start : self.stop]

    @property
    def own(self) -> int:
        """Elements of this rank's part that are no padding."""
        return max(0, min(self.stop, self.size) - self.start)

    def segments(self) -> Iterator[tuple[slice, bool]]:
        """This rank's part as slices of it, each with whether it is decayed."""
        border = min(max(self.decayed - self.start, 0), self.stop - self.start)
        if border > 0:
            yield slice(0, border), True
        if border < self.stop - self.start:
            yield slice(border, self.stop - self.start), False


class ShardedAdamW:
    """Moves `model`'s parameters to the device as views into flat buffers, and updates them."""

    def __init__(self, model: nn.Module, config: TrainConfig, world: World, overlap: bool = True) -> None:
        self.config, self.world, self.overlap = config, world, overlap
        self.dtype = DTYPES[config.dtype]
        self.masters = config.dtype == "bf16" and config.master_weights
        self.buckets = self.layout(model)
        self.kernel = _kernel(world.device)
        self.last_micro_step = False
        for bucket in self.buckets:
            for _, parameter in bucket.parameters:
                parameter.register_post_accumulate_grad_hook(lambda _, b=bucket: self._arrived(b))

    def layout(self, model: nn.Module) -> list[Bucket]:
        """Every parameter in one bucket."""
        return [self.bucket(name, number, group) for number, (name, group) in enumerate(groups(model))]

    def bucket(
        self,
        name: str,
        number: int,
        parameters: list[tuple[str, nn.Parameter]],
        keys: tuple[str, ...] = ("exp_avg", "exp_avg_sq"),
        part: int = 0,
    ) -> Bucket:
        """Flat buffers that hold the parameters; each rank's part has `part` elements (0: as few as will do)."""
        group, device = self.world.shard, self.world.device
        parameters = sorted(parameters, key=lambda p: p[1].dim() < 2)
        size = sum(p.numel() for _, p in parameters)
        part = part or -(-size // group.size)
        start, stop = group.rank * part, (group.rank + 1) * part
        flat = torch.zeros(part * group.size)
        torch.cat([p.detach().flatten().float().cpu() for _, p in parameters], out=flat[:size])
        gradients = torch.zeros(len(flat), dtype=self.dtype, device=device)
        state = {key: torch.zeros(part, device=device) for key in keys}
        if self.masters:
            state["master"] = flat[start:stop].to(device, copy=True)
        bucket = Bucket(
            name=name,
            number=number,
            parameters=parameters,
            decayed=sum(p.numel() for _, p in parameters if p.dim() >= 2),
            size=size,
            weights=flat.to(device, self.dtype),
            gradients=gradients,
            start=start,
            stop=stop,
            gradient=gradients if group.size == 1 else torch.zeros(part, dtype=self.dtype, device=device),
            state=state,
            stored=name,
            offset=start,
            whole=size,
        )
        _point_into(bucket)
        return bucket

    def zero_gradients(self) -> None:
        for bucket in self.buckets:
            bucket.gradients.zero_()

    def expect(self, last_micro_step: bool) -> None:
        """Say before a backward pass whether it is the step's last: then gradients leave as they come."""
        self.last_micro_step = last_micro_step
        for bucket in self.buckets:
            bucket.missing, bucket.left = len(bucket.parameters), False

    def _arrived(self, bucket: Bucket) -> None:
        bucket.missing -= 1
        if self.overlap and self.last_micro_step and bucket.missing == 0:
            self._send(bucket)

    def _send(self, bucket: Bucket) -> None:
        bucket.left = True
        bucket.pending = [self.world.shard.reduce_scatter(bucket.gradient, bucket.gradients)]

    def squared_norm(self) -> Tensor:
        """Wait for the summed gradients -> this rank's share of the squared global norm, an fp32 scalar."""
        for bucket in self.buckets:
            assert bucket.missing == 0, f"no backward pass brought all gradients of {bucket.name}"
            if not bucket.left:
                self._send(bucket)
            _wait(bucket)
            bucket.pending = [self.world.replicas.all_reduce(bucket.gradient)]
        for bucket in self.buckets:
            _wait(bucket)
        norms = torch._foreach_norm([b.gradient for b in self.buckets], 2, dtype=torch.float32)
        return torch.stack(list(norms)).square().sum() / self.world.replicas.size

    def parameter_norm(self) -> Tensor:
        """Of all weights as the model sees them."""
        norms = torch._foreach_norm([b.weights for b in self.buckets], 2, dtype=torch.float32)
        return torch.stack(list(norms)).square().sum().sqrt()

    def step(self, step: int, lr: float, scale: float) -> None:
        """Update number `step` (the first is 0) with the gradients times `scale`."""
        for bucket in self.buckets:
            self.adamw(bucket, step, lr, scale, self.config.weight_decay)
            self.share(bucket)
        self.settle()

    def adamw(self, bucket: Bucket, step: int, lr: float, scale: float, decay: float) -> None:
        """Update this rank's part of a bucket."""
        precise = self.precise(bucket)
        for rows, decayed in bucket.segments():
            self._update(bucket, precise, rows, step, lr, scale, decay if decayed else 0.0)
        if not self.masters and self.dtype == torch.bfloat16:
            round_into_weights(bucket, precise, seed=step * ROUNDING_STRIDE + bucket.number)

    def share(self, bucket: Bucket) -> None:
        """Start giving this rank's part of the weights to the others."""
        bucket.pending = [self.world.shard.all_gather(bucket.weights, bucket.part)]
        if not self.overlap:
            _wait(bucket)

    def settle(self) -> None:
        """Until every rank has all weights."""
        for bucket in self.buckets:
            _wait(bucket)

    def precise(self, bucket: Bucket) -> Tensor:
        """This rank's part of the weights in fp32: the masters, the weights themselves, or a copy."""
        return bucket.state["master"] if self.masters else bucket.part.float()

    def _update(
        self, bucket: Bucket, precise: Tensor, rows: slice, step: int, lr: float, scale: float, decay: float
    ) -> None:
        self.kernel(
            (bucket.part if self.masters else precise)[rows],
            bucket.gradient[rows],
            bucket.state["exp_avg"][rows],
            bucket.state["exp_avg_sq"][rows],
            precise[rows],
            step + 1,
            lr,
            (self.config.beta1, self.config.beta2),
            self.config.eps,
            decay,
            scale,
        )


def _kernel(device: torch.device) -> Callable[..., None]:
    """One pass over memory where Triton runs, else torch's own fused AdamW."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from training.kernels_adamw import update

        return update
    return torch_update


def torch_update(
    weights: Tensor,
    gradients: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    masters: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: float,
) -> None:
    """Update number `step` (the first is 1) of fp32 `masters`; `weights`, where they are others, get these."""
    adamw(
        [masters],
        [gradients.float() * scale],
        [exp_avg],
        [exp_avg_sq],
        [],
        [torch.full((), step - 1.0, device=masters.device)],  # raised by one before its use
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=decay,
        eps=eps,
        maximize=False,
    )
    if weights.data_ptr() != masters.data_ptr():
        weights.copy_(masters)


def clip_scale(clip: float, norm: float) -> float:
    """What gradients of that global norm are multiplied by, so that it is at most `clip` (0: any)."""
    return min(1.0, clip / norm) if clip and norm > 0 else 1.0


def round_into_weights(bucket: Bucket, precise: Tensor, seed: int) -> None:
    """Without masters, rounding to the nearest would lose most updates: round at random.

    The noise is drawn for the whole of what ranks share, so that it does not depend on how many do.
    """
    generator = torch.Generator(precise.device)
    generator.manual_seed(seed)
    noise = rounding_noise(bucket.whole, generator)[bucket.offset : bucket.offset + bucket.own]
    bucket.part[: len(noise)].copy_(round_stochastically(precise[: len(noise)], noise))


def rounding_noise(count: int, generator: torch.Generator) -> Tensor:
    return torch.randint(0, 2**16, (count,), dtype=torch.int32, device=generator.device, generator=generator)


def round_stochastically(values: Tensor, noise: Tensor) -> Tensor:
    """fp32 -> bf16, up or down with the probability that makes the mean right (unbiased).

    noise: int32 in [0, 2^16). It carries into the half that bf16 keeps the more
    often, the larger the half that is cut off.
    """
    return ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32).to(torch.bfloat16)


def groups(model: nn.Module) -> Iterable[tuple[str, list[tuple[str, nn.Parameter]]]]:
    """Bucket names with their parameters: one a block, last block first as backward comes, then the rest."""
    found: dict[str, list[tuple[str, nn.Parameter]]] = {}
    for name, parameter in model.named_parameters():
        block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "rest"
        found.setdefault(block, []).append((name, parameter))
    return reversed(sorted(found.items(), key=lambda item: _block_number(item[0])))


def _block_number(name: str) -> int:
    return -1 if name == "rest" else int(name.split(".")[1])


def _point_into(bucket: Bucket) -> None:
    """Make the parameters and their gradients views into the flat buffers."""
    at = 0
    for _, parameter in bucket.parameters:
        here = slice(at, at + parameter.numel())
        at = here.stop
        parameter.data = bucket.weights[here].view(parameter.shape)
        parameter.grad = bucket.gradients[here].view(parameter.shape)


def _wait(bucket: Bucket) -> None:
    for work in bucket.pending:
        finish(work)
    bucket.pending = []
