"""A GPT-2 of transformers, small and random, saved as a model folder with GPT-2's real tokenizer."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from storage import tokenizer


def save(folder: Path, seed: int = 0, context: int = 128) -> str:
    """Weights three times as wide as GPT-2's at birth, so that its choices are far apart."""
    torch.manual_seed(seed)
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=context, initializer_range=0.06)
    GPT2LMHeadModel(config).save_pretrained(folder)
    files = {
        "vocab": str(tokenizer.VOCABULARY / "encoder.json"),
        "merges": str(tokenizer.VOCABULARY / "vocab.bpe"),
    }
    GPT2Tokenizer(**files).save_pretrained(folder)
    return str(folder)


def save_llama(folder: Path, bos: str = "<s>", context: int = 128) -> str:
    """A model whose tokenizer puts BOS before each text, as Llama 3's does, over GPT-2's words."""
    torch.manual_seed(0)
    save(folder)
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(["<s>", "</s>"])
    token = fast.token_to_id(bos)
    fast.post_processor = TemplateProcessing(single=f"{bos} $A", pair=None, special_tokens=[(bos, token)])
    PreTrainedTokenizerFast(tokenizer_object=fast, bos_token=bos, eos_token="</s>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=fast.get_vocab_size(), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=context, initializer_range=0.2, bos_token_id=token,
        eos_token_id=fast.token_to_id("</s>"),
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


# HellaSwag's raw schema: WikiHow's markup, and a ctx_b that begins in lower case or is empty
ITEMS: list[dict[str, Any]] = [
    {
        "ind": 3, "activity_label": "Roof shingle removal",
        "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
        "ctx": "A man is sitting on a roof. he", "label": "3",
        "endings": ["is using wrap.", "is ripping tiles off.", "holds a rubik's cube.", "pulls up roofing."],
    },
    {
        "ind": 9, "activity_label": "Health", "label": "1", "ctx_b": "",
        "ctx_a": "[header] How to rest [title] Lie down. [step] Find a  quiet room.",
        "ctx": "[header] How to rest [title] Lie down. [step] Find a  quiet room.",
        "endings": ["[substeps] Sleep.", "[title] Shut doors. [step] Then eyes.", "Run.", "Shout “now”!"],
    },
    {
        "ind": 24, "activity_label": "Chess",
        "ctx_a": "Two people sit at a table.", "ctx_b": "the younger one",
        "ctx": "Two people sit at a table. the younger one", "label": "0",
        "endings": ["moves a pawn forward.", "eats the bishop and smiles for very long.", "flies.", "sings."],
    },
]  # fmt: skip


def write_items(file: Path, items: list[dict[str, Any]] | None = None) -> str:
    file.write_text("".join(json.dumps(item) + "\n" for item in (ITEMS if items is None else items)))
    return str(file)
