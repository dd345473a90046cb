"""How does a Hugging Face model folder become something that scores tokens? Load it, whoever made it."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
HELLO = [15496, 995]  # "Hello world" in GPT-2's vocabulary: tells a GPT-2 tokenizer from any other


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer, ready to score."""

    name: str  # the folder or hub name that it came from
    module: "PreTrainedModel"
    encode: Callable[[Sequence[str]], list[list[int]]]  # texts to token ids, no special tokens added
    decode: Callable[[Sequence[int]], str]
    eot: int  # the token that stands before a document
    context: int  # longest input in tokens
    gpt2_vocabulary: bool  # token shards can be read as they are

    @property
    def device(self) -> torch.device:
        return self.module.device

    def describe(self) -> dict[str, Any]:
        """What a score's record says about the model."""
        return {
            "name": self.name,
            "architecture": type(self.module).__name__,
            "parameters": self.module.num_parameters(),
            "context": self.context,
            "dtype": str(self.module.dtype).removeprefix("torch."),
            "device": self.device.type,
        }


def load(name: str, device: str = "auto", dtype: str = "float32") -> LoadedModel:
    """Load a model folder, or a hub name where there is a network.

    Raises ValueError for an unknown dtype or device.
    """
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM
    from transformers.utils import logging as transformers_logging

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    transformers_logging.disable_progress_bar()
    module = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES[dtype])
    place = pick_device(device)
    if place.type == "cuda":  # a CPU gains nothing by it, and rounds as lm-eval's model there without it
        fuse_gelu(module)
    torch.nn.Module.to(module, place).eval().requires_grad_(False)
    encode, decode, eot = _tokenizer(name)
    config = module.config.get_text_config()
    context: int = config.max_position_embeddings  # GPT-2 maps its n_positions to it
    return LoadedModel(name, module, encode, decode, eot, context, encode(["Hello world"]) == [HELLO] and eot == 50256)


def fuse_gelu(module: torch.nn.Module) -> None:
    """GPT-2's GELU in one kernel: transformers takes eight, each a walk over the widest activations of a block."""
    from transformers.activations import NewGELUActivation

    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(parent, name, torch.nn.GELU(approximate="tanh"))


def pick_device(device: str) -> torch.device:
    if device != "auto":
        if device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"device {device!r}: no GPU is visible; use --device cpu")
        return torch.device(device)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _tokenizer(
    name: str,
) -> tuple[Callable[[Sequence[str]], list[list[int]]], Callable[[Sequence[int]], str], int]:
    """tokenizer.json read by the tokenizers library takes 0.1 s; AutoTokenizer, the general way, 2 s."""
    file = Path(name) / "tokenizer.json"
    if file.exists() and (eot := _eot_of(Path(name))) is not None:
        from tokenizers import Tokenizer

        fast = Tokenizer.from_file(str(file))
        fast.no_padding()
        fast.no_truncation()
        return (
            lambda texts: [e.ids for e in fast.encode_batch(list(texts), add_special_tokens=False)],
            lambda ids: fast.decode(list(ids), skip_special_tokens=False),
            eot,
        )
    from transformers import AutoTokenizer

    slow = AutoTokenizer.from_pretrained(name)
    start = slow.bos_token_id if slow.bos_token_id is not None else slow.eos_token_id
    if start is None:
        raise ValueError(f"the tokenizer of {name} names no bos or eos token: no document could be started")
    return (
        lambda texts: [list(ids) for ids in slow(list(texts), add_special_tokens=False)["input_ids"]],
        lambda ids: str(slow.decode(list(ids), clean_up_tokenization_spaces=False)),
        int(start),
    )


def _eot_of(folder: Path) -> int | None:
    """The start token that the model's config names, as AutoTokenizer would find it."""
    config = json.loads((folder / "config.json").read_text())
    start = config.get("bos_token_id", config.get("eos_token_id"))
    return start if isinstance(start, int) else None
