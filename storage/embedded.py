"""Which real English text does every Python carry, and how does it become documents?

The language reference (`pydoc_data.topics`) and the prose of the standard library: its docstrings, read with
`ast` and never imported, and the block comments that explain its code. Markup, code, grammars and tables are
dropped and lines are joined into paragraphs, so that what remains reads as prose. The Python version is the
revision: the same version gives the same documents, in the same order, on every machine.
"""

import ast
import platform
import random
import re
import sysconfig
import tokenize
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from storage import tokenizer

EDITION = 1  # of the cleaning below: raise it when the documents change
ORDER_SEED = 1337  # documents are shuffled, so that the first shard is a fair sample of the whole
LEFT_OUT = {  # tests, other people's packages, and what Debian's Python leaves to packages of its own
    *("test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "ensurepip", "tkinter"),
    *("turtledemo", "distutils", "pydoc_data", "__pycache__", "msilib", "venv"),
}
SHORTEST, LONGEST = 60, 800  # words a document: below, a unit joins its neighbours; above, it is split

SCHEMA = pa.schema(  # FineWeb-Edu's columns, in its order
    [("text", pa.string()), ("id", pa.string()), ("dump", pa.string()), ("url", pa.string())]
    + [("file_path", pa.string()), ("language", pa.string()), ("language_score", pa.float64())]
    + [("token_count", pa.int64()), ("score", pa.float64()), ("int_score", pa.int64())]
)


@dataclass(frozen=True)
class Document:
    text: str
    url: str  # "python:library/asyncio/tasks", with "#2" for the second document of a module
    file_path: str


def revision() -> str:
    return platform.python_version()


def write_parquet(path: str) -> None:
    """All documents as one parquet file in FineWeb-Edu's schema."""
    rows = [_row(document) for document in documents()]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), path, compression="zstd", row_group_size=1000)


def _row(document: Document) -> dict[str, object]:
    name = f"{document.url}@{revision()}"
    return {
        "text": document.text,
        "id": f"<urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, name)}>",
        "dump": f"python-{revision()}",
        "url": document.url,
        "file_path": document.file_path,
        "language": "en",
        "language_score": 1.0,
        "token_count": len(tokenizer.encode(document.text)),
        "score": 3.0,  # no quality classifier is run: a constant, as the two below it
        "int_score": 3,
    }


def documents() -> list[Document]:
    found = [*_topics(), *_library()]
    seen: set[str] = set()
    unique = [d for d in found if not (d.text in seen or seen.add(d.text))]  # type: ignore[func-returns-value]
    random.Random(ORDER_SEED).shuffle(unique)
    return unique


def _topics() -> Iterator[Document]:
    from pydoc_data import topics

    for name in sorted(topics.topics):
        yield from _split(paragraphs(topics.topics[name]), f"python:reference/{name}", "pydoc_data/topics.py")


def _library() -> Iterator[Document]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if not LEFT_OUT & set(relative.parts) and not relative.parts[0].startswith("config-"):
            yield from _split(_module_prose(path), f"python:library/{relative.with_suffix('')}", str(relative))


def _module_prose(path: Path) -> list[str]:
    """Paragraphs of a module in the order of its lines; none where the file is no Python of this version."""
    source = path.read_bytes()
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and the tests of the parser lie in the library too
        return []
    units = [*_docstrings(tree), *_comments(path)]
    return list(dict.fromkeys(p for _, text in sorted(units) for p in paragraphs(text)))


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield node.body[0].lineno, text


def _comments(path: Path) -> Iterator[tuple[int, str]]:
    """Blocks of neighbouring comment lines; a line of its own only where it is a sentence."""
    block: list[tuple[int, str]] = []
    with tokenize.open(path) as f:
        lines = [line.strip() for line in f]
    for number, line in enumerate([*lines, ""], start=1):
        if line.startswith("#"):
            block.append((number, line.lstrip("#").removeprefix(" ")))
            continue
        if len(block) >= 2 or (block and len(block[0][1].split()) >= 8):
            yield block[0][0], "\n".join(text for _, text in block)
        block = []


BULLET = re.compile(r"^\s*(?:[*+-]|\d+[.)])\s+")
CODE = re.compile(r"^\s*(?:>>>|\.\.\. |\.\. |:\w+|@\w+|import |from \w+ import|def |class |\$ |\|)")
RULE = re.compile(r"^\s*[*=\-~^#_+|.:\s]{3,}$")
ROLE = re.compile(r":[\w:]+:`([^`]+)`")
SENTENCE = re.compile(r"[.!?:;)\"']$")


def paragraphs(text: str) -> list[str]:
    """The prose of a docstring, a comment or a page: its paragraphs, lines joined and markup removed."""
    blocks = re.split(r"\n\s*\n", text.expandtabs())
    cleaned = [_paragraph(b.split("\n")) for b in blocks if not _is_code(b)]
    return [p for p in cleaned if _is_prose(p)]


def _is_code(block: str) -> bool:
    lines = [line for line in block.split("\n") if line.strip()]
    indented = all(line.startswith("   ") for line in lines) and not BULLET.match(lines[0] if lines else "")
    return indented or any(CODE.match(line) for line in lines)


def _paragraph(lines: list[str]) -> str:
    kept = [line for line in lines if line.strip() and not RULE.match(line)]
    joined = " ".join(BULLET.sub("", line).strip() for line in kept)
    joined = ROLE.sub(r"\1", joined).replace("``", '"').replace("`", '"').replace("**", "")
    joined = re.sub(r'[“”"]+', '"', re.sub(r"\s+", " ", joined))
    return re.sub(r"(?<=\w)::$", ":", joined).strip()


def _is_prose(paragraph: str) -> bool:
    """Sentences, not tables, signatures or lists of names: enough words, mostly letters, a sentence's end."""
    words = paragraph.split()
    plain = sum(w.strip(".,;:()\"'?!").isalpha() for w in words)
    odd = sum(not (c.isalpha() or c.isspace() or c in ".,;:'\"()-?!") for c in paragraph)
    ended = bool(SENTENCE.search(paragraph))
    return len(words) >= 5 and ended and plain >= 0.6 * len(words) and odd <= 0.1 * len(paragraph)


def _split(prose: list[str], url: str, file_path: str) -> Iterator[Document]:
    """Documents of at most LONGEST words, cut between paragraphs; what is too short is dropped."""
    parts: list[list[str]] = [[]]
    words = 0
    for paragraph in prose:
        if words > LONGEST:
            parts, words = [*parts, []], 0
        parts[-1].append(paragraph)
        words += len(paragraph.split())
    for number, part in enumerate(parts, start=1):
        text = "\n\n".join(part)
        if len(text.split()) >= SHORTEST:
            yield Document(text, url if number == 1 else f"{url}#{number}", file_path)
