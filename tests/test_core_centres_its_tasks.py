"""CORE on a small bundle of the published layout, against transformers' logits and the definition."""

import io
import json
import random
import shutil
import threading
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from hashlib import sha256
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import tiny_gpt2
import torch
from local_hub import LocalHub
from transformers import GPT2LMHeadModel

from evals import core, core_bundle
from evals.model import LoadedModel, load
from evals.scoring import Scorer
from storage import hub, tokenizer

CHOICES = [
    {"query": f"Question {n}: what is {n} plus {n}?\nAnswer:", "choices": [str(2 * n), "a cat", "7 dogs"], "gold": 0}
    for n in range(6)
]
SCHEMA = [
    {"context_options": [f"The cup did not fit into bag {n} because the cup", f"The cup left bag {n} because the bag"],
     "continuation": "was too large.", "gold": n % 2}
    for n in range(5)
]  # fmt: skip
LANGUAGE = [{"context": f"One, two, {n} and then comes  ", "continuation": "three"} for n in range(4)]
PAGE = """icl_tasks:
- {label: sums, dataset_uri: a/sums.jsonl, num_fewshot: [2], icl_task_type: multiple_choice}
- {label: cups, dataset_uri: a/cups.jsonl, num_fewshot: [0], icl_task_type: schema, continuation_delimiter: ' '}
- {label: counting, dataset_uri: a/counting.jsonl, num_fewshot: [1], icl_task_type: language_modeling}
"""


def write_bundle(folder: Path) -> str:
    data = folder / "eval_data" / "a"
    data.mkdir(parents=True)
    (folder / "core.yaml").write_text(PAGE)
    (folder / "eval_meta_data.csv").write_text(
        "Eval Task,Task Category,Random baseline\nsums,math,33.0\ncups,language,50\ncounting,language,0.0\n"
    )
    for name, items in (("sums", CHOICES), ("cups", SCHEMA), ("counting", LANGUAGE)):
        (data / f"{name}.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load(tiny_gpt2.save(tmp_path_factory.mktemp("model")), "cpu")


def losses(reference: GPT2LMHeadModel, text: str) -> tuple[list[int], torch.Tensor, list[int]]:
    """Tokens after EOT, the loss of each, and the likeliest token at each place."""
    tokens = [tokenizer.EOT, *tokenizer.encode(text).tolist()]
    with torch.no_grad():
        logits = reference(torch.tensor([tokens])).logits[0, :-1].double()
    wanted = torch.tensor(tokens[1:])
    return tokens[1:], torch.nn.functional.cross_entropy(logits, wanted, reduction="none"), logits.argmax(-1).tolist()


def common(lines: list[list[int]]) -> int:
    return next(i for i, several in enumerate(zip(*lines, strict=False)) if len(set(several)) > 1)


def shuffled(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = list(items)
    random.Random(1337).shuffle(order)
    return order


def examples(items: list[dict[str, Any]], number: int, count: int) -> list[dict[str, Any]]:
    others = [i for i in range(len(items)) if i != number]
    return [items[i] for i in random.Random(1234 + number).sample(others, count)]


def expected_sums(reference: GPT2LMHeadModel) -> float:
    items, right = shuffled(CHOICES), 0
    for number, item in enumerate(items):
        shown = "".join(f"{e['query']} {e['choices'][e['gold']]}\n\n" for e in examples(items, number, 2))
        lines = [losses(reference, f"{shown}{item['query']} {choice}") for choice in item["choices"]]
        start = common([tokens for tokens, _, _ in lines])
        means = [loss[start:].mean().item() for _, loss, _ in lines]
        right += means.index(min(means)) == item["gold"]
    return right / len(items)


def expected_cups(reference: GPT2LMHeadModel) -> float:
    items, right = shuffled(SCHEMA), 0
    for item in items:
        lines = [losses(reference, f"{context} {item['continuation']}") for context in item["context_options"]]
        length = common([tokens[::-1] for tokens, _, _ in lines])
        means = [loss[-length:].mean().item() for _, loss, _ in lines]
        right += means.index(min(means)) == item["gold"]
    return right / len(items)


def test_core_equals_its_definition_over_the_logits_of_transformers(model: LoadedModel, tmp_path: Path) -> None:
    result = core.evaluate(model, Scorer(model), write_bundle(tmp_path))
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    sums, cups = expected_sums(reference), expected_cups(reference)
    assert result.scores["sums"].value == sums
    assert result.scores["cups"].value == cups
    assert result.scores["counting"].value == 0.0  # a random model's likeliest token is not the one
    assert result.scores["sums/centred"].value == pytest.approx((sums - 0.33) / 0.67)
    assert result.scores["partial_core"].value == pytest.approx(((sums - 0.33) / 0.67 + (cups - 0.5) / 0.5 + 0.0) / 3)
    assert result.details["complete"] is False  # 3 tasks are no CORE
    assert result.items == 6 + 5 + 4 == len(result.per_item) == result.wanted


def test_a_continuation_that_the_model_would_write_is_right(model: LoadedModel, tmp_path: Path) -> None:
    reference = GPT2LMHeadModel.from_pretrained(model.name).eval()
    _, _, likeliest = losses(reference, "One, two, 0 and then comes what")
    word = tokenizer.encoding().decode([likeliest[-1]])
    task = core.Task(
        "t", "language_modeling", ({"context": "One, two, 0 and then comes", "continuation": word},), 0, "", 0.0
    )
    ((request,),) = core.requests(task, model.encode, model.eot)
    (scored,) = Scorer(model).score([request])
    assert core._is_right(task, task.items[0], [scored])


def test_long_prompts_keep_their_end(model: LoadedModel) -> None:
    request = core.Request("x", tuple(range(1, 200)), (7, 8))
    cut = core.crop(request, model.context)
    assert len(cut.context) + len(cut.continuation) == model.context
    assert cut.context[-1] == 199 and cut.continuation == (7, 8)
    with pytest.raises(ValueError, match="x can't be scored"):
        core.crop(core.Request("x", (1, 2), tuple(range(200))), model.context)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda f: (f / "eval_data" / "a" / "cups.jsonl").unlink(), "CORE task cups has no data"),
        (lambda f: (f / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nsums,33\n"), "cups has no chance"),
        (lambda f: (f / "core.yaml").unlink(), "holds no core.yaml"),
        (lambda f: (f / "eval_data" / "a" / "sums.jsonl").write_text(""), "sums has 0 items"),
    ],
)
def test_what_is_missing_is_named(change: Any, message: str, tmp_path: Path) -> None:
    folder = write_bundle(tmp_path)
    change(tmp_path)
    with pytest.raises(ValueError, match=message):
        core.read_bundle(folder)


def zipped(source: Path) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as packed:
        for file in sorted(source.rglob("*")):
            packed.write(file, Path("eval_bundle") / file.relative_to(source))
    return buffer.getvalue()


@pytest.fixture
def archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small bundle, zipped as the published one, on a server of this machine."""
    (tmp_path / "served").mkdir()
    file = tmp_path / "served" / "eval_bundle.zip"
    file.write_bytes(zipped(Path(write_bundle(tmp_path / "source"))))
    handler = partial(SimpleHTTPRequestHandler, directory=str(file.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv(core_bundle.BUNDLE_VARIABLE, f"http://127.0.0.1:{server.server_port}/eval_bundle.zip")
    yield file
    server.shutdown()
    server.server_close()


def test_the_bundle_is_fetched_once_and_kept(archive: Path, tmp_path: Path) -> None:
    folder = core_bundle.bundle(str(tmp_path / "cache"))
    assert len(core.read_bundle(folder)) == 3
    assert (tmp_path / "cache" / core_bundle.PIN).read_text().strip() == sha256(archive.read_bytes()).hexdigest()
    archive.unlink()
    assert core_bundle.bundle(str(tmp_path / "cache")) == folder == core_bundle.bundle(folder)


def test_the_bundle_is_not_fetched_to_s3(s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"{s3_store} holds no core.yaml"):
        core_bundle.bundle(s3_store)
    assert not list(tmp_path.iterdir())


def test_another_archive_than_the_first_is_refused(archive: Path, tmp_path: Path) -> None:
    folder = core_bundle.bundle(str(tmp_path / "cache"))
    shutil.rmtree(folder)
    (tmp_path / "source" / "eval_data" / "a" / "sums.jsonl").write_text("changed")
    archive.write_bytes(zipped(tmp_path / "source"))
    with pytest.raises(ValueError, match="has changed since it was first fetched"):
        core_bundle.bundle(str(tmp_path / "cache"))
    assert not Path(folder).exists()


@pytest.mark.parametrize("tear", [lambda data: data[:-40], lambda data: data[:100] + b"\xff" * 99 + data[199:]])
def test_a_torn_archive_is_no_changed_one(archive: Path, tmp_path: Path, tear: Callable[[bytes], bytes]) -> None:
    """Nor does it become the one that all later ones are held against."""
    (tmp_path / "cache").mkdir()
    pin, whole = tmp_path / "cache" / core_bundle.PIN, archive.read_bytes()
    archive.write_bytes(tear(whole))
    for pinned in (False, True):
        if pinned:
            pin.write_text(sha256(whole).hexdigest())
        with pytest.raises(ValueError, match="is no whole zip archive .*: its download broke off"):
            core_bundle.bundle(str(tmp_path / "cache"))
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [core_bundle.PIN] * pinned
    archive.write_bytes(whole)
    assert len(core.read_bundle(core_bundle.bundle(str(tmp_path / "cache")))) == 3


def test_a_bundle_that_is_there_has_its_pin(archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as during, pytest.raises(KeyboardInterrupt):
        during.setattr(core_bundle, "unpack", killed)
        core_bundle.bundle(str(tmp_path / "cache"))
    assert (tmp_path / "cache" / core_bundle.PIN).read_text().strip() == sha256(archive.read_bytes()).hexdigest()
    assert len(core.read_bundle(core_bundle.bundle(str(tmp_path / "cache")))) == 3


def test_a_cut_download_goes_on_where_it_broke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = zipped(Path(write_bundle(tmp_path / "source")))
    monkeypatch.setattr(hub, "LONGEST_WAIT", 0.0)
    with LocalHub(files={"eval_bundle.zip": data}, cut_after=len(data) // 2 + 1) as server:
        monkeypatch.setenv(core_bundle.BUNDLE_VARIABLE, f"{server.url}/eval_bundle.zip")
        folder = core_bundle.bundle(str(tmp_path / "cache"))
    assert len(core.read_bundle(folder)) == 3
    assert [r for _, _, r in server.requests][-1] == f"bytes={len(data) // 2 + 1}-"


def test_without_a_network_the_fix_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(core_bundle.BUNDLE_VARIABLE, "http://127.0.0.1:9/eval_bundle.zip")
    with pytest.raises(ValueError, match="can't be fetched from .* unpack eval_bundle.zip by hand"):
        core_bundle.bundle(str(tmp_path / "cache"))
