"""What does the exported model say of itself? Its card: README.md from the records, with the scores that are there.

The card restates records and is written again when there are new scores, so it is no file of the export's record.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from assets.making import Maker
from evals import harness_tasks, reference, report
from storage import objects, records
from storage.records import Record
from training.config import SUITES, RunConfig, to_dict

FILE = "README.md"
MOST_SCORES = 30  # of a suite; MMLU alone has 57 subjects; the report has all
# what stands first: the means, then what they are of
HEADLINES = (
    "core", "partial_core", "average",
    *(f"{part.task}/{part.metric}" for parts in harness_tasks.SUITES.values() for part in parts),
)  # fmt: skip
RECIPE = (
    "steps", "batch_tokens", "lr", "final_lr_fraction", "warmup_steps", "schedule", "weight_decay", "dtype", "fp8",
)  # fmt: skip
# what only a run by Muon has
MUON = ("optimizer", "embedding_lr", "head_lr", "momentum", "momentum_warmup_steps", "neuron_beta2")


def write_card(maker: Maker, run: str) -> None:
    """Beside the exported weights, in the store and in their local copy."""
    outputs = outputs_of(maker, run)
    text = card(run, maker.run_config(run), with_ancestors(maker, outputs)).encode()
    key = f"runs/{run}/export"
    for folder in {records.folder_url(maker.places.store, key), maker.folder(key)}:
        objects.publish_bytes(objects.join(folder, FILE), text)


def outputs_of(maker: Maker, run: str) -> list[Record]:
    """What is told of a run: its weights, their export, what it writes, every score of just this export, its data."""
    store = maker.places.store
    trained, export = maker.parent(f"runs/{run}", "trained_model"), maker.parent(f"runs/{run}/export", "hf_model")
    keys = [f"runs/{run}/samples", *(f"runs/{run}/scores/{suite}" for suite in SUITES)]
    made_from = {trained.fingerprint, export.fingerprint}
    found = [record for key in keys if (record := records.read_record(store, key))]
    found = [record for record in found if made_from & {parent.fingerprint for parent in record.parents}]
    looked_at = maker.inputs(run).get("inspection")
    inspection = records.read_record(store, looked_at) if looked_at else None
    return [trained, export, *found, *([inspection] if inspection else [])]


def with_ancestors(maker: Maker, outputs: Sequence[Record]) -> list[Record]:
    """Outputs and all that they were made from."""
    found = {record.key: record for record in outputs}
    waiting = [parent.key for record in outputs for parent in record.parents]
    while waiting:
        key = waiting.pop()
        if key not in found:
            record = maker.parent(key, key)
            found[key] = record
            waiting += [parent.key for parent in record.parents]
    return list(found.values())


def card(run: str, config: RunConfig, made: Sequence[Record]) -> str:
    """The card's text; `made` holds the run's outputs and what they were made from."""
    by_asset = {record.asset: record for record in made}
    trained, export = by_asset["trained_model"], by_asset["hf_model"]
    scores = [record for record in made if record.asset in SUITES]
    parts = [
        _front(config.model.family, by_asset.get("starting_weights")),
        f"# {run}\n\n{_summary(config, export)}",
        _usage(),
        _section("Data", _data(config, by_asset)),
        _section("Recipe", _recipe(config, by_asset.get("starting_weights"))),
        _section("Scores", _scores(scores)),
        _section("Against published numbers", _published(scores, report.size_class(to_dict(config.model)))),
        _section("Cost", _cost(made)),
        _section("Made by", _made_by(trained, export)),
    ]
    return "\n".join(part for part in parts if part)


def _front(family: str, start: Record | None) -> str:
    """What the hub reads of a card; of the weights that a run started from, those that are on the hub."""
    lines = ["library_name: transformers", "pipeline_tag: text-generation", "language: en", "tags:", f"- {family}"]
    base = [f"base_model: {start.metrics['source']}"] if start and start.metrics["revision"] else []
    return "\n".join(["---", *lines, *base, "---", ""])


def _section(title: str, content: str) -> str:
    return f"## {title}\n\n{content}\n" if content else ""


def _summary(config: RunConfig, export: Record) -> str:
    model = config.model
    kind = "GPT-2" if model.family == "gpt2" else "`nanochat` model"
    return (
        f"A {kind} of {model.parameters:,} parameters ({model.layers} layers, {model.channels} channels, "
        f"{model.heads} heads, context {model.context}), trained on {config.tokens:,} tokens and exported in "
        f"{export.config['dtype']}. {_logits(export)}\n"
    )


def _logits(export: Record) -> str:
    """How near stock transformers comes to the checkpoint, and what of that is rounding."""
    dtype, found, on = export.config["dtype"], export.metrics, f"on {export.metrics['tokens']:,} held-out tokens."
    if dtype == "fp32":
        return f"Stock transformers gives its checkpoint's logits within {found['max_difference']:.1e} {on}"
    rounded = f"the logits of its checkpoint rounded to {dtype} within {found['max_difference']:.1e}"
    exact = found.get("checkpoint_difference")  # which older records lack
    itself = "" if exact is None else f", and those of the checkpoint itself within {exact:.1e},"
    return f"Stock transformers gives {rounded}{itself} {on}"


def _usage() -> str:
    return (
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        "tokenizer = AutoTokenizer.from_pretrained(FOLDER_OR_NAME)\n"
        "model = AutoModelForCausalLM.from_pretrained(FOLDER_OR_NAME)\n```\n"
    )


def _data(config: RunConfig, by_asset: Mapping[str, Record]) -> str:
    documents, tokens = by_asset["documents"], by_asset["token_shards"]
    bytes_ = documents.metrics.get("text_bytes")
    rows = [("corpus", f"{config.corpus} (`{documents.key}`, fingerprint `{documents.fingerprint[:12]}`)")]
    rows += [("documents", f"{documents.rows:,}, {bytes_:,} bytes of text")] if bytes_ else []
    rows += [("tokens", f"{tokens.tokens:,}, GPT-2's vocabulary (`{tokens.key}`)")]
    return _table(("", ""), rows)


def _recipe(config: RunConfig, start: Record | None) -> str:
    keys = [*RECIPE, *(MUON if config.train.optimizer == "muon" else ())]
    rows = [("recipe", config.recipe)]
    if start:
        commit = f" at `{start.metrics['revision']}`" if start.metrics["revision"] else ""
        rows += [("started from", f"{start.metrics['source']}{commit} (`{start.key}`)")]
    return _table(("setting", "value"), rows + [(key, str(getattr(config.train, key))) for key in keys])


def _scores(scores: Sequence[Record]) -> str:
    rows = [row for record in scores for row in _rows(record.asset, record.metrics)]
    return _table(("suite", "score", "value ± standard error", "items", "protocol"), rows)


def _rows(suite: str, metrics: Mapping[str, Any]) -> list[tuple[str, ...]]:
    scores = metrics["scores"]
    names = sorted(scores, key=lambda name: HEADLINES.index(name) if name in HEADLINES else len(HEADLINES))
    rows: list[tuple[str, ...]] = []
    for name in names[:MOST_SCORES]:
        s = scores[name]
        rows.append((suite, name, f"{s['value']:.4f}{_error(s['stderr'])}", f"{s['n']:,}", metrics["protocol"]))
    if len(names) > MOST_SCORES:
        rows.append((suite, f"… and {len(names) - MOST_SCORES} more in the report", "", "", ""))
    return rows


def _published(scores: Sequence[Record], parameters: int) -> str:
    """Beside the released GPT-2 of this size, where there is one."""
    model = reference.same_size(parameters, "gpt2")
    pages: dict[str, dict[str, Any]] = {record.asset: {"scores": record.metrics["scores"]} for record in scores}
    rows = [
        (c.score, f"{c.value:.4f}", f"{c.against}: {c.reference:.4f}", c.verdict, c.source)
        for c in (reference.against_published(pages, model) if model else [])
    ]
    return _table(("score", "this model", "published", "verdict", "source"), rows)


def _cost(made: Sequence[Record]) -> str:
    """Of the weights and of all that they stand on; the scores are no part of the model."""
    cost = [record.cost for record in made if record.asset not in (*SUITES, "samples")]
    sums = {key: sum(one.get(key) or 0.0 for one in cost) for key in ("seconds", "gpu_hours", "dollars")}
    text = f"{sums['seconds'] / 3600:,.2f} hours"
    text += f", {sums['gpu_hours']:,.2f} GPU hours" if sums["gpu_hours"] else ""
    return text + (f", ${sums['dollars']:,.2f}" if sums["dollars"] else "")


def _made_by(trained: Record, export: Record) -> str:
    dirty = " with local changes" if trained.dirty else ""
    rows = [("commit", f"`{trained.commit}`{dirty}" if trained.commit else "not in a git checkout")]
    rows += [("trained", f"{trained.started} to {trained.ended}"), ("weights", f"`{trained.fingerprint}`")]
    rows += [("export", f"`{export.fingerprint}`")]
    rows += [("hardware", ", ".join(trained.hardware.get("gpus") or []) or f"{trained.hardware.get('cores')} cores")]
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in trained.versions.items()))]
    return _table(("", ""), rows)


def _error(stderr: float | None) -> str:
    return "" if stderr is None else f" ± {stderr:.4f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) if rows else ""
