"""The `config.json` of a saved model, corrected where transformers would write what is not so."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from ..models.source import source_of
from ..models.units import recorded_units
from .hf_config import METHOD, version_of
from .output import CONFIG
from .sparse_linear import SparseLinear

QUANTIZATION, TIED = "quantization_config", "tie_word_embeddings"


def correct_config(model: nn.Module, folder: Path) -> None:
    """Correct the entries of `config.json` in `folder`.

    * A quantisation that the weights no longer have is left out.
    * A head that is not tied to the embeddings is not said to be.
    * The architectures are those that the model's source names.
    * Code that is not in the folder is not referred to.
    * A model whose units were cut is marked as one for sparsekern, since other loaders would build it with the wrong sizes.

    Args:
        model: the model that was saved.
        folder: the folder with its config, and with the code that the config refers to.
    """
    path = folder / CONFIG
    if not path.is_file():
        return
    entries = json.loads(path.read_bytes())
    before = json.dumps(entries, sort_keys=True)
    if getattr(model, "hf_quantizer", None) is None:
        entries.pop(QUANTIZATION, None)
    if QUANTIZATION not in entries or entries[QUANTIZATION].get("quant_method") == METHOD:
        for part in _parts(entries):
            part.pop(QUANTIZATION, None)
    if is_untied(model):
        _say_untied(getattr(model, "config", None), entries)
    source = source_of(model)
    if source is not None and source.architectures:
        entries["architectures"] = list(source.architectures)
    for part in (entries, *_parts(entries)):
        if "auto_map" in part and not _is_there(part["auto_map"], folder):
            del part["auto_map"]
    if recorded_units(getattr(model, "config", None)) is not None:
        entries.setdefault(QUANTIZATION, {"quant_method": METHOD, "version": version_of(None), "layers": {}})
    if json.dumps(entries, sort_keys=True) != before:
        path.write_text(json.dumps(entries, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def is_untied(model: nn.Module) -> bool:
    """Return whether the config of a model ties weights to others, but each is a weight of its own."""
    declared = getattr(model, "get_expanded_tied_weights_keys", None)
    pairs = declared(all_submodels=True) if declared else {}
    found = [(_weight(model, one), _weight(model, other)) for one, other in pairs.items()]
    own = [one is not other for one, other in found if one is not None and other is not None]
    return bool(own) and all(own)


def _weight(model: nn.Module, name: str) -> Any:
    """Return the parameter or buffer of that name, or its packed layer, or None if there is none."""
    parent, _, own = name.rpartition(".")
    try:
        module = model.get_submodule(parent)
    except AttributeError:
        return None
    if isinstance(module, SparseLinear):
        return module
    return module._parameters.get(own, module._buffers.get(own))


def _say_untied(config: Any, entries: dict[str, Any]) -> None:
    """Set `tie_word_embeddings` to False in each part of a config that says True."""
    if getattr(config, TIED, False):
        entries[TIED] = False
    for name, part in vars(config).items() if config is not None else ():
        if isinstance(entries.get(name), dict) and hasattr(part, "to_dict"):
            _say_untied(part, entries[name])


def _parts(entries: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the configs inside a config, at any depth."""
    found = [value for value in entries.values() if isinstance(value, dict)]
    return [part for value in found for part in (value, *_parts(value))]


def _is_there(auto_map: object, folder: Path) -> bool:
    """Return whether the files that an `auto_map` names are in the folder. Those of other repositories are not looked for."""
    values = auto_map.values() if isinstance(auto_map, Mapping) else ()
    places = [place for value in values for place in (value if isinstance(value, list) else [value]) if isinstance(place, str)]
    return all("--" in place or (folder / f"{place.rpartition('.')[0]}.py").is_file() for place in places)
