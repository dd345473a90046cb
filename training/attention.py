"""How do tokens attend to earlier ones? Causal attention over packed queries, keys and values.

`attend` is PyTorch's own, for any device. `Cudnn` is cuDNN's fused kernel through its frontend (the package
nvidia-cudnn-frontend), which reads and writes the packed tensors without copies and, unlike PyTorch's binding of
the same library, can ask for the deterministic backward kernel.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

REPEATABLE = [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]  # their backward can be deterministic
ANY = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3C) of queries, keys and values, each H x D wide -> (B, T, C)."""
    B, T, channels3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, channels3 // (3 * heads)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, channels3 // 3)


class Torch:
    """`attend` with its backward pass, for one shape: PyTorch's flash kernel on a GPU."""

    def __init__(self, B: int, T: int, H: int, D: int, deterministic: bool = False) -> None:
        self.shape, self.deterministic = (B, T, H, D), deterministic

    def forward(self, qkv: Tensor) -> tuple[Tensor, Any]:
        """qkv (B, T, 3, H, D) -> the output (B, T, H, D) and the graph behind it."""
        with torch.enable_grad(), sdpa_kernel(REPEATABLE if self.deterministic else ANY):
            leaf = qkv.detach().requires_grad_()
            out = attend(leaf.flatten(2), self.shape[2]).view(self.shape)
        return out.detach(), (leaf, out)

    def backward(self, grad: Tensor, qkv: Tensor, out: Tensor, saved: Any) -> Tensor:
        """The gradient of qkv, packed like it."""
        before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(before or self.deterministic)
        leaf, graph = saved
        (grad_qkv,) = torch.autograd.grad(graph, leaf, grad)
        torch.use_deterministic_algorithms(before)
        return grad_qkv


class Cudnn:
    """cuDNN's causal attention for one shape (B, T, H, D), forward and, deterministically, backward, in bf16."""

    def __init__(self, B: int, T: int, H: int, D: int, device: int) -> None:
        self.shape = (B, T, H, D)
        self.cudnn, self.handle = _cudnn(device)
        self.packed = [T * 3 * H * D, D, 3 * H * D, 1]  # strides of (B, H, T, D) inside (B, T, 3, H, D)
        self.plain = [T * H * D, D, H * D, 1]
        self.forward_graph, self.backward_graph = self._forward_graph(), self._backward_graph()

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """qkv (B, T, 3, H, D) -> the output (B, T, H, D) and the row statistics (B, H, T, 1) fp32."""
        B, T, H, D = self.shape
        out = torch.empty(B, T, H, D, dtype=qkv.dtype, device=qkv.device)
        stats = torch.empty(B, H, T, 1, dtype=torch.float32, device=qkv.device)
        self._run(self.forward_graph, *qkv.unbind(2), out, stats)
        return out, stats

    def backward(self, grad: Tensor, qkv: Tensor, out: Tensor, stats: Tensor) -> Tensor:
        """The gradient of qkv, packed like it."""
        grad_qkv = torch.empty_like(qkv)
        self._run(self.backward_graph, *qkv.unbind(2), out, grad, stats, *grad_qkv.unbind(2))
        return grad_qkv

    def _run(self, built: tuple[Any, list[Any]], *tensors: Tensor) -> None:
        graph, names = built
        size = max(graph.get_workspace_size(), 1)  # up to 1.5 GiB, so not kept: the allocator has it at hand
        workspace = torch.empty(size, dtype=torch.uint8, device=tensors[0].device)
        self.cudnn.set_stream(self.handle, torch.cuda.current_stream().cuda_stream)
        pointers = {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}
        graph.execute(pointers, workspace.data_ptr(), handle=self.handle)

    def _graph(self) -> Any:
        types = self.cudnn.data_type
        return self.cudnn.pygraph(
            io_data_type=types.BFLOAT16,
            intermediate_data_type=types.FLOAT,
            compute_data_type=types.FLOAT,
            handle=self.handle,
        )

    def _tensor(self, graph: Any, stride: list[int]) -> Any:
        B, T, H, D = self.shape
        return graph.tensor(dim=[B, H, T, D], stride=stride, data_type=self.cudnn.data_type.BFLOAT16)

    def _forward_graph(self) -> tuple[Any, list[Any]]:
        B, T, H, D = self.shape
        graph = self._graph()
        q, k, v = (self._tensor(graph, self.packed) for _ in range(3))
        out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, attn_scale=1 / math.sqrt(D), use_causal_mask=True)
        out.set_output(True).set_dim([B, H, T, D]).set_stride(self.plain)
        stats.set_output(True).set_data_type(self.cudnn.data_type.FLOAT)
        return self._build(graph), [q, k, v, out, stats]

    def _backward_graph(self) -> tuple[Any, list[Any]]:
        B, T, H, D = self.shape
        graph = self._graph()
        q, k, v = (self._tensor(graph, self.packed) for _ in range(3))
        out, grad = (self._tensor(graph, self.plain) for _ in range(2))
        stats = graph.tensor(dim=[B, H, T, 1], stride=[H * T, T, 1, 1], data_type=self.cudnn.data_type.FLOAT)
        grads = graph.sdpa_backward(
            q=q, k=k, v=v, o=out, dO=grad, stats=stats, attn_scale=1 / math.sqrt(D), use_causal_mask=True,
            use_deterministic_algorithm=True,
        )  # fmt: skip
        for each in grads:
            each.set_output(True).set_dim([B, H, T, D]).set_stride(self.packed)
        return self._build(graph), [q, k, v, out, grad, stats, *grads]

    def _build(self, graph: Any) -> Any:
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([self.cudnn.heur_mode.A])
        graph.check_support()
        graph.build_plans()
        return graph


@functools.cache
def _cudnn(device: int) -> tuple[Any, Any]:
    """The frontend and a handle of it on this device."""
    import cudnn

    with torch.cuda.device(device):
        return cudnn, cudnn.create_handle()
