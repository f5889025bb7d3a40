import builtins
import bz2
import codecs
import gzip
import importlib
import json
import lzma
import os

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
    with pytest.raises(ValueError, match="builtin:python-source needs the source of the standard library, which this Python lacks"):
        read_documents(BUILTIN_SOURCE)


def test_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo ä", encoding="utf-8")
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo ä"]


def test_an_entry_of_a_folder_is_a_path(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    with os.scandir(tmp_path) as entries:
        assert [read_documents(entry) for entry in entries] == [["one"]]


def test_a_home_that_is_not_known(tmp_path):
    with pytest.raises(
        ValueError, match="^text: expected a path, got '~nobody-of-this-name/a.txt', whose home folder is not known$"
    ):
        read_documents("~nobody-of-this-name/a.txt")


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
        ("a.jsonl", '{"text": "x"}\n\n{"text": null}', "line 3 of .*a.jsonl is not an object with a string field 'text'"),
        ("a.jsonl", '{"text": ["x"]}', "line 1 of .*a.jsonl is not an object with a string field 'text'"),
        ("a.jsonl", '{"body": "x"}', "line 1 of .*a.jsonl is not an object with a string field 'text'"),
        ("a.jsonl", '{"text": "x"}\n{"text": "a\\ud800b"}', r"line 2 of .*a.jsonl holds a lone surrogate \(U\+D800\)"),
        ("a.jsonl", '{"text": "\\udc00\\ud800"}', r"line 1 of .*a.jsonl holds a lone surrogate \(U\+DC00\)"),
        ("a.json", '[\n{"text": "x"}\n]', r"line 1 of .*a.json is not JSON \(.*\); expected one object a line"),
        ("a.JSONL", "plain", "line 1 of .*a.JSONL is not JSON"),
        ("a.jsonl", "[" * 100_000, "line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", '{"text": "x", "id": ' + "1" * 5000 + "}", "line 1 of .*a.jsonl is not JSON .*digits"),
        ("a.txt", "one\ntwo\0", "a.txt is not text: line 2 holds a NUL character"),
    ],
)
def test_bad_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff\xfe")
    with pytest.raises(ValueError, match=r"a.txt is not UTF-8 text \(byte 2, line 1\)"):
        read_documents(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        (gzip.compress(b"text", mtime=0), "compressed by gzip; unpack it first"),
        (bz2.compress(b"text"), "compressed by bzip2; unpack it first"),
        (lzma.compress(b"text"), "compressed by xz; unpack it first"),
        (b"\x28\xb5\x2f\xfd\x04\x00", "compressed by zstd; unpack it first"),
        (b"PK\x03\x04\x14", "a zip archive; unpack it first"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"PAR1\x15", "a parquet file; its name must end in .parquet"),
        ("text".encode("utf-16"), "UTF-16; convert it to UTF-8"),
        ("text".encode("utf-32"), "UTF-16; convert it to UTF-8"),
        (codecs.BOM_UTF16_BE + "text".encode("utf-16-be"), "UTF-16; convert it to UTF-8"),
    ],
    ids=lambda value: value if isinstance(value, str) else "bytes",  # the same in every process of a run
)
@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a"])
def test_files_that_are_no_text_say_what_they_are(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"text: .*{name} is not UTF-8 text: it is {what}"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be"])
def test_utf16_without_a_mark_is_no_text(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("some text".encode(encoding))
    with pytest.raises(ValueError, match="a.txt is not text: line 1 holds a NUL character; is it a binary file, or UTF-16"):
        read_documents(tmp_path / "a.txt")


def test_latin1_names_the_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "one"}\n{"text": "z\xfcrich"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl is not UTF-8 text \(byte 27, line 2\)"):
        read_documents(tmp_path / "a.jsonl")


def test_a_folder_is_no_text(tmp_path):
    with pytest.raises(ValueError, match=r"text: .* is a folder \(expected a .txt, .jsonl or .parquet file"):
        read_documents(tmp_path)


@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_marks_and_ends_of_lines_are_no_text(tmp_path, mark, newline):
    (tmp_path / "a.txt").write_bytes((mark + newline.join(["one", "", "two ä"])).encode())
    (tmp_path / "a.jsonl").write_bytes((mark + newline.join(['{"text": "one"}', "", '{"text": "two ä"}', ""])).encode())
    assert read_documents(tmp_path / "a.txt") == ["one\n\ntwo ä"]
    assert read_documents(tmp_path / "a.jsonl") == ["one", "two ä"]


def test_a_pair_of_surrogates_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "\\ud83d\\ude00"}')
    assert read_documents(tmp_path / "a.jsonl") == ["\U0001f600"]


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
    with pytest.raises(ValueError, match="needs pydoc_data, which this Python lacks"):
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


def a_source(tmp_path, monkeypatch, kind: str, values: list) -> str:
    """A parquet file or a hub dataset whose column `text` holds the values."""
    if kind == "parquet":
        (tmp_path / "a.parquet").touch()
        monkeypatch.setattr(importlib, "import_module", lambda name: FakeParquet({"text": values}))
        return str(tmp_path / "a.parquet")
    dataset = type("Dataset", (list,), {"column_names": ["text"]})([{"text": value} for value in values])
    fake = type("Datasets", (), {"load_dataset": staticmethod(lambda *name, split: dataset)})
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    return "hf:name"


@pytest.mark.parametrize("kind", ["parquet", "hf"])
def test_a_null_in_a_column_is_no_document(tmp_path, monkeypatch, kind):
    assert read_documents(a_source(tmp_path, monkeypatch, kind, ["one", None, "", "two", None])) == ["one", "two"]
    with pytest.raises(ValueError, match="is empty"):
        read_documents(a_source(tmp_path, monkeypatch, kind, [None, None]))


@pytest.mark.parametrize("kind", ["parquet", "hf"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (["two"], "expected a string in column 'text', got list"),
        (2, "expected a string in column 'text', got int"),
        (float("nan"), "expected a string in column 'text', got float"),
        (b"two", "expected a string in column 'text', got bytes"),
        ({"a": "two"}, "expected a string in column 'text', got dict"),
        ("a\ud800", r"holds a lone surrogate \(U\+D800\)"),
    ],
)
def test_what_is_no_text_in_a_column_names_its_row(tmp_path, monkeypatch, kind, value, message):
    with pytest.raises(ValueError, match=rf"text: row 2 of .*(a.parquet|hf:name):? {message}"):
        read_documents(a_source(tmp_path, monkeypatch, kind, ["one", None, value]))


def test_a_parquet_file_with_damaged_strings(tmp_path, monkeypatch):
    def broken(columns):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")
        yield

    fake = FakeParquet({"text": []})
    fake.iter_batches = broken
    (tmp_path / "a.parquet").touch()
    monkeypatch.setattr(importlib, "import_module", lambda name: fake)
    with pytest.raises(ValueError, match="a.parquet is damaged .*invalid start byte"):
        read_documents(tmp_path / "a.parquet")


@pytest.mark.parametrize("error", [FileNotFoundError("no such dataset"), ConnectionError("offline"), ValueError("unknown split")])
def test_a_dataset_that_cannot_be_loaded_is_named(monkeypatch, error):
    def load_dataset(*name, split):
        raise error

    monkeypatch.setattr(importlib, "import_module", lambda name: type("Datasets", (), {"load_dataset": staticmethod(load_dataset)}))
    with pytest.raises(ValueError, match=rf"text: hf:a:test could not be loaded \({error}\)"):
        read_documents("hf:a:test")
