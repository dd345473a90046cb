"""How do weights come in and go out? Our names to and from Hugging Face's and llm.c's `.bin` files.

Hugging Face stores GPT-2's linear weights as (in, out), and the embedding without padding rows. llm.c's files hold
a header of 256 int32 (magic, version, context, vocabulary, layers, heads, channels, padded vocabulary), then
the tensors in a fixed order, each kind for all layers, (out, in) like ours: fp32 in version 3, bf16 in 5.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.model import pretrained
from storage import models
from storage.checkpoints import complete
from storage.tokenizer import EOT
from training import weights_nanochat
from training.checkpoint import checkpoint_folder, load_model, newest, read_state
from training.config import from_dict
from training.model_config import ModelConfig
from training.models import Model, build_model

Weights = dict[str, Tensor]

LLMC_MAGIC = 20240326
LLMC_DTYPES = {3: torch.float32, 5: torch.bfloat16}  # by version
HEADER_INTS = 256

_PARTS = (  # of a block: our names are Hugging Face's
    ("ln_1.weight", "ln_1.bias", "attn.c_attn.weight", "attn.c_attn.bias", "attn.c_proj.weight")
    + ("attn.c_proj.bias", "ln_2.weight", "ln_2.bias", "mlp.c_fc.weight", "mlp.c_fc.bias")
    + ("mlp.c_proj.weight", "mlp.c_proj.bias")
)  # fmt: skip


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every parameter's shape by name, in llm.c's order: embeddings, each part of all blocks, ln_f."""
    C = config.channels
    wide = {
        "attn.c_attn": (3 * C, C),
        "attn.c_proj": (C, C),
        "mlp.c_fc": (4 * C, C),
        "mlp.c_proj": (C, 4 * C),
    }
    found: dict[str, tuple[int, ...]] = {
        "wte.weight": (config.padded_vocab, C),
        "wpe.weight": (config.context, C),
    }
    for part in _PARTS:
        module, kind = part.rsplit(".", 1)
        shape = wide.get(module, (C,))
        for layer in range(config.layers):
            found[f"blocks.{layer}.{part}"] = shape if kind == "weight" else shape[:1]
    return found | {"ln_f.weight": (C,), "ln_f.bias": (C,)}


def to_huggingface(weights: Weights, config: ModelConfig) -> Weights:
    """Our weights under the names and in the layout of transformers' model of that family, head included."""
    if config.family == "nanochat":
        return weights_nanochat.to_huggingface(weights, config)
    renamed = {_huggingface_name(n): w.t().contiguous() if _is_linear(n) else w for n, w in weights.items()}
    embedding = weights["wte.weight"][: config.vocab].clone()
    return renamed | {"transformer.wte.weight": embedding, "lm_head.weight": embedding}


def from_huggingface(found: Weights, config: ModelConfig) -> Weights:
    """The inverse; padding rows of the embedding are zero. Takes GPT-2's names with and without `transformer.`."""
    if config.family == "nanochat":
        return weights_nanochat.from_huggingface(found, config)
    weights = {}
    for name, shape in shapes(config).items():
        theirs = _huggingface_name(name)
        tensor = found[theirs if theirs in found else theirs.removeprefix("transformer.")]
        weights[name] = tensor.t().contiguous() if _is_linear(name) else tensor
        if name == "wte.weight":
            weights[name] = torch.cat([tensor, tensor.new_zeros(shape[0] - len(tensor), shape[1])])
    return weights


def _huggingface_name(name: str) -> str:
    return "transformer." + name.replace("blocks.", "h.")


def _is_linear(name: str) -> bool:
    return ".c_" in name and name.endswith(".weight")


def model_config(huggingface: Any) -> ModelConfig:
    """The sizes in a transformers configuration. Raises ValueError for an architecture that is none of ours."""
    found = huggingface.to_dict()
    if found["model_type"] == "nanochat":
        return weights_nanochat.model_config(found)
    expected = {"model_type": "gpt2", "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5}
    expected |= {"scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True}
    for key, value in expected.items():
        if found.get(key, value) != value:
            raise ValueError(f"{key}={found[key]!r} in the model's config.json: only GPT-2's {value!r} is supported")
    return ModelConfig(
        layers=found["n_layer"],
        channels=found["n_embd"],
        heads=found["n_head"],
        context=found["n_positions"],
        vocab=found["vocab_size"],
    )


def huggingface_config(config: ModelConfig) -> Any:
    """The inverse: what transformers builds the model from."""
    if config.family == "nanochat":
        return weights_nanochat.huggingface_config(config)
    from transformers import GPT2Config

    return GPT2Config(
        vocab_size=config.vocab, n_positions=config.context, n_embd=config.channels, n_layer=config.layers,
        n_head=config.heads, bos_token_id=EOT, eos_token_id=EOT, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip


def read_llmc(path: str) -> tuple[ModelConfig, Weights]:
    """The model in an llm.c file, in its own dtype. Raises ValueError for any other file."""
    header = np.fromfile(path, dtype="<i4", count=HEADER_INTS)
    if len(header) < HEADER_INTS or header[0] != LLMC_MAGIC:
        raise ValueError(f"{path} is no llm.c model: its magic is {header[:1].tolist()}, not {LLMC_MAGIC}")
    version, context, vocab, layers, heads, channels, padded = (int(n) for n in header[1:8])
    if version not in LLMC_DTYPES:
        raise ValueError(f"{path} has version {version}: only 3 (fp32) and 5 (bf16) are read; export it anew")
    config = ModelConfig(layers=layers, channels=channels, heads=heads, context=context, vocab=vocab)
    if config.padded_vocab != padded:
        raise ValueError(f"{path} pads {vocab} tokens to {padded}, not to {config.padded_vocab}: export it anew")
    return config, dict(_read_tensors(path, config, LLMC_DTYPES[version]))


def _read_tensors(path: str, config: ModelConfig, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    size = 4 if dtype == torch.float32 else 2
    values = np.memmap(path, dtype="<i4" if size == 4 else "<i2", mode="r", offset=HEADER_INTS * 4)
    needed = sum(int(np.prod(shape)) for shape in shapes(config).values())
    if len(values) != needed:
        raise ValueError(f"{path} is broken: {len(values):,} values, where its header asks for {needed:,}")
    at = 0
    for name, shape in shapes(config).items():
        count = int(np.prod(shape))
        yield name, torch.from_numpy(np.array(values[at : at + count])).view(dtype).view(shape)
        at += count


def write_llmc(path: str, weights: Weights, config: ModelConfig) -> None:
    """Write version 5 for bf16 weights, version 3 for fp32. Raises ValueError for a model that is no GPT-2."""
    if config.family != "gpt2":
        raise ValueError(
            f"{path}: llm.c's format holds GPT-2 only, and this is a {config.family} model; name a folder instead, "
            "for a model that stock transformers loads"
        )
    dtype = weights["wte.weight"].dtype
    version = next(number for number, kind in LLMC_DTYPES.items() if kind == dtype)
    header = np.zeros(HEADER_INTS, dtype="<i4")
    sizes = (config.context, config.vocab, config.layers, config.heads, config.channels, config.padded_vocab)
    header[:8] = [LLMC_MAGIC, version, *sizes]
    bits = torch.int32 if version == 3 else torch.int16
    partial = Path(path).with_name(Path(path).name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with partial.open("wb") as file:
        file.write(header.tobytes())
        for name in shapes(config):
            weights[name].detach().cpu().contiguous().view(bits).numpy().tofile(file)
    partial.replace(path)


def load_any(source: str) -> Model:
    """The model of a run folder (its newest checkpoint), an llm.c .bin, or a Hugging Face folder or hub name.

    The weights are fp32. Raises ValueError where there is no model.
    """
    if (source.endswith(".bin") or models.is_path(source)) and not Path(source).exists():
        raise ValueError(f"{source} does not exist: give a run folder, a model folder or a hub name, or an llm.c .bin")
    if source.endswith(".bin"):
        config, weights = read_llmc(source)
        return _model(config, weights)
    if Path(source, "checkpoints").is_dir():
        return load_run(source)
    return load_huggingface(source)


def load_run(run: str, step: int | None = None) -> Model:
    """The model of a run's checkpoint, the newest or that of a step. Raises ValueError where there is none."""
    checkpoint = newest(run) if step is None else checkpoint_folder(run, step)
    if checkpoint is None:
        raise ValueError(f"{run} has no complete checkpoint yet: train it first")
    if step is not None and step not in complete(run):
        raise ValueError(f"{run} has no complete checkpoint of step {step}, only of {complete(run)}")
    model = empty_model(from_dict(ModelConfig, read_state(checkpoint)["config"]["model"]))
    load_model(checkpoint, model)
    return model


def load_huggingface(source: str) -> Model:
    """Raises ValueError for a folder without a model of our families, or without all of its weights."""
    if Path(source).is_dir() and not Path(source, "config.json").exists():
        raise ValueError(f"{source} holds neither checkpoints nor config.json: give a run folder or a model folder")
    from transformers import AutoConfig

    config = model_config(AutoConfig.from_pretrained(source))
    theirs = pretrained(source, torch.float32)
    return _model(config, from_huggingface(theirs.state_dict(), config))


def _model(config: ModelConfig, weights: dict[str, torch.Tensor]) -> Model:
    model = empty_model(config)
    model.load_state_dict({name: w.float() for name, w in weights.items()})
    return model


def empty_model(config: ModelConfig) -> Model:
    """A model on the CPU whose weights hold anything: torch's own initialization would be thrown away."""
    with torch.device("meta"):
        model = build_model(config)
    model.to_empty(device="cpu")
    return model
