"""Sources of text: files, `hf:` datasets, and the documentation and source code of Python itself."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

BUILTIN = "builtin:python-docs"
BUILTIN_SOURCE = "builtin:python-source"
OWN = "self:"  # begins the name of what the model writes itself
UNITS = {"": 1, "k": 1000, "M": 1_000_000}
PARTS = ("calibration", "held-out")
HELD_OUT_EVERY = 5  # every fifth document of a built-in text is held out
SOURCES = f"a .txt, .jsonl or .parquet file, hf:NAME[:split], {BUILTIN} or {BUILTIN_SOURCE}"
LONE_SURROGATE = re.compile("[\ud800-\udfff]")
SIGNATURES = {  # first bytes of files that are mistaken for text
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"BZh": "compressed by bzip2; unpack it first",
    b"\xfd7zXZ": "compressed by xz; unpack it first",
    b"\x28\xb5\x2f\xfd": "compressed by zstd; unpack it first",
    b"PK\x03\x04": "a zip archive; unpack it first",
    b"%PDF-": "a PDF document",
    b"PAR1": "a parquet file; its name must end in .parquet",
    b"\xff\xfe": "UTF-16; convert it to UTF-8",
    b"\xfe\xff": "UTF-16; convert it to UTF-8",
}


def read_documents(source: str | os.PathLike, part: str = "calibration") -> list[str]:
    """Read the documents of `source` in order.

    Documents of white space only and nulls in a column are skipped.

    Args:
        source: a text file (one document), a `.jsonl` file (field `text` of each line), a `.parquet` file (column `text`),
            `hf:NAME[:split]` or `hf:NAME:CONFIG:split` for a dataset of the Hugging Face hub, `builtin:python-docs` (the language
            reference of this Python) or `builtin:python-source` (the top-level modules of its standard library). Files are UTF-8, with
            or without a byte order mark. Lines end in LF or CRLF.
        part: part of a built-in text, `"calibration"` or `"held-out"`. The two are disjoint. Other sources have one part.

    Raises:
        ValueError: the source or part is unknown, a file is empty or not UTF-8 text, the `text` of a line or row is not a string or
            holds a lone surrogate, or a dataset cannot be loaded. The message names the file and the line, byte or row.
        FileNotFoundError: the file does not exist.
        ImportError: an optional package is missing. The message names the extra of sparsekern that installs it.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    check_source(source)
    name = os.fsdecode(source)
    if is_own(name):
        raise ValueError(f"text: expected {SOURCES}; {name} is for calibration alone, since a model writes it")
    documents: Iterable[str]
    if name in BUILTINS:
        documents = _builtin_documents(BUILTINS[name](), part)
    elif name.startswith("hf:"):
        documents = _hub_documents(name.removeprefix("hf:"))
    else:
        documents = _file_documents(_path(name))
    held = [document for document in documents if document.strip()]
    if not held:
        raise ValueError(f"text: {name} is empty")
    return held


def check_source(source: str | os.PathLike) -> None:
    """Raise what `read_documents` raises for an unknown built-in text, and for a file that is not there, without reading anything."""
    name = os.fsdecode(source)
    if is_own(name):
        own_tokens(name)
    if is_own(name) or name in BUILTINS or name.startswith("hf:"):
        return
    if name.startswith("builtin:"):
        raise ValueError(f"text: expected one of the built-in texts {', '.join(BUILTINS)}, got {name!r}")
    path = _path(name)
    if path.is_dir():
        raise ValueError(f"text: {path} is a folder (expected {SOURCES})")
    if not path.is_file():
        raise FileNotFoundError(f"text: no file {str(path)!r} (expected {SOURCES})")


def is_own(source: object) -> bool:
    """Return whether a calibration source asks for the model's own samples."""
    return isinstance(source, str) and source.startswith(OWN)


def own_tokens(source: str) -> int:
    """Return the number of tokens that a source such as `"self:200k"` asks for.

    Raises:
        ValueError: it is no such source.
    """
    found = re.fullmatch(r"self:([1-9]\d*)([kM]?)", source)
    if found is None:
        raise ValueError(f"calibration: expected a number of tokens such as 'self:200k' or 'self:2M', got {source!r}")
    return int(found[1]) * UNITS[found[2]]


def _path(name: str) -> Path:
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise ValueError(f"text: expected a path, got {name!r}, whose home folder is not known") from error


def _file_documents(path: Path) -> Iterator[str]:
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".json"):
        return _jsonl_documents(path)
    if suffix == ".parquet":
        return _parquet_documents(path)
    return iter([_read_text(path)])


def _read_text(path: Path) -> str:
    """Return the text of a file with lines that end in LF."""
    content = path.read_bytes()
    for signature, what in SIGNATURES.items():
        if content.startswith(signature):
            raise ValueError(f"text: {path} is not UTF-8 text: it is {what}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 text (byte {error.start}, line {_line_of(content, error.start)})") from error
    if (place := text.find("\0")) >= 0:
        line = text.count("\n", 0, place) + 1
        raise ValueError(f"text: {path} is not text: line {line} holds a NUL character; is it a binary file, or UTF-16?")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _line_of(content: bytes, place: int) -> int:
    return content.count(b"\n", 0, place) + 1


def _jsonl_documents(path: Path) -> Iterator[str]:
    # Not splitlines, which also splits at characters that JSON allows inside a string (U+2028 and such).
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where = f"line {number} of {path}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise ValueError(f"text: {where} is not JSON ({reason}); expected one object a line") from error
        if not isinstance(record, dict) or "text" not in record:
            raise ValueError(f"text: {where} is not an object with a string field 'text'")
        yield _checked_text(record["text"], f"{where} is not an object with a string field 'text'", where)


def _parquet_documents(path: Path) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", "parquet", f"to read {path}")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise ValueError(f"text: {path} is not a parquet file ({error})") from error
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"text: {path} has no column 'text' (its columns: {', '.join(file.schema_arrow.names)})")
    return _column(_parquet_values(file, path), str(path))


def _parquet_values(file: Any, path: Path) -> Iterator[object]:
    try:
        for batch in file.iter_batches(columns=["text"]):
            yield from batch.column(0).to_pylist()
    except (OSError, ValueError) as error:  # UnicodeDecodeError, of a string that is not UTF-8, is a ValueError
        raise ValueError(f"text: {path} is damaged ({error})") from error


def _hub_documents(name: str) -> Iterator[str]:
    parts = name.split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"text: expected hf:NAME, hf:NAME:split or hf:NAME:CONFIG:split, got 'hf:{name}'")
    datasets = _optional("datasets", "datasets", f"to load hf:{name}")
    split = parts[-1] if len(parts) > 1 else "train"
    try:
        dataset = datasets.load_dataset(*parts[: max(1, len(parts) - 1)], split=split)
    except (OSError, ValueError) as error:  # no connection, no such dataset, configuration or split
        raise ValueError(f"text: hf:{name} could not be loaded ({error})") from error
    if "text" not in dataset.column_names:
        raise ValueError(f"text: hf:{name} has no column 'text' (its columns: {', '.join(dataset.column_names)})")
    return _column((record["text"] for record in dataset), f"hf:{name}")


def _column(values: Iterable[object], source: str) -> Iterator[str]:
    """Yield the strings of a column. A null is a missing value and is skipped."""
    for row, value in enumerate(values):
        if value is not None:
            where = f"row {row} of {source}"
            yield _checked_text(value, f"{where}: expected a string in column 'text', got {type(value).__name__}", where)


def _checked_text(value: object, otherwise: str, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"text: {otherwise}")
    if found := LONE_SURROGATE.search(value):
        raise ValueError(f"text: {where} holds a lone surrogate (U+{ord(found[0]):04X}), which no tokenizer takes")
    return value


def _optional(module: str, extra: str, purpose: str) -> Any:
    """Import a module of an optional package, whose types are unknown."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed {purpose}: pip install 'sparsekern[{extra}]'") from error


def _python_docs() -> Iterator[str]:
    """Return the language reference of this Python, one document for each topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"text: {BUILTIN} needs pydoc_data, which this Python lacks") from error
    return (topics[name] for name in sorted(topics))


def _python_source() -> Iterator[str]:
    """Return the top-level modules of the standard library, one document for each.

    Modules that describe this Python's build are skipped, so that every machine reads the same text.
    """
    folder = Path(os.__file__).parent
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_sysconfigdata")]
    if len(paths) < HELD_OUT_EVERY:
        raise ValueError(f"text: {BUILTIN_SOURCE} needs the source of the standard library, which this Python lacks")
    return (path.read_text(encoding="utf-8") for path in paths)


BUILTINS = {BUILTIN: _python_docs, BUILTIN_SOURCE: _python_source}


def _builtin_documents(texts: Iterable[str], part: str) -> list[str]:
    """Return the documents of one part of a built-in text.

    The documents quote one another. Only the first occurrence of a paragraph is kept, so that no held-out text is seen in calibration.
    """
    seen: set[str] = set()
    documents = []
    for text in texts:
        paragraphs = [p for p in text.split("\n\n") if p.strip() and p not in seen]
        seen.update(paragraphs)
        if paragraphs:
            documents.append("\n\n".join(paragraphs))
    if part == "held-out":
        return documents[::HELD_OUT_EVERY]
    return [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY]
