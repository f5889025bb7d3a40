"""The model card: what was done to the model, with what, and what came of it."""

from __future__ import annotations

import platform
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

CUT = """Heads and neurons are gone, as many as `sparsekern_units` in `config.json` says, layer by layer. sparsekern builds the model
with these sizes, a plain transformers module:

```python
import sparsekern

model = sparsekern.load("path/to/this/folder")
```
"""

CUT_AND_PACKED = (
    "The zeros of what is left take no space: the linear layers are packed; `sparsekern.unpack(model)` makes them dense.\n"
)


def versions() -> dict[str, str]:
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
    """Markdown with the front matter that the Hugging Face hub reads.

    Args:
        model: the pruned model.
        packed: it is saved packed.
        command: the command line that made it, shown as it was typed.
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
        parts.append(f"Made with:\n\n```\n{command}\n```\n")
    for title, rows in (("Results", results), ("Settings", settings), ("Versions", versions())):
        if rows:
            parts.append(f"## {title}\n\n{_table(rows)}\n")
    return "\n".join(parts)


def _how_to_load(cut: bool, packed: bool) -> str:
    if cut:
        return f"{CUT}\n{CUT_AND_PACKED}" if packed else CUT
    return PACKED if packed else DENSE


def _table(rows: Mapping[str, object]) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {_cell(value)} |" for name, value in rows.items())])


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
