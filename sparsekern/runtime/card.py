"""Model cards, which tell how a model was pruned, how to load it, and what was measured."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata

import torch

from .._version import __version__
from ..models.source import source_of
from ..models.units import recorded_units
from .card_data import add_evaluations, front_matter
from .formats import INT8
from .packed_weight import PackedWeight

CAUSAL = "AutoModelForCausalLM"
DENSE = """The zeros are stored like any other weight, so every loader takes this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

PACKED = """The zeros take no space: the linear layers are packed, and multiply without unpacking. Import sparsekern before loading the folder.
Otherwise transformers fills the model with random numbers, after a warning:

```python
import sparsekern
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

`model.dequantize()` turns it into an ordinary dense model.
"""

EIGHT_BITS = "The head is rounded to 8 bits, with a scale for each row. Embeddings that are tied to it share its values.\n"

CUT = """Attention heads and neurons were removed. `sparsekern_units` in `config.json` lists the remaining ones of each layer. sparsekern
builds a plain transformers module with these sizes:

```python
import sparsekern

model = sparsekern.load("path/to/this/folder")
```

After `import sparsekern`, the `from_pretrained` of transformers loads this folder too. Without it, the sizes do not fit.
"""

CUT_AND_PACKED = "The remaining zeros take no space: the linear layers are packed. `sparsekern.unpack(model)` makes them dense.\n"


def loader_of(model: torch.nn.Module) -> str:
    """Return the name of the class of transformers that loads a saved model."""
    import transformers

    name = type(model).__name__
    causal = name.endswith(("ForCausalLM", "LMHeadModel")) or getattr(transformers, name, None) is not type(model)
    return CAUSAL if causal else name


def versions() -> dict[str, str]:
    """Return the versions of this package and of the packages that results depend on."""
    return {
        "sparsekern": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "python": platform.python_version(),
    }


def model_card(
    model: torch.nn.Module,
    *,
    packed: bool = False,
    command: str | None = None,
    results: Mapping[str, object] | None = None,
    settings: Mapping[str, object] | None = None,
) -> str:
    """Return Markdown with the front matter of the Hugging Face hub: base model, its license, tags and evaluation results.

    Markup in names, texts and the command is escaped.

    Args:
        model: the pruned model.
        packed: whether the model is saved packed.
        command: the command line that made the model.
        results: numbers and texts by name.
        settings: numbers and texts by name.
    """
    cut, loader = recorded_units(getattr(model, "config", None)) is not None, loader_of(model)
    data = front_matter(
        model,
        pipeline=None if cut or loader != CAUSAL else "text-generation",
        sparse=not cut,
        results=results or {},
        settings=settings or {},
    )
    parts = [
        f"---\n{data}\n---\n",
        f"# {type(model).__name__}, pruned with sparsekern\n",
        _how_to_load(cut, packed).replace(CAUSAL, loader),
    ]
    if packed and any(isinstance(module, PackedWeight) and module.format == INT8 for module in model.modules()):
        parts.append(EIGHT_BITS)
    source = source_of(model)
    if source is not None and source.tensors:
        first = _cell(source.tensors[0])
        parts.append(
            f"{len(source.tensors)} tensors of the original checkpoint are not part of a {type(model).__name__}, {first} among them. "
            "They are unchanged.\n"
        )
    if command:
        fence = _fence(command)
        parts.append(f"Made with:\n\n{fence}\n{command}\n{fence}\n")
    for title, rows in (("Results", results), ("Settings", settings), ("Versions", versions())):
        if rows:
            parts.append(f"## {title}\n\n{_table(rows)}\n")
    return "\n".join(parts)


def with_results(card: str, results: Mapping[str, object]) -> str:
    """Return the text of a model card with further results: in its table, and as evaluation results of the hub.

    Args:
        card: the text of a card that `model_card` made.
        results: numbers and texts by name. One that the table has already is replaced.

    Raises:
        ValueError: the front matter is not that of a card.
    """
    begin, end = _section(card)
    names = {f"| {_cell(name)} |" for name in results}
    kept = [row for row in card[begin:end].splitlines() if row.startswith("| ") and row != "| | |"]
    rows = [row for row in kept if not any(row.startswith(name) for name in names)]
    table = "\n".join([_table({}), *rows, *_rows(results)])
    return add_evaluations(f"{card[:begin]}## Results\n\n{table}\n\n{card[end:]}".rstrip("\n") + "\n", results)


def _section(card: str) -> tuple[int, int]:
    """Return where the results begin in a card and where they end. One without any has their place in front of the settings."""
    if found := re.search(r"^## Results\n.*?(?=^## |\Z)", card, re.DOTALL | re.MULTILINE):
        return found.span()
    settings = re.search(r"^## (Settings|Versions)\n", card, re.MULTILINE)
    place = settings.start() if settings else len(card)
    return place, place


def _how_to_load(cut: bool, packed: bool) -> str:
    if cut:
        return f"{CUT}\n{CUT_AND_PACKED}" if packed else CUT
    return PACKED if packed else DENSE


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *_rows(rows)])


def _rows(rows: Mapping[str, object]) -> list[str]:
    return [f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items()]


def _cell(value: object) -> str:
    """Return a number or a text on one line, with markup escaped."""
    if isinstance(value, float):
        return f"{value:.4g}"
    line = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def _fence(text: str) -> str:
    """Return a fence of backticks that is longer than any in `text`."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
