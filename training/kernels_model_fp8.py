"""How does a model run with fp8 products? The blocks' products forward and back to the inputs take fp8.

Weight gradients stay in bf16: they sum over all tokens, and a scale by row, which is exact about each token's size,
cannot be taken out of that sum. Weights are quantized where they are used, by output row forward and by input row
backward: nothing is carried from step to step, so a resumed run needs no more state than a bf16 one. Activations and
gradients go to fp8 as they are made; attention's output alone takes a pass of its own, in GPT-2 its gradient, too.
GELU's output is never kept: its backward pass writes it again for the weight gradient.
"""

from typing import Any

import torch
from torch import Tensor, nn

from training import kernels_model_modern as modern
from training.gpt2 import Block
from training.kernels import Kernels
from training.kernels_fp8 import Rows, empty, rows_like
from training.kernels_model import FusedModel, Kept, grad_of
from training.modern import Block as ModernBlock


def linear(ops: Kernels, x: Rows, layer: nn.Linear) -> Tensor:
    weight = ops.quantize(layer.weight)
    return ops.multiply(x.values, weight.values, transpose_b=True, bias=layer.bias, scales=(x.scales, weight.scales))


def linear_backward(ops: Kernels, dy: Rows, layer: nn.Linear) -> Tensor:
    """The gradient of a linear layer's input."""
    weight = ops.quantize_transposed(layer.weight)
    return ops.multiply(dy.values, weight.values, transpose_b=True, scales=(dy.scales, weight.scales))


class Fp8Model(FusedModel):
    stream8: Rows  # the residual stream's newest gradient in fp8

    def block_forward(
        self, block: Block, x: Tensor, branch: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor, Kept]:
        ops, attn, mlp = self.ops, block.attn, block.mlp
        (B, T), C = shape, x.shape[1]
        x1, y, mean1, rstd1 = ops.norm_forward(x, branch, block.ln_1.weight, block.ln_1.bias, rows_like(x))
        qkv = linear(ops, y, attn.c_attn).view(B, T, 3, attn.heads, C // attn.heads)
        out, saved = self.attention_kernel(B, T).forward(qkv)
        x2 = linear(ops, ops.quantize(out.view(-1, C)), attn.c_proj)
        x2, y, mean2, rstd2 = ops.norm_forward(x1, x2, block.ln_2.weight, block.ln_2.bias, rows_like(x))
        h = linear(ops, y, mlp.c_fc)
        branch = linear(ops, ops.gelu_fp8(h), mlp.c_proj)
        return x2, branch, Kept(x1, mean1, rstd1, qkv, out, saved, x2, mean2, rstd2, h, None)

    def block_backward(self, block: Block, states: list[Kept], dx: Tensor, bias_before: Tensor) -> Tensor:
        ops, attn, mlp = self.ops, block.attn, block.mlp
        x1, mean1, rstd1, qkv, out, saved, x2, mean2, rstd2, h, _ = states.pop()
        dh = linear_backward(ops, self.stream8, mlp.c_proj)
        dh8 = ops.gelu_backward_fp8(dh, h, grad_of(mlp.c_fc.bias))
        self.add_weight_gradient(mlp.c_proj.weight, dx, h)  # h now holds GELU's output
        dy = linear_backward(ops, dh8, mlp.c_fc)
        dx = self.norm_backward(block.ln_2, dy, x2, mean2, rstd2, dx, grad_of(attn.c_proj.bias))
        self.add_weight_gradient(mlp.c_fc.weight, dh, dy)  # dy now holds LayerNorm's output
        del x2, h, dh, dh8, dy
        self.add_weight_gradient(attn.c_proj.weight, dx, out.view(dx.shape))
        dout = linear_backward(ops, self.stream8, attn.c_proj).view(out.shape)
        dqkv = self.attention_kernel(*out.shape[:2]).backward(dout, qkv, out, saved).view(len(dx), -1)
        del dout, qkv, out, saved
        dy = linear_backward(ops, ops.quantize(dqkv, grad_of(attn.c_attn.bias)), attn.c_attn)
        dx = self.norm_backward(block.ln_1, dy, x1, mean1, rstd1, dx, bias_before)
        self.add_weight_gradient(attn.c_attn.weight, dqkv, dy)
        return dx

    def norm_backward(self, norm: nn.LayerNorm, dy: Tensor, x: Tensor, *rest: Any) -> Tensor:
        mean, rstd, stream, sums = rest
        grads = (grad_of(norm.weight), grad_of(norm.bias), sums)
        self.stream8 = rows_like(x)
        return self.ops.norm_backward(dy, x, norm.weight, norm.bias, mean, rstd, stream, grads, self.stream8)


class Fp8Modern(modern.FusedModern):
    stream8: Rows  # the residual stream's newest gradient in fp8

    def block_forward(
        self, block: ModernBlock, x: Tensor, branch: Tensor | None, shape: torch.Size
    ) -> tuple[Tensor, Tensor, modern.Kept]:
        ops, attn, mlp = self.ops, block.attn, block.mlp
        (B, T), C = shape, x.shape[1]
        x1, y, rstd1 = ops.rms_forward(x, branch, rows_like(x))
        qkv = linear(ops, y, attn.c_attn).view(B, T, 3, attn.heads, C // attn.heads)
        rstd_qk = ops.rotate_forward(qkv, *self.turns(T))
        out, saved = self.attention_kernel(B, T).forward(qkv)
        x2 = linear(ops, ops.quantize(out.view(-1, C)), attn.c_proj)
        x2, y, rstd2 = ops.rms_forward(x1, x2, rows_like(x))
        g = linear(ops, y, mlp.c_fc)
        branch = linear(ops, ops.relu2_fp8(g), mlp.c_proj)
        return x2, branch, modern.Kept(x1, rstd1, qkv, rstd_qk, out, saved, x2, rstd2, g)

    def block_backward(self, block: ModernBlock, states: list[modern.Kept], dx: Tensor) -> Tensor:
        ops, attn, mlp = self.ops, block.attn, block.mlp
        x1, rstd1, qkv, rstd_qk, out, saved, x2, rstd2, g = states.pop()
        self.add_weight_gradient(mlp.c_proj.weight, dx, g)
        dh = linear_backward(ops, self.stream8, mlp.c_proj)
        dh8 = ops.relu2_backward_fp8(dh, g)
        dy = linear_backward(ops, dh8, mlp.c_fc)
        dx = self.norm_backward(dy, x2, rstd2, dx)
        self.add_weight_gradient(mlp.c_fc.weight, dh, dy)  # dy now holds RMSNorm's output
        del x2, g, dh, dh8, dy
        self.add_weight_gradient(attn.c_proj.weight, dx, out.view(dx.shape))
        dout = linear_backward(ops, self.stream8, attn.c_proj).view(out.shape)
        dqkv = self.attention_kernel(*out.shape[:2]).backward(dout, qkv, out, saved)
        dqkv8 = empty(len(dx), 3 * dx.shape[1], dx)
        ops.rotate_backward(dqkv, qkv, *self.turns(qkv.shape[1]), rstd_qk, dqkv8)
        del dout, qkv, out, saved
        dy = linear_backward(ops, dqkv8, attn.c_attn)
        dx = self.norm_backward(dy, x1, rstd1, dx)
        self.add_weight_gradient(attn.c_attn.weight, dqkv.view(len(dx), -1), dy)
        return dx

    def norm_backward(self, dy: Tensor, x: Tensor, rstd: Tensor, stream: Tensor | None) -> Tensor:
        self.stream8 = rows_like(x)
        return self.ops.rms_backward(dy, x, rstd, stream, self.stream8)
