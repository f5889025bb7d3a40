"""The model card: how the model was pruned, how to load it, and what was measured."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping
from importlib import metadata

import torch

from .._version import __version__
from ..models.units import recorded_units

DENSE = """The zeros are stored like any other weight, so every loader takes this folder:

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```
"""

PACKED = """The zeros take no space: the linear layers are packed, and multiply as they are. Importing sparsekern makes transformers able to
load them (without it, transformers fills the model with random numbers, and says so in a warning):

```python
import sparsekern
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
```

`model.dequantize()` makes an ordinary dense model of it.
"""

CUT = """Attention heads and neurons were removed. `sparsekern_units` in `config.json` lists how many each layer has left. sparsekern builds
the model with these sizes, a plain transformers module:

```python
import sparsekern

model = sparsekern.load("path/to/this/folder")
```

Once sparsekern is imported, the `from_pretrained` of transformers loads this folder too. Without it, the sizes do not fit.
"""

CUT_AND_PACKED = (
    "The zeros of what is left take no space: the linear layers are packed; `sparsekern.unpack(model)` makes them dense.\n"
)


def versions() -> dict[str, str]:
    """Return the versions of this package and of those that a result depends on."""
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
    """Return Markdown with the front matter that the Hugging Face hub reads.

    Names, texts and the command may hold anything: what Markdown would read as markup is escaped.

    Args:
        model: the pruned model.
        packed: whether it is saved packed.
        command: the command line that made it.
        results: name -> number or text.
        settings: name -> number or text.
    """
    cut = recorded_units(getattr(model, "config", None)) is not None
    task = "" if cut else "pipeline_tag: text-generation\n"
    parts = [
        f"---\nlibrary_name: transformers\n{task}tags:\n- sparsekern\n- pruned\n---\n",
        f"# {type(model).__name__}, pruned with sparsekern\n",
        _how_to_load(cut, packed),
    ]
    if command:
        fence = _fence(command)
        parts.append(f"Made with:\n\n{fence}\n{command}\n{fence}\n")
    for title, rows in (("Results", results), ("Settings", settings), ("Versions", versions())):
        if rows:
            parts.append(f"## {title}\n\n{_table(rows)}\n")
    return "\n".join(parts)


def _how_to_load(cut: bool, packed: bool) -> str:
    if cut:
        return f"{CUT}\n{CUT_AND_PACKED}" if packed else CUT
    return PACKED if packed else DENSE


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: object) -> str:
    """Return a number or a text on one line, with the characters escaped that are markup in a table."""
    if isinstance(value, float):
        return f"{value:.4g}"
    line = " ".join("".join(char if char.isprintable() else " " for char in str(value)).split())
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", line)


def _fence(text: str) -> str:
    """Return a fence of backticks that no line of `text` closes."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    return "`" * max(3, longest + 1)
