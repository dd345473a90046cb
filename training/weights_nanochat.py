"""How does the speed recipe's model look in transformers? Its names and configuration there, which is `nanochat`."""

from typing import Any

import torch
from torch import Tensor

from storage.tokenizer import EOT
from training.model_config import ModelConfig
from training.modern import CAP, EPS, ROPE_BASE

Weights = dict[str, Tensor]

_NAMES = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
_EMBEDDINGS = {"wte.weight": "model.embed_tokens.weight", "head.weight": "lm_head.weight"}


def huggingface_config(config: ModelConfig) -> Any:
    """A transformers NanoChatConfig."""
    from transformers import NanoChatConfig

    return NanoChatConfig(
        vocab_size=config.vocab, hidden_size=config.channels, intermediate_size=4 * config.channels,
        num_hidden_layers=config.layers, num_attention_heads=config.heads, max_position_embeddings=config.context,
        rms_norm_eps=EPS, final_logit_softcapping=CAP,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        bos_token_id=EOT, eos_token_id=EOT, pad_token_id=None,
    )  # fmt: skip


def model_config(found: dict[str, Any]) -> ModelConfig:
    """The sizes in a NanoChatConfig's dict. Raises ValueError for a variant that is not the speed recipe's."""
    heads, channels = found["num_attention_heads"], found["hidden_size"]
    expected = {"num_key_value_heads": heads, "intermediate_size": 4 * channels, "hidden_act": "relu2"}
    expected |= {"rms_norm_eps": EPS, "final_logit_softcapping": CAP, "attention_bias": False}
    expected |= {"rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE}, "tie_word_embeddings": False}
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"{key}={found[key]!r} in the model's config.json: only {value!r} is supported here")
    return ModelConfig(
        layers=found["num_hidden_layers"],
        channels=channels,
        heads=heads,
        context=found["max_position_embeddings"],
        vocab=found["vocab_size"],
        family="nanochat",
    )


def to_huggingface(weights: Weights, config: ModelConfig) -> Weights:
    """Our weights under transformers' names; queries, keys and values apart, and no padding rows."""
    found: Weights = {theirs: weights[ours][: config.vocab].clone() for ours, theirs in _EMBEDDINGS.items()}
    for layer in range(config.layers):
        block, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        for letter, part in zip("qkv", weights[block + "attn.c_attn.weight"].chunk(3), strict=True):
            found[f"{theirs}self_attn.{letter}_proj.weight"] = part.clone()
        found |= {f"{theirs}{new}.weight": weights[f"{block}{old}.weight"] for old, new in _NAMES.items()}
    return found


def from_huggingface(found: Weights, config: ModelConfig) -> Weights:
    """The inverse; padding rows are zero."""
    padding = config.padded_vocab - config.vocab
    weights = {}
    for ours, theirs in _EMBEDDINGS.items():
        weights[ours] = torch.cat([found[theirs], found[theirs].new_zeros(padding, config.channels)])
    for layer in range(config.layers):
        block, theirs = f"blocks.{layer}.", f"model.layers.{layer}."
        parts = [found[f"{theirs}self_attn.{letter}_proj.weight"] for letter in "qkv"]
        weights[block + "attn.c_attn.weight"] = torch.cat(parts)
        weights |= {f"{block}{old}.weight": found[f"{theirs}{new}.weight"] for old, new in _NAMES.items()}
    return weights
