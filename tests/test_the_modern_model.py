"""Is the speed recipe's model transformers' `nanochat`?"""

import torch
from fused_models import moved
from transformers import NanoChatConfig, NanoChatForCausalLM

from training.model_config import ModelConfig
from training.modern import CAP, EPS, ROPE_BASE, Modern

CONFIG = ModelConfig(layers=2, channels=64, heads=2, context=32, vocab=200)


def pair() -> tuple[Modern, NanoChatForCausalLM]:
    ours = moved(Modern(CONFIG), 0.1)
    theirs = NanoChatForCausalLM(
        NanoChatConfig(
            vocab_size=CONFIG.vocab, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=2, max_position_embeddings=32, final_logit_softcapping=CAP, rms_norm_eps=EPS,
            rope_parameters={"rope_type": "default", "rope_theta": ROPE_BASE},
        )
    )  # fmt: skip
    names = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    state = {"model.embed_tokens.weight": ours.wte.weight[:200], "lm_head.weight": ours.head.weight[:200]}
    for name, weight in ours.named_parameters():
        if name.startswith("blocks."):
            _, layer, part = name.removesuffix(".weight").split(".", 2)
            if part == "attn.c_attn":
                for letter, third in zip("qkv", weight.chunk(3), strict=True):
                    state[f"model.layers.{layer}.self_attn.{letter}_proj.weight"] = third
            else:
                state[f"model.layers.{layer}.{names[part]}.weight"] = weight
    theirs.load_state_dict(state)
    return ours, theirs.eval()


def test_logits_and_loss_are_transformers() -> None:
    ours, theirs = pair()
    tokens = torch.randint(0, CONFIG.vocab, (3, 33), generator=torch.Generator().manual_seed(2))
    expected = theirs(tokens[:, :-1]).logits
    torch.testing.assert_close(ours.logits(tokens[:, :-1]), expected, atol=1e-5, rtol=1e-5)
    loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(ours(tokens[:, :-1], tokens[:, 1:]), loss)
