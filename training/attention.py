"""How do tokens attend to earlier ones? Causal attention over packed queries, keys and values."""

import torch.nn.functional as F
from torch import Tensor


def attend(qkv: Tensor, heads: int) -> Tensor:
    """(B, T, 3C) of queries, keys and values, each H x D wide -> (B, T, C)."""
    B, T, channels3 = qkv.shape
    q, k, v = qkv.view(B, T, 3, heads, channels3 // (3 * heads)).permute(2, 0, 3, 1, 4)  # (B, H, T, D) each
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    return y.transpose(1, 2).reshape(B, T, channels3 // 3)
