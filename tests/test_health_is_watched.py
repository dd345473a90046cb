"""Norms and each layer's extremes in metrics.jsonl, against transformers' attention and hidden states."""

import json
import math
from pathlib import Path

import pytest
import tiny_run
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from training.health import examine
from training.optim import ShardedAdamW
from training.weights import to_huggingface


def test_extremes_equal_those_of_transformers() -> None:
    ours = tiny_run.model(seed=3)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.mul_(20)  # so that attention is far from even
    config = GPT2Config(n_layer=2, n_embd=32, n_head=2, n_positions=16, vocab_size=256)
    theirs = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    theirs.load_state_dict(to_huggingface(ours.state_dict(), ours.config))
    tokens = torch.randint(0, 256, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = theirs.transformer(tokens, output_hidden_states=True, output_attentions=True)

    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in ours.parameters()))
    optimizer = ShardedAdamW(ours, tiny_run.config().train, tiny_run.alone())
    found = examine(ours, optimizer, tokens)
    assert found["parameter_norm"] == pytest.approx(norm, rel=1e-5)
    rms = float(out.hidden_states[1].square().mean().sqrt())  # behind the first block
    assert found["activation_rms"][0] == pytest.approx(rms, abs=1e-3)
    queries_keys = theirs.transformer.h[0].attn.c_attn(theirs.transformer.h[0].ln_1(out.hidden_states[0]))
    q, k, _ = queries_keys.split(32, dim=2)
    q, k = (x.view(1, 16, 2, 16).transpose(1, 2) for x in (q, k))
    logits = (q @ k.transpose(2, 3) / 4).tril().detach()
    seen = torch.ones(16, 16).tril().bool()
    assert found["attention_logit_max"][0] == pytest.approx(float(logits[..., seen].max()), abs=1e-3)


def test_a_run_writes_them_on_their_interval(tmp_path: Path) -> None:
    run = tiny_run.folder(tmp_path / "run", tiny_run.config(health_every=3))
    tiny_run.steps(run, tiny_run.tokens(tmp_path / "tokens"))
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "parameter_norm" in line] == [0, 3]
    assert all(len(line["activation_rms"]) == 2 for line in lines if "activation_rms" in line)
    assert all(line["tokens_per_second"] > 0 and "cost" in line and "mfu" in line for line in lines)
