"""What does Dagster show of an output? The same facts for every asset, and what is in it: columns, shapes, scores."""

import base64
import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import dagster as dg

from assets.making import Made
from storage import objects, parquet
from storage.records import File

COLUMNS = "dagster/column_schema"  # Dagster shows what is under this name as the asset's columns
MOST_FILES = 50  # that a table lists


def materialize(
    made: Made, checks: Sequence[dg.AssetCheckResult] = (), metadata: dict[str, Any] | None = None
) -> dg.MaterializeResult:
    """What Dagster shows of an output: the same facts for every asset, and its own beside them."""
    return dg.MaterializeResult(
        metadata=(metadata or {}) | describe(made),
        data_version=dg.DataVersion(made.record.fingerprint[:16]),
        check_results=list(checks),
    )


def describe(made: Made) -> dict[str, Any]:
    record = made.record
    facts: dict[str, Any] = {
        "location": dg.MetadataValue.path(made.location)
        if objects.is_local(made.location)
        else dg.MetadataValue.url(made.location),
        "reused": made.reused,
        "reason": made.reason,
        "files": len(record.files),
        "bytes": record.bytes,
        "files_listed": files(record.files),
        "seconds": record.cost["seconds"],
        "gpu_hours": record.cost["gpu_hours"],
        "dollars": record.cost["dollars"],
        "fingerprint": record.fingerprint,
        "commit": record.commit or "not in a git checkout",
        "parents": dg.MetadataValue.md(
            "\n".join(f"- `{p.key}` ({p.fingerprint[:8]})" for p in record.parents) or "none"
        ),
        "config": dg.MetadataValue.json(record.config),
    }
    counts = {"rows": record.rows, "tokens": record.tokens}
    return facts | {name: value for name, value in counts.items() if value is not None}


def parquet_columns(url: str) -> dict[str, Any]:
    """Columns of a parquet file, and their types."""
    schema = parquet.read_metadata(url).schema.to_arrow_schema()
    return _columns((name, str(kind)) for name, kind in zip(schema.names, schema.types, strict=True))


def json_columns(url: str) -> dict[str, Any]:
    """Keys of the first line of a jsonl file, and the types of their values."""
    with objects.open_file(url) as file:
        first = json.loads(file.readline())
    return _columns((name, type(value).__name__) for name, value in first.items())


def tensors(url: str) -> dict[str, Any]:
    """Names, types and shapes in a safetensors file; of its layers, which are alike, the first."""
    with objects.open_file(url) as file:
        (length,) = struct.unpack("<Q", file.read(8))  # https://github.com/huggingface/safetensors#format
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    first = {name: tensor for name, tensor in header.items() if not _is_later_layer(name)}
    return _columns((name, f"{tensor['dtype']} {tensor['shape']}") for name, tensor in sorted(first.items()))


def _is_later_layer(name: str) -> bool:
    return any(word.isdigit() and word != "0" for word in name.split("."))


def _columns(found: Iterable[tuple[str, str]]) -> dict[str, Any]:
    return {COLUMNS: dg.TableSchema([dg.TableColumn(name, kind) for name, kind in found])}


def files(listed: Sequence[File]) -> dg.TableMetadataValue:
    """An output's files, the first of them where they are many."""
    return dg.MetadataValue.table(
        [dg.TableRecord({"path": f.path, "bytes": f.bytes, "sha256": f.sha256[:12]}) for f in listed[:MOST_FILES]],
        dg.TableSchema([dg.TableColumn("path"), dg.TableColumn("bytes", "int"), dg.TableColumn("sha256")]),
    )


def scores(found: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """A table of scores with their standard errors, and each value by its name, which Dagster plots over time."""
    rows = [
        dg.TableRecord({"score": name, "value": s["value"], "stderr": s["stderr"], "items": s["n"]})
        for name, s in found.items()
    ]
    numbers = [dg.TableColumn(name, "float") for name in ("value", "stderr")]
    schema = dg.TableSchema([dg.TableColumn("score"), *numbers, dg.TableColumn("items", "int")])
    table = {"scores": dg.MetadataValue.table(rows, schema)}
    return table | {name: score["value"] for name, score in found.items()}


def image(name: str, png: bytes) -> dg.MarkdownMetadataValue:
    """A picture that an asset's page shows, embedded."""
    return dg.MetadataValue.md(f"![{name}](data:image/png;base64,{base64.b64encode(png).decode()})")
