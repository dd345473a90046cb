"""A continuation's log-probability is transformers' own, whatever its batch, order, padding or prefix."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiny_gpt2
import torch
from lm_eval.models.utils import resolve_max_length
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    FalconConfig,
    Gemma3TextConfig,
    GPT2LMHeadModel,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MptConfig,
    NanoChatConfig,
    PretrainedConfig,
    Qwen2Config,
)

from evals import scoring
from evals.model import LoadedModel, fuse_gelu, load
from evals.scoring import Request, Scored, Scorer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save(tmp_path_factory.mktemp("model")), "cpu")


def requests(seed: int = 1, groups: int = 5) -> list[Request]:
    """Groups that share a context, of many lengths; continuations of one token among them."""
    draw = random.Random(seed)
    made = []
    for group in range(groups):
        context = tuple(draw.randrange(50257) for _ in range(draw.randrange(1, 40)))
        for _ in range(draw.randrange(1, 5)):
            continuation = tuple(draw.randrange(50257) for _ in range(draw.choice([1, 2, 9, 20])))
            made.append(Request(f"group {group}", context, continuation))
    return made


def expected(module: torch.nn.Module, request: Request, context: int = 10_000) -> tuple[float, bool]:
    tokens = (request.context + request.continuation)[-context - 1 :]
    with torch.no_grad():
        logits = module(torch.tensor([tokens[:-1]])).logits[0, -len(request.continuation) :].double()
    wanted = torch.tensor(request.continuation)
    logprobs = logits.log_softmax(-1)[torch.arange(len(wanted)), wanted]
    return logprobs.sum().item(), bool((logits.argmax(-1) == wanted).all())


def values(scored: list[Scored]) -> list[float]:
    return [s.logprob for s in scored]


def test_equal_to_the_logits_of_transformers(model: LoadedModel) -> None:
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    asked = requests()
    scored = Scorer(model).score(asked)
    for request, score in zip(asked, scored, strict=True):
        logprob, greedy = expected(reference, request)
        assert score.logprob == pytest.approx(logprob, abs=1e-5)
        assert score.greedy == greedy
        assert score.tokens == len(request.continuation)


def test_a_continuation_of_the_likeliest_tokens_is_greedy(model: LoadedModel) -> None:
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    context = [50256, 11, 12]
    made = reference.generate(torch.tensor([context]), max_new_tokens=4, do_sample=False)[0, 3:].tolist()
    asked = [
        Request("likeliest", tuple(context), tuple(made)),
        Request("other", tuple(context), (made[0], 7)),
    ]
    assert [s.greedy for s in Scorer(model).score(asked)] == [True, False]


@pytest.mark.parametrize("batch_tokens", [1, 64, 100_000])
@pytest.mark.parametrize("share", [True, False])
def test_batch_size_padding_and_shared_prefixes_change_nothing(
    model: LoadedModel, batch_tokens: int, share: bool
) -> None:
    asked = requests()
    alone = [Scorer(model, share_prefixes=False).score([request])[0].logprob for request in asked]
    assert values(Scorer(model, batch_tokens, share).score(asked)) == pytest.approx(alone, abs=1e-5)


def test_order_changes_nothing(model: LoadedModel) -> None:
    asked = requests()
    shuffled = random.Random(5).sample(range(len(asked)), len(asked))
    first, again = Scorer(model).score(asked), Scorer(model).score([asked[i] for i in shuffled])
    assert values(again) == pytest.approx([first[i].logprob for i in shuffled], abs=1e-5)


def test_too_long_a_context_loses_tokens_on_the_left_and_is_counted(model: LoadedModel) -> None:
    """As lm-eval: the input's last `context` tokens remain."""
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    long = Request("long", tuple(range(1, 150)), (5, 6, 7))
    fits = Request("fits", tuple(range(1, 127)), (5, 6, 7))  # 126 + 2 inputs: exactly the context of 128
    scored = Scorer(model).score([long, fits])
    assert [s.truncated for s in scored] == [True, False]
    for request, score in zip([long, fits], scored, strict=True):
        assert score.logprob == pytest.approx(expected(reference, request, 128)[0], abs=1e-5)


def test_out_of_memory_halves_the_batch_and_goes_on(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = requests(groups=16)
    scorer = Scorer(model, batch_tokens=400)
    whole = values(scorer.score(asked))
    forward, sizes = scorer._forward, []

    def small_memory(rows):  # type: ignore[no-untyped-def]
        sizes.append(sum(row.length for row in rows))
        if sizes[-1] > 200 and len(rows) > 1:
            raise torch.OutOfMemoryError("no room for more than 200 tokens")
        return forward(rows)

    monkeypatch.setattr(scorer, "_forward", small_memory)
    assert values(scorer.score(asked)) == pytest.approx(whole, abs=1e-5)
    assert sizes[0] > 200  # it failed at first,
    assert max(sizes[3:]) <= 200  # and kept to what fits from then on


def test_one_row_that_does_not_fit_is_an_error(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    scorer = Scorer(model)

    def no_memory(rows):  # type: ignore[no-untyped-def]
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(scorer, "_forward", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        scorer.score(requests())


def in_bf16(device: str, model: LoadedModel) -> tuple[list[float], list[float]]:
    """Scores of the bf16 model, and its bf16 hidden states times its bf16 head, multiplied in fp32."""
    low = load(model.name, device, "bfloat16")
    asked = requests()
    wanted = []
    for request in asked:
        tokens = torch.tensor([(request.context + request.continuation)[:-1]], device=device)
        states = low.module.base_model(tokens).last_hidden_state[0, -len(request.continuation) :].float()
        logits = states @ low.module.lm_head.weight.float().t()
        targets = torch.tensor(request.continuation, device=device)
        wanted.append(logits.log_softmax(-1).gather(-1, targets[:, None]).sum().item())
    return values(Scorer(low, share_prefixes=False, batch_tokens=1).score(asked)), wanted


def test_bf16_logits_are_not_rounded(model: LoadedModel) -> None:
    scored, wanted = in_bf16("cpu", model)
    assert scored == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("piece", [(512, 1_024), (4_096, 65_536)])
def test_logits_are_reduced_on_a_gpu_as_on_a_cpu(
    piece: tuple[int, int], model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = requests()
    here = Scorer(model).score(asked)
    monkeypatch.setattr(scoring, "reduce_in_cache", scoring.reduce_by_rows)
    scorer = Scorer(model)
    scorer.piece = piece
    there = scorer.score(asked)
    assert values(there) == pytest.approx(values(here), abs=1e-5)
    assert [s.greedy for s in there] == [s.greedy for s in here]


def test_gelu_in_one_kernel_changes_nothing(model: LoadedModel) -> None:
    """As on a GPU."""
    fused = load(model.name, "cpu")
    fuse_gelu(fused.module)
    assert {type(block.mlp.act) for block in fused.module.base_model.h} == {torch.nn.GELU}
    asked = requests()
    assert values(Scorer(fused).score(asked)) == pytest.approx(values(Scorer(model).score(asked)), abs=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gives_the_numbers_of_the_cpu(model: LoadedModel) -> None:
    asked = requests()
    on_gpu = Scorer(load(model.name, "cuda")).score(asked)
    assert values(on_gpu) == pytest.approx(values(Scorer(model).score(asked)), abs=1e-3)
    scored, wanted = in_bf16("cuda", model)
    assert scored == pytest.approx(wanted, abs=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_without_room_halves_the_batch_and_gives_the_same_numbers(model: LoadedModel) -> None:
    """The driver's own refusal: this process is left less than the whole batch's logits take."""
    gpu = load(model.name, "cuda")
    asked = requests(groups=60)
    whole = values(Scorer(gpu).score(asked))
    scorer = Scorer(gpu, batch_tokens=1_000_000)
    torch.cuda.empty_cache()
    room = torch.cuda.memory_reserved() + 64 * 2**20
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.get_device_properties(0).total_memory)
    try:
        scored = values(scorer.score(asked))
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert scorer.batch_tokens < 1_000_000
    assert scored == pytest.approx(whole, abs=1e-4)


SMALL = {"vocab_size": 50257, "bos_token_id": 50256, "eos_token_id": 50256, "initializer_range": 0.2}
FEW = {**SMALL, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
BLOCKS = {**FEW, "intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128}
NEO = {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]}
MPT = {"d_model": 32, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}
ARCHITECTURES: dict[str, tuple[type[PretrainedConfig], dict[str, Any], bool]] = {
    # whether prefixes may be shared: rotary positions must reach the attention of a shared row
    "llama": (LlamaConfig, BLOCKS, True),
    "qwen 2": (Qwen2Config, BLOCKS, True),
    "nanochat": (NanoChatConfig, BLOCKS, True),
    "mistral": (MistralConfig, {**BLOCKS, "sliding_window": 8}, False),
    "mistral, a window that no row fills": (MistralConfig, {**BLOCKS, "sliding_window": 120}, True),
    "gemma 3": (Gemma3TextConfig, {**BLOCKS, "sliding_window": 8}, False),
    "gpt-neo": (GPTNeoConfig, {**BLOCKS, **NEO, "window_size": 8}, False),
    "bloom": (BloomConfig, FEW, False),
    "mpt": (MptConfig, {**SMALL, **MPT}, False),
    "mamba": (MambaConfig, FEW, False),
    "falcon with alibi": (FalconConfig, {**FEW, "alibi": True}, False),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures_score_as_their_own_logits_say(name: str, tmp_path: Path) -> None:
    """Also those whose layers see a part of a row only, and those that take no mask or name no longest text."""
    torch.manual_seed(0)
    kind, settings, shared = ARCHITECTURES[name]
    tiny_gpt2.save(tmp_path)  # its tokenizer stays
    AutoModelForCausalLM.from_config(kind(**settings)).save_pretrained(tmp_path)
    scorer = Scorer(load(str(tmp_path), "cpu"))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    asked = requests(2)
    assert values(scorer.score(asked)) == pytest.approx([expected(reference, r)[0] for r in asked], abs=1e-5)
    assert (scorer.honoured > 0) == shared


def test_the_longest_input_is_what_lm_eval_finds(tmp_path: Path) -> None:
    tokenizer = json.loads((Path(tiny_gpt2.save(tmp_path)) / "tokenizer_config.json").read_text())
    for name, said in (("llama", 64), ("bloom", 64), ("bloom", int(1e30))):
        kind, settings, _ = ARCHITECTURES[name]
        AutoModelForCausalLM.from_config(kind(**settings)).save_pretrained(tmp_path)
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"model_max_length": said}))
        module, own = AutoModelForCausalLM.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
        assert load(str(tmp_path), "cpu").context == resolve_max_length(module.config, own)
