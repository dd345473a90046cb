"""The export tells what it is from the records, goes to the hub with its scores, and to llm.c as a file."""

import io
import sys
from dataclasses import replace
from pathlib import Path

import dagster as dg
import numpy as np
import pytest
from local_model_hub import serve
from rich.console import Console
from tiny_pipeline import Finished, copied, gpt2
from transformers import AutoTokenizer, GPT2LMHeadModel

from assets.card import card as card_of
from assets.card import outputs_of, with_ancestors
from assets.making import Maker
from assets.model import hf_model
from assets.resources import Launcher
from pipeline.runs import silent_maker
from pipeline.terminal import Terminal
from storage import models, records
from storage.places import places
from training.config import SUITES
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


def test_a_suite_of_many_scores_hides_no_headline(finished: Finished) -> None:
    """MMLU's 57 subjects neither the tasks that come after it, nor CORE's mean, which stands behind its tasks."""
    maker = silent_maker(places(finished.store))
    made = [r for r in with_ancestors(maker, outputs_of(maker, "tiny")) if r.asset not in SUITES]
    score = records.read_record(finished.store, "runs/tiny/scores/eleuther")
    assert score is not None
    harness = ["average", "arc_challenge/acc", "mmlu/acc", *(f"mmlu_{n}/acc" for n in range(57)), "winogrande/acc"]
    core = [f"task_{n}/{kind}" for n in range(22) for kind in ("acc", "centred")] + ["core"]
    for suite, names in (("eleuther", harness), ("core", core), ("hellaswag", ["completion_acc"])):
        scores = {name: {"value": 0.25, "stderr": 0.01, "n": 4} for name in names}
        made.append(replace(score, asset=suite, metrics={"scores": scores, "protocol": "p"}))
    text = card_of("tiny", maker.run_config("tiny"), made).split("## Scores")[1].split("##")[0]
    rows = [tuple(line.split(" | ")[:2]) for line in text.strip().splitlines()[2:]]
    assert rows[0] == ("| eleuther", "average") and ("| eleuther", "winogrande/acc") in rows[:4]
    assert rows[30:32] == [("| eleuther", "… and 31 more in the report"), ("| core", "core")]
    assert rows[61:] == [("| core", "… and 15 more in the report"), ("| hellaswag", "completion_acc")]


def test_the_card_of_a_fine_tuned_run_tells_what_it_started_from(finished: Finished) -> None:
    maker = silent_maker(places(finished.store))
    made = with_ancestors(maker, outputs_of(maker, "tiny"))
    assert "started from" not in card(finished) and "base_model" not in card(finished)
    for source, revision, base in (("owner/gpt2-mini", "607a30d7", True), ("/models/mini", "", False)):
        facts = {"source": source, "revision": revision}
        start = replace(made[0], asset="starting_weights", key="weights/mini-12345678", metrics=facts)
        text = card_of("tiny", maker.run_config("tiny"), [*made, start])
        at = " at `607a30d7`" if revision else ""
        assert f"| started from | {source}{at} (`weights/mini-12345678`) |" in text
        assert (f"\nbase_model: {source}\n" in text.split("---")[1]) == base


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


# the exporter, with a tolerance that nothing keeps to
STRICT = """#!/bin/sh
exec {python} -c "
import sys
from training import export
export.TOLERANCE = -1.0
sys.exit(export.main(sys.argv[3:]))
" "$@"
"""


def test_an_export_with_other_logits_fails_its_check_and_is_no_output(finished: Finished, tmp_path: Path) -> None:
    store = copied(finished.store, tmp_path)
    Path(store, "runs/tiny/export/record.json").unlink()
    strict = tmp_path / "strict"
    strict.write_text(STRICT.format(python=sys.executable))
    strict.chmod(0o755)
    said = io.StringIO()
    maker = Maker(places(store), Launcher(str(strict)), Terminal(Console(file=said, width=200)))

    @dg.asset(deps=[hf_model], partitions_def=hf_model.partitions_def)
    def follows() -> None: ...

    with dg.DagsterInstance.ephemeral() as dagster:
        dagster.add_dynamic_partitions("run", ["tiny"])
        done = dg.materialize(
            [hf_model, follows],
            partition_key="tiny",
            instance=dagster,
            resources={"maker": dg.ResourceDefinition.hardcoded_resource(maker)},
            raise_on_error=False,
        )
    (check,) = done.get_asset_check_evaluations()
    assert not done.success and not done.asset_materializations_for_node("follows")
    assert (check.check_name, check.passed, check.metadata["tolerance"].value) == ("logits_agree", False, -1.0)
    assert 0 <= check.metadata["max_difference"].value < 1e-4
    assert "✗ hf_model         logits_agree failed: max_difference " in said.getvalue() and "✓" not in said.getvalue()
    assert records.read_record(store, "runs/tiny/export") is None


def test_the_card_of_a_rounded_export_tells_what_the_rounding_does(finished: Finished) -> None:
    maker = silent_maker(places(finished.store))
    made = with_ancestors(maker, outputs_of(maker, "tiny"))
    assert "Stock transformers gives its checkpoint's logits within " in card_of("tiny", maker.run_config("tiny"), made)
    (export,) = (record for record in made if record.asset == "hf_model")
    for exact, said in (
        (1.1e-2, "rounded to bf16 within 2.0e-06, and those of the checkpoint itself within 1.1e-02, on 64 held-out"),
        (None, "rounded to bf16 within 2.0e-06 on 64 held-out"),
    ):
        metrics = export.metrics | {"max_difference": 2e-6, "checkpoint_difference": exact}
        rounded = replace(export, config={"dtype": "bf16"}, metrics=metrics)
        text = card_of("tiny", maker.run_config("tiny"), [r for r in made if r.asset != "hf_model"] + [rounded])
        assert said in text, text
