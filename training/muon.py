"""How does Muon change the blocks' matrices? By their momentum's nearest orthogonal matrix: all directions move alike.

Muon (Keller Jordan, 2024): the update is U V' of the momentum's singular value decomposition U S V', taken without
decomposing anything, by a few steps of an odd polynomial that sends every singular value to one. The polynomials are
those of Polar Express (Amsel et al., 2025), which are each optimal for what the step before has left. Matrices of one
shape go through together. Embedding and head are AdamW's.

A matrix must be whole where it is orthogonalized. So the blocks are taken S at a time, S being the number of ranks that
share the optimizer's state, and each of these ranks gets a block's summed gradients, and changes that block.
"""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from training.optim import ROUNDING_STRIDE, Bucket, ShardedAdamW, groups, round_into_weights
from training.schedule import momentum

# Of a x + b x^3 + c x^5, step by step: best for singular values from 1e-3 to 1, with a margin for bf16.
COEFFICIENTS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
MARGIN = 1.02  # bf16 may let the norm be a little larger than computed
AT_ONCE = 2**27  # elements that are orthogonalized together: beyond that only memory grows


def orthogonalize(matrices: Tensor) -> Tensor:
    """(…, rows, columns) -> each with its singular values brought near one. Zero stays zero.

    On a GPU, products of bf16 matrices run, and their result comes, in fp16: all numbers in them are near or below one,
    where it is as fast and has three bits more.
    """
    rows, columns = matrices.shape[-2:]
    precise = torch.promote_types(matrices.dtype, torch.float32)
    norms = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=precise)
    dtype = torch.float16 if matrices.is_cuda and matrices.dtype == torch.bfloat16 else matrices.dtype
    x = torch.empty(matrices.shape, dtype=dtype, device=matrices.device)
    x = torch.mul(matrices, 1.0 / (norms * MARGIN + 1e-6), out=x).flatten(0, -3)
    for a, b, c in COEFFICIENTS:
        gram = x.mT @ x if rows > columns else x @ x.mT  # the products are of the shorter side
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=1, dim2=2).add_(a)
        x = x @ factor if rows > columns else factor @ x
    return x.view(matrices.shape)


def orthogonalize_blocks(flat: Tensor, channels: int, neurons: Tensor, beta2: float) -> None:
    """(N, 12 C^2): N blocks' matrices one behind the other, each replaced by its update's direction.

    Queries', keys' and values' weights count as a matrix each. A matrix of more rows than columns is scaled by
    sqrt(rows / columns), so that all change their outputs alike (Jordan; Bernstein and Newhouse, 2024).
    neurons: (N, 12 C) fp32, mean squares from step to step, to even out the updates; not used with a beta2 of 0.
    """
    n, C = len(flat), channels
    squares = flat[:, : 4 * C * C].view(n, 4, C, C)
    rising = flat[:, 4 * C * C : 8 * C * C].view(n, 4 * C, C)
    falling = flat[:, 8 * C * C :].view(n, C, 4 * C)
    equal, up, down = map(orthogonalize, (squares, rising, falling))
    if beta2:
        even_out(equal, neurons[:, : 4 * C].view(n, 4, C), beta2, dim=-1)
        even_out(up, neurons[:, 4 * C : 8 * C], beta2, dim=-1)
        even_out(down, neurons[:, 8 * C :], beta2, dim=-2)
    squares.copy_(equal)
    torch.mul(up, 4**0.5, out=rising)
    falling.copy_(down)


def even_out(directions: Tensor, neurons: Tensor, beta2: float, dim: int) -> None:
    """Divide each neuron's update by the root of its mean square over the steps; each matrix keeps its norm.

    After NorMuon (Li et al., 2025). `dim` is the one within a neuron: the shorter, along which an orthogonal matrix
    leaves the sums of squares open. directions: (…, rows, columns); neurons: (…, rows or columns) fp32.
    """
    squares = torch.linalg.vector_norm(directions, dim=dim, dtype=torch.float32).square() / directions.shape[dim]
    neurons.lerp_(squares, 1.0 - beta2)
    factors = neurons.clamp(min=1e-12).rsqrt()
    lost = (squares.sum(-1, keepdim=True) / (squares * factors.square()).sum(-1, keepdim=True).clamp(min=1e-12)).sqrt()
    directions.mul_((factors * lost).unsqueeze(dim))


class ShardedMuon(ShardedAdamW):
    """Muon for the blocks of a Modern, AdamW for its embedding and its head."""

    def layout(self, model: nn.Module) -> list[Bucket]:
        """The head's bucket, the blocks' from the last, the embedding's: as their gradients come."""
        blocks = [group for name, group in groups(model) if name != "rest"][::-1]
        ranks = self.world.shard.size
        self.channels = blocks[0][0][1].shape[1]
        self.blocks = [
            self._bucket_of(first, blocks[first : first + ranks]) for first in reversed(range(0, len(blocks), ranks))
        ]
        head, embedding = (
            self.bucket(name, len(blocks) + i, [(f"{name}.weight", model.get_parameter(f"{name}.weight"))])
            for i, name in enumerate(("head", "wte"))
        )
        self.tables = [(head, self.config.head_lr), (embedding, self.config.embedding_lr)]
        self.own = [bucket for bucket in self.blocks if bucket.own]
        self.neurons = torch.zeros(len(self.own), 12 * self.channels, device=self.world.device)
        if self.config.neuron_beta2:
            for bucket, row in zip(self.own, self.neurons, strict=True):
                bucket.state["neurons"] = row
        self.passes = _passes(self.world.device)
        return [head, *self.blocks, embedding]

    def _bucket_of(self, first: int, blocks: list[list[tuple[str, nn.Parameter]]]) -> Bucket:
        """Consecutive blocks, one a rank; ranks for which none is left hold padding."""
        C, mine = self.channels, first + self.world.shard.rank
        shapes = [tuple(p.shape) for _, p in blocks[0]]
        assert shapes == [(3 * C, C), (C, C), (4 * C, C), (C, 4 * C)], shapes
        name = f"blocks.{first}-{first + len(blocks) - 1}"
        bucket = self.bucket(name, mine, [pair for block in blocks for pair in block], ("momentum",), 12 * C * C)
        bucket.stored, bucket.offset, bucket.whole = f"blocks.{mine}", 0, 12 * C * C
        return bucket

    def step(self, step: int, lr: float, scale: float) -> None:
        for bucket, rate in self.tables:
            self.adamw(bucket, step, rate * lr / self.config.lr, scale, decay=0.0)
            self.share(bucket)
        count = max(1, AT_ONCE // (12 * self.channels**2))
        for start in range(0, len(self.own), count):
            self._muon(slice(start, start + count), step, lr, scale)
        for bucket in self.blocks:
            self.share(bucket)
        self.settle()

    def _muon(self, some: slice, step: int, lr: float, scale: float) -> None:
        """Update some of this rank's blocks."""
        buckets, config = self.own[some], self.config
        flat = torch.empty(len(buckets), 12 * self.channels**2, dtype=self.dtype, device=self.world.device)
        for bucket, update in zip(buckets, flat, strict=True):
            self.passes.accumulate(bucket.gradient, bucket.state["momentum"], update, momentum(config, step), scale)
        orthogonalize_blocks(flat, self.channels, self.neurons[some], config.neuron_beta2)
        for bucket, update in zip(buckets, flat, strict=True):
            precise = self.precise(bucket)
            self.passes.apply(bucket.part if self.masters else precise, precise, update, lr, config.weight_decay)
            if not self.masters and self.dtype == torch.bfloat16:
                round_into_weights(bucket, precise, seed=step * ROUNDING_STRIDE + bucket.number)


class Passes(NamedTuple):
    """The two sweeps over memory before and after the products."""

    accumulate: Callable[[Tensor, Tensor, Tensor, float, float], None]
    apply: Callable[[Tensor, Tensor, Tensor, float, float], None]


def _passes(device: torch.device) -> Passes:
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from training import kernels_muon

        return Passes(kernels_muon.accumulate, kernels_muon.apply)
    return Passes(plain_accumulate, plain_apply)


def plain_accumulate(gradients: Tensor, momenta: Tensor, updates: Tensor, momentum: float, scale: float) -> None:
    """As `kernels_muon.accumulate`."""
    gradient = gradients.float() * scale
    momenta.lerp_(gradient, 1.0 - momentum)
    updates.copy_(gradient.lerp(momenta, momentum))


def plain_apply(weights: Tensor, masters: Tensor, updates: Tensor, lr: float, decay: float) -> None:
    """As `kernels_muon.apply`."""
    change = updates.float()
    masters.sub_(change + torch.where(change * masters > 0, decay * masters, 0.0), alpha=lr)
    if weights.data_ptr() != masters.data_ptr():
        weights.copy_(masters)
