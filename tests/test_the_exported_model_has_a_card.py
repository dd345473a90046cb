"""The export tells what it is from the records, goes to the hub with its scores, and to llm.c as a file."""

from pathlib import Path

import numpy as np
import pytest
from local_model_hub import serve
from tiny_pipeline import Finished, gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel

from storage import models, records
from training.weights import read_llmc


def card(finished: Finished) -> str:
    return Path(finished.store, "runs/tiny/export/README.md").read_text()


def test_the_card_tells_data_recipe_scores_cost_and_commit(finished: Finished) -> None:
    text = card(finished)
    trained = records.read_record(finished.store, "runs/tiny")
    score = records.read_record(finished.store, "runs/tiny/scores/validation_loss")
    assert trained is not None and score is not None
    loss = score.metrics["scores"]["loss"]
    assert f"| validation_loss | loss | {loss['value']:.4f} ± {loss['stderr']:.4f} | {loss['n']} |" in text
    assert "| steps | 6 |" in text and "| recipe | demo |" in text and "corpora/embedded" in text
    assert f"`{trained.fingerprint}`" in text and f"`{trained.commit}`" in text
    assert text.startswith("---\nlibrary_name: transformers\n") and "## Cost" in text


def test_a_newer_card_leaves_the_export_as_recorded(finished: Finished) -> None:
    """It was written again with the scores, after the export's record."""
    export = records.read_record(finished.store, "runs/tiny/export")
    assert export is not None
    assert "README.md" not in [file.path for file in export.files]
    assert all(records.file_problem(finished.store, export.key, file) is None for file in export.files)


def test_the_export_goes_to_the_hub_with_its_card(finished: Finished, tmp_path: Path) -> None:
    """By the real client, to a hub on this machine, and back."""
    with pytest.MonkeyPatch.context() as patch, serve(patch, tmp_path / "cache") as hub:
        models.push(f"{finished.store}/runs/tiny/export", "owner/tiny", "Export of tiny")
        assert hub.private == {"owner/tiny"}
        assert hub.repos["owner/tiny"]["README.md"].decode() == card(finished)
        assert "record.json" not in hub.repos["owner/tiny"]
        folder = models.fetch(models.resolve("owner/tiny"))
        patch.setenv("HF_TOKEN", "wrong")
        with pytest.raises(ValueError, match=r"(?s)owner/other can't be pushed to .* may HF_TOKEN write there"):
            models.push(folder, "owner/other", "again")
    assert AutoTokenizer.from_pretrained(folder)("Hello world")["input_ids"] == [15496, 995]
    assert GPT2LMHeadModel.from_pretrained(folder).num_parameters() == 1_623_040


@pytest.mark.parametrize(
    "repo, token, said",
    [("tiny", "x", "write OWNER/NAME"), ("owner/a b", "x", "write OWNER/NAME"), ("a/b", "", "HF_TOKEN")],
)
def test_a_push_that_cannot_succeed_is_refused(
    repo: str, token: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ValueError, match=said):
        models.check_push(repo)


def test_a_run_is_exported_for_llm_c(finished: Finished, tmp_path: Path) -> None:
    done = gpt2("export", "tiny", "--out", "tiny.bin", "--dtype", "bf16", "--store", finished.store, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    config, weights = read_llmc(str(tmp_path / "tiny.bin"))
    ours = GPT2LMHeadModel.from_pretrained(f"{finished.store}/runs/tiny/export").state_dict()["transformer.wpe.weight"]
    assert config.context == 64
    assert np.array_equal(weights["wpe.weight"].float().numpy(), ours.bfloat16().float().numpy())
