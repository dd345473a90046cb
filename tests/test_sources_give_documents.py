"""Each source gives parquet files with a text column; what can't is refused at once with the fix."""

import ast

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from storage import embedded, objects, parquet, sources, tokenizer


def texts_of(urls):
    return [text for batch in parquet.documents(urls) for text in parquet.texts(batch)]


def write(path, texts, column="text"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({column: texts, "id": [str(i) for i in range(len(texts))]}), path)


def test_a_folder_gives_its_documents_in_the_order_of_names(tmp_path):
    write(tmp_path / "b" / "001.parquet", ["three"])
    write(tmp_path / "a" / "000.parquet", ["one", "two"])
    source = sources.resolve(str(tmp_path))
    seen = []
    files = source.fetch(str(tmp_path / "unused"), lambda done, total: seen.append((done, total)))
    assert texts_of([f.path for f in files]) == ["one", "two", "three"]
    assert seen[-1][0] == seen[-1][1] == sum(f.bytes for f in files)
    assert [f.sha256 for f in files] == [objects.sha256(f.path) for f in files]
    assert not (tmp_path / "unused").exists()


def test_a_folders_identity_is_its_content_not_its_place(tmp_path):
    for place in ("one/corpus", "two/corpus"):
        write(tmp_path / place / "000.parquet", ["same"])
    write(tmp_path / "three" / "corpus" / "000.parquet", ["other"])
    one, two, three = (sources.resolve(str(tmp_path / p / "corpus")) for p in ("one", "two", "three"))
    assert one.identity == two.identity != three.identity
    assert one.name == two.name != three.name and one.name.startswith("corpus-")


def test_a_folder_on_s3_is_a_source(tmp_path, s3_store):
    write(tmp_path / "000.parquet", ["on s3"])
    objects.publish_file(str(tmp_path / "000.parquet"), f"{s3_store}/corpus/000.parquet")
    source = sources.resolve(f"{s3_store}/corpus/")
    files = source.fetch(f"{s3_store}/unused", lambda *_: None)
    assert [f.path for f in files] == [f"{s3_store}/corpus/000.parquet"]
    assert texts_of([f.path for f in files]) == ["on s3"]
    assert source.identity == sources.resolve(str(tmp_path)).identity


def test_bytes_of_text_come_from_metadata(tmp_path):
    write(tmp_path / "000.parquet", [f"text number {i} " * 50 for i in range(100)])
    total = parquet.total_text_bytes([str(tmp_path / "000.parquet")])
    exact = sum(len(f"text number {i} " * 50) for i in range(100))
    assert exact <= total <= 1.1 * exact


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no .parquet file: name a folder that does"):
        sources.resolve(str(tmp_path))


def test_an_empty_place_on_s3_is_refused(s3_store):
    with pytest.raises(ValueError, match="holds no .parquet file"):
        sources.resolve(f"{s3_store}/nothing-here")


def test_a_file_without_text_is_named_with_its_columns(tmp_path):
    write(tmp_path / "000.parquet", ["x"], column="content")
    with pytest.raises(ValueError, match=r"000.parquet has no column `text` of strings, only content \(string\)"):
        sources.resolve(str(tmp_path))


def test_numbers_are_no_text(tmp_path):
    write(tmp_path / "000.parquet", [1, 2])
    with pytest.raises(ValueError, match=r"only text \(int64\)"):
        sources.resolve(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "values", "said"),
    [
        (["text", "id"], [["x"], [["a", "b"]]], "has a column `id` of list<.*>, not of strings or numbers: drop or"),
        (["text", "url"], [["x"], [{"at": "here"}]], "has a column `url` of struct<at: string>"),
        (["text", "id", "id"], [["x"], ["a"], ["b"]], "has 2 columns `id`: leave one of them"),
        (["text", "text"], [["x"], ["y"]], "has 2 columns `text`"),
    ],
)
def test_a_column_that_names_no_document_is_refused(tmp_path, names, values, said):
    pq.write_table(pa.Table.from_arrays([pa.array(column) for column in values], names), tmp_path / "000.parquet")
    with pytest.raises(ValueError, match=f"000.parquet {said}"):
        sources.resolve(str(tmp_path))


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path / "000.parquet", ["x"] * 100)
    data = (tmp_path / "000.parquet").read_bytes()
    (tmp_path / "000.parquet").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="000.parquet is no whole parquet file"):
        sources.resolve(str(tmp_path))


def test_unknown_names_get_the_nearest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_corpus").mkdir()
    with pytest.raises(ValueError, match="no corpus 'embeded': did you mean embedded"):
        sources.resolve("embeded")
    with pytest.raises(ValueError, match="did you mean my_corpus"):
        sources.resolve("my_corpu")
    with pytest.raises(ValueError, match="no such folder"):
        sources.resolve(str(tmp_path / "absent"))


@pytest.fixture(scope="module")
def embedded_files(tmp_path_factory):
    out = str(tmp_path_factory.mktemp("embedded"))
    return [objects.join(out, f.path) for f in sources.resolve("embedded").fetch(out, lambda *_: None)]


def test_the_embedded_corpus_has_fineweb_edus_columns_and_half_a_million_tokens(embedded_files):
    table = pq.read_table(embedded_files)
    columns = "text, id, dump, url, file_path, language, language_score, token_count, score, int_score"
    assert ", ".join(table.column_names) == columns
    assert 350_000 <= sum(table["token_count"].to_pylist()) <= 800_000
    assert len(set(table["id"].to_pylist())) == len(table) > 400
    first = table.slice(0, 1).to_pylist()[0]
    assert first["token_count"] == len(tokenizer.encode(first["text"]))


def test_the_embedded_corpus_is_prose(embedded_files):
    """Paragraphs of letters and sentences: no doctests, rules, directives or code that parses as such."""
    texts = texts_of(embedded_files)
    whole = "\n\n".join(texts)
    letters = sum(c.isalpha() or c.isspace() for c in whole)
    assert letters > 0.92 * len(whole)
    for mark in (">>>", "====", "****", ".. note", ":func:", "``", "|---"):
        assert mark not in whole
    assert "Assert statements are a convenient way to insert debugging assertions into a program" in whole
    paragraphs = [p for text in texts for p in text.split("\n\n")]
    assert len(set(texts)) == len(texts) and all("\n" not in p for p in paragraphs)


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_each_time(embedded_files):
    assert [d.text for d in embedded.documents()] == texts_of(embedded_files)


def test_docstrings_are_read_without_importing(tmp_path):
    module = tmp_path / "module.py"
    module.write_text(
        '"""Do something that is worth a sentence."""\n'
        "raise SystemExit('imported')\n\n"
        "# A comment block explains why the code below\n# does what it does, over two lines.\n"
        'def f():\n    """Return the thing.\n\n    >>> f()\n    3\n    """\n'
    )
    ast.parse(module.read_text())
    assert embedded._module_prose(module) == [
        "Do something that is worth a sentence.",
        "A comment block explains why the code below does what it does, over two lines.",
    ]


def test_large_documents_are_held_a_few_at_a_time(tmp_path):
    """24 documents of 1 MB and 100 small ones: their batches are bounded by bytes and lose nothing."""
    texts = [f"{n} " * 350_000 for n in range(10, 34)] + [f"small {n}" for n in range(100)]
    pq.write_table(pa.table({"text": texts[:24], "id": list(map(str, range(24)))}), tmp_path / "0.parquet")
    pq.write_table(pa.table({"text": texts[24:], "id": list(map(str, range(24, 124)))}), tmp_path / "1.parquet")
    read = list(parquet.documents([str(tmp_path / "0.parquet"), str(tmp_path / "1.parquet")]))
    assert max(batch.nbytes for batch in read) < 1.1 * parquet.BATCH_TEXT
    batches = list(parquet.text_batches(read, 3 * 2**20))
    assert max(sum(map(len, found)) for found, _ in batches) <= 3 * 2**20
    assert [text.decode() for found, _ in batches for text in found] == texts
    assert [n for _, others in batches for o in others for n in o["id"].to_pylist()] == list(map(str, range(124)))
    alone = list(parquet.text_batches(read, 1000))
    assert [len(found) for found, _ in alone[:24]] == [1] * 24
