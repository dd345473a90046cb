"""How does a batch go through the whole model and back? By hand, so that each pass over memory does all it can.

Autograd would keep LayerNorm's outputs, copy queries, keys and values apart, and add each weight's gradient in a
pass of its own. Here matrix products add to the gradients in place; the branch of a block joins the residual
stream inside the product or the LayerNorm that follows; LayerNorm's output is made again in its backward
pass, where its input is read anyway. The order of every sum is fixed: the same step twice gives the same bits.
"""

from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from training.gpt2 import GPT2, Attention, Block
from training.kernels import AttentionKernel, Kernels
from training.model_config import ModelConfig

LOGITS_BYTES = 420 * 1024**2  # of one chunk of the head's bf16 logits


class Kept(NamedTuple):
    """What the forward pass of a block leaves to its backward pass; N = B T."""

    x1: Tensor  # (N, C), the stream before attention, with its statistics
    mean1: Tensor
    rstd1: Tensor
    qkv: Tensor  # (B, T, 3, H, D)
    out: Tensor  # (B, T, H, D)
    attention: Any
    x2: Tensor  # (N, C), the stream before the MLP, with its statistics
    mean2: Tensor
    rstd2: Tensor
    h: Tensor  # (N, 4C), GELU's input
    g: Tensor | None  # and its output


class Head(NamedTuple):
    loss: Tensor
    grad_x: Tensor  # (N, C), each row still to be multiplied by its factor
    factors: Tensor  # (N,) fp32
    grad_weight: Tensor  # (Vp, C)


class Fused:
    """What every architecture's fused passes share."""

    def __init__(self, config: ModelConfig, kernels: Kernels) -> None:
        self.config, self.ops = config, kernels
        self.attention: dict[tuple[int, int], AttentionKernel] = {}
        self.anchor = torch.zeros((), requires_grad=True)  # makes autograd call our backward

    def attention_kernel(self, B: int, T: int) -> AttentionKernel:
        if (B, T) not in self.attention:
            self.attention[B, T] = self.ops.attention(B, T, self.config.heads, self.config.head_size)
        return self.attention[B, T]

    def add_weight_gradient(self, weight: Tensor, dy: Tensor, x: Tensor) -> None:
        self.ops.multiply(dy, x, transpose_a=True, out=grad_of(weight), add=weight.grad)


class FusedModel(Fused):
    """Runs a GPT2's loss and gradients: called like the model, with the same result."""

    def __init__(self, model: GPT2, kernels: Kernels, recompute: int = 0, gelu_epilogue: bool = True) -> None:
        super().__init__(model.config, kernels)
        self.model, self.recompute, self.gelu_epilogue = model, recompute, gelu_epilogue
        self.blocks = cast("list[Block]", list(model.blocks))

    def __call__(self, tokens: Tensor, targets: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return _Loss.apply(self.anchor, self, tokens, targets)  # type: ignore[no-any-return]
        x, branch = self.embed(tokens), None
        for block in self.blocks:
            x, branch, _ = self.block_forward(block, x, branch, tokens.shape)
        normed = self.ops.norm_forward(x, branch, self.model.ln_f.weight, self.model.ln_f.bias)
        return self.head(normed.y, targets.flatten(), gradients=False).loss

    def embed(self, tokens: Tensor) -> Tensor:
        return self.ops.embed(tokens.contiguous(), self.model.wte.weight, self.model.wpe.weight)

    def block_forward(
        self, block: Block, x: Tensor, branch: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Kept]:
        """The stream, with the branch that is still to join it, through one block: (N, C) both."""
        ops, attn, mlp = self.ops, block.attn, block.mlp
        (B, T), C = shape, x.shape[1]
        x1, y, mean1, rstd1 = ops.norm_forward(x, branch, block.ln_1.weight, block.ln_1.bias)
        qkv = ops.multiply(y, attn.c_attn.weight, transpose_b=True, bias=attn.c_attn.bias)
        qkv = qkv.view(B, T, 3, attn.heads, C // attn.heads)
        out, saved = self.attention_kernel(B, T).forward(qkv)
        x2 = ops.multiply(out.view(-1, C), attn.c_proj.weight, transpose_b=True, bias=attn.c_proj.bias, add=x1)
        _, y, mean2, rstd2 = ops.norm_forward(x2, None, block.ln_2.weight, block.ln_2.bias)
        if self.gelu_epilogue:
            h = torch.empty(len(y), 4 * C, dtype=y.dtype, device=y.device)
            g = ops.multiply(y, mlp.c_fc.weight, transpose_b=True, bias=mlp.c_fc.bias, epilogue="gelu", aux=h)
        else:
            h = ops.multiply(y, mlp.c_fc.weight, transpose_b=True, bias=mlp.c_fc.bias)
            g = ops.gelu_forward(h)
        branch = ops.multiply(g, mlp.c_proj.weight, transpose_b=True, bias=mlp.c_proj.bias)
        kept = Kept(x1, mean1, rstd1, qkv, out, saved, x2, mean2, rstd2, h, g if self.recompute == 0 else None)
        return x2, branch, kept

    def block_backward(self, block: Block, states: list[Kept], dx: Tensor, bias_before: Tensor) -> Tensor:
        """The stream's gradient behind the block -> before it, in place.

        The last of `states` is taken off, so that each tensor's memory is free after its last use. The gradient of a
        projection's bias is the sum of the stream's gradient behind it; the LayerNorm that makes that gradient sums
        it: that of the block before goes to `bias_before`.
        """
        ops, attn, mlp = self.ops, block.attn, block.mlp
        x1, mean1, rstd1, qkv, out, saved, x2, mean2, rstd2, h, g = states.pop()
        if g is None:
            g = ops.gelu_forward(h)
        self.add_weight_gradient(mlp.c_proj.weight, dx, g)
        dh = ops.multiply(dx, mlp.c_proj.weight, epilogue="dgelu", aux=h)
        ops.add_column_sums(dh[:, None], grad_of(mlp.c_fc.bias)[None])
        dy = ops.multiply(dh, mlp.c_fc.weight)
        dx = self.norm_backward(block.ln_2, dy, x2, mean2, rstd2, dx, grad_of(attn.c_proj.bias))
        self.add_weight_gradient(mlp.c_fc.weight, dh, dy)  # dy now holds LayerNorm's output
        del x2, h, g, dh, dy
        self.add_weight_gradient(attn.c_proj.weight, dx, out.view(dx.shape))
        dout = ops.multiply(dx, attn.c_proj.weight).view(out.shape)
        dqkv = self.attention_kernel(*out.shape[:2]).backward(dout, qkv, out, saved).view(len(dx), -1)
        del dout, qkv, out, saved
        self.add_bias_gradient(attn, dqkv)
        dy = ops.multiply(dqkv, attn.c_attn.weight)
        dx = self.norm_backward(block.ln_1, dy, x1, mean1, rstd1, dx, bias_before)
        self.add_weight_gradient(attn.c_attn.weight, dqkv, dy)
        return dx

    def add_bias_gradient(self, attn: Attention, dqkv: Tensor) -> None:
        """Of queries and values. That of the keys is zero: it moves all scores of a query alike, softmax ignores it."""
        self.ops.add_column_sums(dqkv.view(len(dqkv), 3, -1)[:, ::2], grad_of(attn.c_attn.bias).view(3, -1)[::2])

    def norm_backward(
        self,
        norm: nn.LayerNorm,
        dy: Tensor,
        x: Tensor,
        mean: Tensor,
        rstd: Tensor,
        stream: Tensor | None,
        sums: Tensor,
    ) -> Tensor:
        grads = (grad_of(norm.weight), grad_of(norm.bias), sums)
        return self.ops.norm_backward(dy, x, norm.weight, norm.bias, mean, rstd, stream, grads)

    def head(self, x: Tensor, targets: Tensor, gradients: bool) -> Head:
        return head_loss(self.ops, x, self.model.wte.weight, targets, self.config.vocab, gradients)


class _Loss(torch.autograd.Function):
    """The whole model as one operation: its backward adds to the parameters' gradients itself."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, fused: FusedModel, tokens: Tensor, targets: Tensor) -> Tensor:
        model, kept = fused.model, []
        x, branch = fused.embed(tokens), None
        for block in fused.blocks:
            x, branch, state = fused.block_forward(block, x, branch, tokens.shape)
            kept.append(state if fused.recompute < 3 else state.x1)
        normed = fused.ops.norm_forward(x, branch, model.ln_f.weight, model.ln_f.bias)
        head = fused.head(normed.y, targets.flatten(), gradients=True)
        ctx.fused, ctx.tokens, ctx.kept, ctx.last, ctx.head = fused, tokens, kept, normed._replace(y=None), head
        return head.loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, None]:
        fused, kept, head, last = ctx.fused, ctx.kept, ctx.head, ctx.last
        model, blocks = fused.model, fused.blocks
        give_gradients(model)
        fused.ops.add_scaled(grad_of(model.wte.weight), head.grad_weight, grad)
        fused.ops.scale_rows(head.grad_x, head.factors * grad, head.grad_x)
        biases = [torch.empty_like(blocks[0].mlp.c_proj.bias), *(grad_of(b.mlp.c_proj.bias) for b in blocks)]
        dx = fused.norm_backward(model.ln_f, head.grad_x, last.x, last.mean, last.rstd, None, biases.pop())
        ctx.head = ctx.last = head = last = None  # their memory, for the blocks
        for block in reversed(blocks):
            if fused.recompute == 3:
                kept.append(fused.block_forward(block, kept.pop(), None, ctx.tokens.shape)[2])
            dx = fused.block_backward(block, kept, dx, biases.pop())
            announce(block)
        fused.ops.add_embedding_gradients(dx, ctx.tokens, grad_of(model.wte.weight), grad_of(model.wpe.weight))
        for module in (model.wte, model.wpe, model.ln_f):
            announce(module)
        return None, None, None, None


def head_loss(
    ops: Kernels, x: Tensor, weight: Tensor, targets: Tensor, vocab: int, gradients: bool, cap: float = 0.0
) -> Head:
    """The mean loss of logits x weight', capped, and the gradients of x (N, C) and the weight (Vp, C) if wanted."""
    grad_x = torch.empty_like(x if gradients else x[:0])
    grad_weight = torch.zeros_like(weight if gradients else weight[:0])
    scale = 1.0 / len(x) if gradients else None
    losses, factors = [], []
    for rows in chunks(len(x), len(weight)):
        logits = ops.multiply(x[rows], weight, transpose_b=True)  # (n, Vp)
        loss, factor = ops.cross_entropy(logits, targets[rows], vocab, scale, cap)
        losses.append(loss)
        factors.append(factor)
        if gradients:
            ops.multiply(logits, weight, out=grad_x[rows])
            scaled = ops.scale_rows(x[rows], factor, torch.empty_like(x[rows]))
            ops.multiply(logits, scaled, transpose_a=True, out=grad_weight, add=grad_weight)
        del logits  # before the next chunk's are made
    return Head(torch.cat(losses).mean(), grad_x, torch.cat(factors), grad_weight)


def grad_of(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def give_gradients(model: nn.Module) -> None:
    """Zeros where a parameter has no gradient yet: ours are added in place."""
    for parameter in model.parameters():
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def announce(module: nn.Module) -> None:
    """Call the hooks that autograd would have called when these parameters' gradients were whole."""
    for parameter in module.parameters():
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():  # type: ignore[attr-defined]
            hook(parameter)


def chunks(rows: int, columns: int) -> list[slice]:
    """Even slices with at most LOGITS_BYTES of bf16 logits each, in multiples of 128 rows where it can."""
    most = max(128, LOGITS_BYTES // (2 * columns) // 128 * 128)
    parts = -(-rows // most)
    size = -(-rows // parts)
    size = -(-size // 128) * 128 if rows >= 128 else size
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
