"""How does a Hugging Face model folder become something that scores tokens? Load it, whoever made it."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from storage.tokenizer import EOT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

DTYPES = {
    "float32": torch.float32, "fp32": torch.float32,
    "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float16": torch.float16, "fp16": torch.float16,
}  # fmt: skip
HELLO = [15496, 995]  # "Hello world" in GPT-2's vocabulary: tells a GPT-2 tokenizer from any other
UNBOUNDED = 10**30  # what a tokenizer without a bound says of its longest text


@dataclass(frozen=True)
class LoadedModel:
    """A causal language model with its tokenizer, ready to score."""

    name: str  # the folder or hub name that it came from
    module: "PreTrainedModel"
    encode: Callable[[Sequence[str]], list[list[int]]]  # texts to token ids, no special tokens added
    encode_prompts: Callable[[Sequence[str]], list[list[int]]]  # with those that the tokenizer adds, as BOS
    decode: Callable[[Sequence[int]], str]  # special tokens left out
    eot: int  # the token that stands before a document
    ends: tuple[int, ...]  # tokens that end a text
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

    Raises ValueError for an unknown dtype or device, and where weights are missing.
    """
    from transformers.utils import logging as transformers_logging

    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is unknown: use one of {', '.join(DTYPES)}")
    transformers_logging.disable_progress_bar()
    module = pretrained(name, DTYPES[dtype])
    place = pick_device(device)
    if place.type == "cuda":  # a CPU gains nothing by it, and rounds as lm-eval's model there without it
        fuse_gelu(module)
    torch.nn.Module.to(module, place).eval().requires_grad_(False)
    codec = _gpt2_codec(Path(name)) or _codec(name)
    return LoadedModel(
        name, module, codec.encode, codec.encode_prompts, codec.decode, codec.eot, _ends(module, codec),
        _context(module, codec.longest), codec.encode(["Hello world"]) == [HELLO] and codec.eot == EOT,
    )  # fmt: skip


def pretrained(name: str, dtype: torch.dtype) -> "PreTrainedModel":
    """What transformers makes of a folder or hub name.

    Raises ValueError for missing weights, which it fills with random numbers; tied ones are not among them.
    """
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, output_loading_info=True)
    module, found = loaded
    missing = sorted(found["missing_keys"])
    if missing:
        named = ", ".join(missing[:5]) + (" …" if len(missing) > 5 else "")
        raise ValueError(f"{name} lacks {len(missing)} of its model's weights: {named}; give a folder that holds all")
    return module


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
            raise ValueError(
                f"device {device}: torch {torch.__version__} sees no GPU. Install a torch for a CUDA that the driver "
                "supports (`nvidia-smi` shows which), or use the CPU: CUDA_VISIBLE_DEVICES= before a `gpt2` command, "
                "--device cpu for evals.run"
            )
        try:
            return torch.device(device)
        except RuntimeError:
            raise ValueError(f"device {device!r} is none of torch's: use auto, cpu, cuda or cuda:1 …") from None
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Codec:
    """What is taken from a tokenizer, whichever library read it."""

    encode: Callable[[Sequence[str]], list[list[int]]]
    encode_prompts: Callable[[Sequence[str]], list[list[int]]]
    decode: Callable[[Sequence[int]], str]
    eot: int
    end: int | None
    longest: int | None  # in tokens, as the tokenizer says


def _gpt2_codec(folder: Path) -> Codec | None:
    """GPT-2's tokenizer.json read by the tokenizers library, 0.1 s; AutoTokenizer, the general way, takes 2 s."""
    files = [folder / name for name in ("tokenizer.json", "tokenizer_config.json", "config.json")]
    if not all(file.exists() for file in files):
        return None
    settings, config = (json.loads(file.read_text()) for file in files[1:])
    if settings.get("tokenizer_class") not in ("GPT2Tokenizer", "GPT2TokenizerFast"):
        return None
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(files[0]))
    fast.no_padding()
    fast.no_truncation()
    if fast.encode("Hello world").ids != HELLO or config.get("bos_token_id") != EOT:
        return None

    def encode(texts: Sequence[str]) -> list[list[int]]:
        return [e.ids for e in fast.encode_batch(list(texts), add_special_tokens=False)]

    return Codec(
        encode,
        encode,  # it adds none
        lambda ids: fast.decode(list(ids)),
        EOT,
        EOT,
        settings.get("model_max_length"),
    )


def _codec(name: str) -> Codec:
    """Any tokenizer, and what lm-eval's `hf` model does with it."""
    from transformers import AutoTokenizer

    own = AutoTokenizer.from_pretrained(name)
    start = own.bos_token_id if own.bos_token_id is not None else own.eos_token_id
    if start is None:
        raise ValueError(f"the tokenizer of {name} names no bos or eos token: no document could be started")
    begin = str(own.decode(start))

    def encode_prompts(texts: Sequence[str]) -> list[list[int]]:
        if any(text.startswith(begin) for text in texts):  # nothing is added to what begins with it already
            return [own.encode(text, add_special_tokens=not text.startswith(begin)) for text in texts]
        return list(own(list(texts))["input_ids"])

    return Codec(
        lambda texts: list(own(list(texts), add_special_tokens=False)["input_ids"]),
        encode_prompts,
        lambda ids: str(own.decode(list(ids), skip_special_tokens=True)),
        int(start),
        own.eos_token_id,
        own.model_max_length,
    )


def _ends(module: "PreTrainedModel", codec: Codec) -> tuple[int, ...]:
    settings = module.generation_config
    named = settings.eos_token_id if settings else None
    found = [codec.end, *(named if isinstance(named, list) else [named])]
    return tuple(dict.fromkeys(end for end in found if end is not None))


def _context(module: "PreTrainedModel", longest: int | None) -> int:
    """As lm-eval: the first that the config names, else what the tokenizer says, else 2,048."""
    config = module.config.get_text_config()
    named = (getattr(config, key, None) for key in ("n_positions", "max_position_embeddings", "n_ctx"))
    context = next((value for value in named if value is not None), longest)
    return int(context) if context is not None and context < UNBOUNDED else 2048
