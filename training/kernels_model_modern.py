"""How does a batch go through the speed recipe's model and back? As through GPT-2, by hand, with this model's parts."""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from training.kernels import Kernels
from training.kernels_model import Fused, Head, announce, give_gradients, grad_of, head_loss
from training.modern import CAP, Block, Modern, rotations


class Kept(NamedTuple):
    """What the forward pass of a block leaves to its backward pass; N = B T."""

    x1: Tensor  # (N, C), the stream before attention
    rstd1: Tensor
    qkv: Tensor  # (B, T, 3, H, D), queries and keys rotated and normalized
    rstd_qk: Tensor
    out: Tensor  # (B, T, H, D)
    attention: Any
    x2: Tensor  # (N, C), the stream before the MLP
    rstd2: Tensor
    g: Tensor  # (N, 4C), the squared ReLU


class FusedModern(Fused):
    """Runs a Modern's loss and gradients: called like the model, with the same result."""

    def __init__(self, model: Modern, kernels: Kernels) -> None:
        super().__init__(model.config, kernels)
        self.model = model
        self.blocks = cast("list[Block]", list(model.blocks))
        self.angles: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _Loss.apply(self.anchor, self, tokens, targets)  # type: ignore[no-any-return]
        (_, x, _), branch = self.embed(tokens), None
        for block in self.blocks:
            x, branch, _ = self.block_forward(block, x, branch, tokens.shape)
        _, y, _ = self.ops.rms_forward(x, branch)
        return self.head(y, targets.flatten(), gradients=False).loss

    def embed(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The embedding (N, C), its RMSNorm, which the stream begins with, and 1 / RMS (N,)."""
        return self.ops.rms_forward(self.model.wte.weight[tokens.flatten()], None)  # type: ignore[no-any-return]

    def turns(self, T: int) -> tuple[Tensor, Tensor]:
        if T not in self.angles:
            self.angles[T] = rotations(T, self.config.head_size, self.model.wte.weight.device)
        return self.angles[T]

    def block_forward(
        self, block: Block, x: Tensor, branch: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Kept]:
        """The stream, with the branch that is still to join it, through one block: (N, C) both."""
        ops, attn, mlp = self.ops, block.attn, block.mlp
        (B, T), C = shape, x.shape[1]
        x1, y, rstd1 = ops.rms_forward(x, branch)
        qkv = ops.multiply(y, attn.c_attn.weight, transpose_b=True).view(B, T, 3, attn.heads, C // attn.heads)
        rstd_qk = ops.rotate_forward(qkv, *self.turns(T))
        out, saved = self.attention_kernel(B, T).forward(qkv)
        x2 = ops.multiply(out.view(-1, C), attn.c_proj.weight, transpose_b=True, add=x1)
        _, y, rstd2 = ops.rms_forward(x2, None)
        g = ops.multiply(y, mlp.c_fc.weight, transpose_b=True)
        ops.relu2_forward(g)
        branch = ops.multiply(g, mlp.c_proj.weight, transpose_b=True)
        return x2, branch, Kept(x1, rstd1, qkv, rstd_qk, out, saved, x2, rstd2, g)

    def block_backward(self, block: Block, states: list[Kept], dx: Tensor) -> Tensor:
        """The stream's gradient behind the block -> before it, in place; the last of `states` is taken off."""
        ops, attn, mlp = self.ops, block.attn, block.mlp
        x1, rstd1, qkv, rstd_qk, out, saved, x2, rstd2, g = states.pop()
        self.add_weight_gradient(mlp.c_proj.weight, dx, g)
        dh = ops.multiply(dx, mlp.c_proj.weight)
        ops.relu2_backward(dh, g)
        dy = ops.multiply(dh, mlp.c_fc.weight)
        dx = self.norm_backward(dy, x2, rstd2, dx)
        self.add_weight_gradient(mlp.c_fc.weight, dh, dy)  # dy now holds RMSNorm's output
        del x2, g, dh, dy
        self.add_weight_gradient(attn.c_proj.weight, dx, out.view(dx.shape))
        dout = ops.multiply(dx, attn.c_proj.weight).view(out.shape)
        dqkv = self.attention_kernel(*out.shape[:2]).backward(dout, qkv, out, saved)
        ops.rotate_backward(dqkv, qkv, *self.turns(qkv.shape[1]), rstd_qk)
        del dout, qkv, out, saved
        dqkv = dqkv.view(len(dx), -1)
        dy = ops.multiply(dqkv, attn.c_attn.weight)
        dx = self.norm_backward(dy, x1, rstd1, dx)
        self.add_weight_gradient(attn.c_attn.weight, dqkv, dy)
        return dx

    def norm_backward(self, dy: Tensor, x: Tensor, rstd: Tensor, stream: Tensor | None) -> Tensor:
        return self.ops.rms_backward(dy, x, rstd, stream)

    def head(self, x: Tensor, targets: Tensor, gradients: bool) -> Head:
        return head_loss(self.ops, x, self.model.head.weight, targets, self.config.vocab, gradients, CAP)


class _Loss(torch.autograd.Function):
    """The whole model as one operation: its backward adds to the parameters' gradients itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, fused: FusedModern, tokens: Tensor, targets: Tensor) -> Tensor:
        raw, x, rstd = fused.embed(tokens)
        kept, branch = [], None
        for block in fused.blocks:
            x, branch, state = fused.block_forward(block, x, branch, tokens.shape)
            kept.append(state)
        last, y, last_rstd = fused.ops.rms_forward(x, branch)
        head = fused.head(y, targets.flatten(), gradients=True)
        ctx.fused, ctx.tokens, ctx.kept, ctx.head = fused, tokens, kept, head
        ctx.first, ctx.last = (raw, rstd), (last, last_rstd)
        return head.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        fused, kept, head = ctx.fused, ctx.kept, ctx.head
        ops, model = fused.ops, fused.model
        give_gradients(model)
        ops.add_scaled(grad_of(model.head.weight), head.grad_weight, grad)
        announce(model.head)
        dy = ops.scale_rows(head.grad_x, head.factors * grad, head.grad_x)
        dx = fused.norm_backward(dy, *ctx.last, None)
        ctx.head = ctx.last = head = dy = None  # their memory, for the blocks
        for block in reversed(fused.blocks):
            dx = fused.block_backward(block, kept, dx)
            announce(block)
        dx = ops.rms_backward(dx, *ctx.first, None)
        ops.add_embedding_gradients(dx, ctx.tokens, grad_of(model.wte.weight), None)
        announce(model.wte)
        return None, None, None, None
