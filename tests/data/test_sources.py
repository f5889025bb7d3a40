import builtins
import importlib
import json

import pytest

from sparsekern.data import read_documents
from sparsekern.data.sources import BUILTIN, BUILTIN_SOURCE


def paragraphs(documents: list[str]) -> set[str]:
    return {paragraph for document in documents for paragraph in document.split("\n\n")}


@pytest.mark.parametrize("source", [BUILTIN, BUILTIN_SOURCE])
def test_builtin_parts_share_no_paragraph(source):
    calibration, held_out = read_documents(source), read_documents(source, "held-out")
    assert len(calibration) > len(held_out) > 5
    assert sum(map(len, calibration)) > 100_000
    assert not paragraphs(calibration) & paragraphs(held_out)
    assert read_documents(source) == calibration


def test_builtin_source_is_the_code_of_this_python():
    code = "\n\n".join(read_documents(BUILTIN_SOURCE))
    assert "class JSONDecoder" not in code  # of a package, not a top-level module
    assert "import " in code and "    def " in code


def test_a_python_without_source_is_told(monkeypatch, tmp_path):
    monkeypatch.setattr("os.__file__", str(tmp_path / "os.pyc"))
    with pytest.raises(ValueError, match="without the source of its standard library, which builtin:python-source is read from"):
        read_documents(BUILTIN_SOURCE)


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo ä", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo ä"]


def test_jsonl_file_is_a_document_a_line(tmp_path):
    lines = [json.dumps({"text": "one\nline"}), "", json.dumps({"text": "two", "id": 1}), json.dumps({"text": "  "})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert read_documents(tmp_path / "a.jsonl") == ["one\nline", "two"]


def test_only_a_newline_ends_a_line_of_jsonl(tmp_path):
    text = "one\u2028line\x85still the same"
    (tmp_path / "a.jsonl").write_text(f'{{"text": "{text}"}}\r\n{{"text": "two"}}\n', encoding="utf-8", newline="")
    assert read_documents(tmp_path / "a.jsonl") == [text, "two"]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", "", "a.txt is empty"),
        ("a.txt", " \n ", "a.txt is empty"),
        ("a.jsonl", "", "a.jsonl is empty"),
        ("a.jsonl", '{"text": "x"}\n{"text": 3}', "line 2 of .*a.jsonl is not an object with a string field 'text'"),
        ("a.jsonl", '["x"]', "line 1 of .*a.jsonl is not an object with a string field 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text', "line 2 of .*a.jsonl is not JSON"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(byte 2\)"):
        read_documents(tmp_path / "a.txt")


def test_missing_file_says_what_is_possible(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"text: no file .*nothing.txt.* \(expected a .txt, .jsonl or .parquet file"):
        read_documents(tmp_path / "nothing.txt")


@pytest.mark.parametrize(
    "source, part, message",
    [
        ("builtin:wikitext", "calibration", "built-in texts builtin:python-docs, builtin:python-source, got 'builtin:wikitext'"),
        (BUILTIN, "test", "part: expected one of calibration, held-out, got 'test'"),
        ("hf:", "calibration", "expected hf:NAME, hf:NAME:split or hf:NAME:CONFIG:split, got 'hf:'"),
        ("hf:a:b:c:d", "calibration", "expected hf:NAME, hf:NAME:split or hf:NAME:CONFIG:split"),
    ],
)
def test_unknown_sources_are_refused(source, part, message):
    with pytest.raises(ValueError, match=message):
        read_documents(source, part)


@pytest.mark.parametrize("source, package, extra", [("a.parquet", "pyarrow", "parquet"), ("hf:name", "datasets", "datasets")])
def test_missing_package_names_the_extra(tmp_path, monkeypatch, source, package, extra):
    def absent(name, *rest):
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    if source.endswith(".parquet"):
        source = tmp_path / source
        source.touch()
    with pytest.raises(ImportError, match=rf"{package} is needed .*: pip install 'sparsekern\[{extra}\]'"):
        read_documents(source)


def test_python_without_pydoc_data(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("pydoc_data"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match="this Python comes without pydoc_data"):
        read_documents(BUILTIN)


class FakeParquet:
    """What of pyarrow.parquet is used, over columns in memory; the real package is not needed to test our side of it."""

    def __init__(self, columns: dict):
        self.columns = columns

    def ParquetFile(self, path):  # noqa: N802 (pyarrow's name)
        self.schema_arrow = type("Schema", (), {"names": list(self.columns)})
        return self

    def iter_batches(self, columns):
        values = self.columns[columns[0]]
        column = type("Column", (), {"to_pylist": lambda self: values})()
        yield type("Batch", (), {"column": lambda self, index: column})()


def test_parquet_reads_the_text_column(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeParquet({"text": ["one", None, "two"]}))
    assert read_documents(tmp_path / "a.parquet") == ["one", "two"]
    monkeypatch.setattr(importlib, "import_module", lambda name: FakeParquet({"body": ["one"], "id": [1]}))
    with pytest.raises(ValueError, match=r"a.parquet has no column 'text' \(its columns: body, id\)"):
        read_documents(tmp_path / "a.parquet")


def test_a_file_that_is_no_parquet_file(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("nope")

    class Refusing:
        @staticmethod
        def ParquetFile(path):  # noqa: N802
            raise ValueError("magic bytes not found")

    monkeypatch.setattr(importlib, "import_module", lambda name: Refusing)
    with pytest.raises(ValueError, match=r"text: .*a.parquet is not a parquet file \(magic bytes not found\)"):
        read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "source, asked", [("hf:n/a", (("n/a",), "train")), ("hf:n/a:test", (("n/a",), "test")), ("hf:a:c:test", (("a", "c"), "test"))]
)
def test_hub_datasets_are_asked_for_by_name_config_and_split(monkeypatch, source, asked):
    calls = []

    class Dataset(list):
        column_names = ["text"]

    class Datasets:
        @staticmethod
        def load_dataset(*name, split):
            calls.append((name, split))
            return Dataset([{"text": "one"}])

    monkeypatch.setattr(importlib, "import_module", lambda name: Datasets)
    assert read_documents(source) == ["one"]
    assert calls == [asked]
    Dataset.column_names = ["body"]
    with pytest.raises(ValueError, match=r"has no column 'text' \(its columns: body\)"):
        read_documents(source)
