"""Where text comes from: files, `hf:` datasets, and the documentation and the source code that ship with Python."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

BUILTIN = "builtin:python-docs"
BUILTIN_SOURCE = "builtin:python-source"
PARTS = ("calibration", "held-out")
HELD_OUT_EVERY = 5  # every fifth document of a built-in text is held out
SOURCES = f"a .txt, .jsonl or .parquet file, hf:NAME[:split], {BUILTIN} or {BUILTIN_SOURCE}"


def read_documents(source: str | Path, part: str = "calibration") -> list[str]:
    """Read the documents of `source`, in their own order.

    Args:
        source: a text file (one document), a `.jsonl` file (field `text` of each line), a `.parquet` file (column `text`),
            `hf:NAME[:split]` or `hf:NAME:CONFIG:split` for a dataset of the Hugging Face hub, `builtin:python-docs` (the language
            reference of this Python) or `builtin:python-source` (the top-level modules of its standard library).
        part: `"calibration"` or `"held-out"`: the two disjoint parts of a built-in text. Other sources have one part only.

    Raises:
        ValueError: an unknown source or part, a file without text or without the field `text`.
        FileNotFoundError: no such file.
        ImportError: an optional package is missing; the message says which extra of sparsekern brings it.
    """
    if part not in PARTS:
        raise ValueError(f"part: expected one of {', '.join(PARTS)}, got {part!r}")
    name = str(source)
    if name in BUILTINS:
        documents = _builtin_documents(BUILTINS[name](), part)
    elif name.startswith("builtin:"):
        raise ValueError(f"text: expected one of the built-in texts {', '.join(BUILTINS)}, got {name!r}")
    elif name.startswith("hf:"):
        documents = _hub_documents(name.removeprefix("hf:"))
    else:
        documents = _file_documents(Path(name).expanduser())
    documents = [document for document in documents if document.strip()]
    if not documents:
        raise ValueError(f"text: {name} is empty")
    return documents


def _file_documents(path: Path) -> Iterator[str]:
    if not path.is_file():
        raise FileNotFoundError(f"text: no file {str(path)!r} (expected {SOURCES})")
    if path.suffix in (".jsonl", ".json"):
        return _jsonl_documents(path)
    if path.suffix == ".parquet":
        return _parquet_documents(path)
    return iter([_read_text(path)])


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text: {path} is not UTF-8 text (byte {error.start})") from error


def _jsonl_documents(path: Path) -> Iterator[str]:
    # Not splitlines, which also splits at characters that JSON allows inside a string (U+2028 and such).
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"text: line {number} of {path} is not JSON ({error.msg})") from error
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise ValueError(f"text: line {number} of {path} is not an object with a string field 'text'")
        yield record["text"]


def _parquet_documents(path: Path) -> Iterator[str]:
    parquet = _optional("pyarrow.parquet", "parquet", f"to read {path}")
    try:
        file = parquet.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are subclasses of these
        raise ValueError(f"text: {path} is not a parquet file ({error})") from error
    if "text" not in file.schema_arrow.names:
        raise ValueError(f"text: {path} has no column 'text' (its columns: {', '.join(file.schema_arrow.names)})")
    for batch in file.iter_batches(columns=["text"]):
        yield from (text for text in batch.column(0).to_pylist() if text is not None)


def _hub_documents(name: str) -> Iterator[str]:
    parts = name.split(":")
    if not 1 <= len(parts) <= 3 or not all(parts):
        raise ValueError(f"text: expected hf:NAME, hf:NAME:split or hf:NAME:CONFIG:split, got 'hf:{name}'")
    datasets = _optional("datasets", "datasets", f"to load hf:{name}")
    split = parts[-1] if len(parts) > 1 else "train"
    dataset = datasets.load_dataset(*parts[: max(1, len(parts) - 1)], split=split)
    if "text" not in dataset.column_names:
        raise ValueError(f"text: hf:{name} has no column 'text' (its columns: {', '.join(dataset.column_names)})")
    return (record["text"] for record in dataset)


def _optional(module: str, extra: str, purpose: str):
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = module.partition(".")[0]
        raise ImportError(f"{package} is needed {purpose}: pip install 'sparsekern[{extra}]'") from error


def _python_docs() -> Iterator[str]:
    """The language reference of this Python, a document a topic."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError(f"text: this Python comes without pydoc_data, which {BUILTIN} is read from") from error
    return (topics[name] for name in sorted(topics))


def _python_source() -> Iterator[str]:
    """The top-level modules of the standard library, a document a module; none that says how this Python was built."""
    folder = Path(os.__file__).parent
    paths = [path for path in sorted(folder.glob("*.py")) if not path.name.startswith("_sysconfigdata")]
    if len(paths) < HELD_OUT_EVERY:
        raise ValueError(f"text: this Python comes without the source of its standard library, which {BUILTIN_SOURCE} is read from")
    return (path.read_text(encoding="utf-8") for path in paths)


BUILTINS = {BUILTIN: _python_docs, BUILTIN_SOURCE: _python_source}


def _builtin_documents(texts: Iterable[str], part: str) -> list[str]:
    """The documents of one part of a built-in text.

    They quote one another, so a paragraph counts only where it first occurs: otherwise held-out text would have been seen.
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
