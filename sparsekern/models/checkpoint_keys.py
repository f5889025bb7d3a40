"""The tensors of a checkpoint that a model takes, by transformers' own rules of renaming and fusing.

Only this file and `checkpoint_conversion.py` use these rules, which are half private.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RULES = "sparsekern_loading_rules"
INV_FREQ = "rotary_emb.inv_freq"  # once a buffer of each layer, now one of the model


def unread_keys(model: PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Return the sorted keys of a checkpoint that no parameter or buffer of `model` takes.

    Buffers that the model computes itself, such as position ids, count as taken.

    Args:
        model: a model that was loaded from the checkpoint, or that could be.
        keys: names of the checkpoint's tensors.
    """
    computed = {name for name, _ in model.named_buffers()} - model.state_dict().keys()
    rotary = any(name.endswith(INV_FREQ) for name in computed)
    prefix = model.base_model_prefix

    def is_computed(key: str) -> bool:
        return not computed.isdisjoint((key, key.removeprefix(f"{prefix}."), f"{prefix}.{key}")) or (
            rotary and key.endswith(INV_FREQ)
        )

    unread = (key for key, names in names_in(model, keys, _used_transforms(model)).items() if not names)
    return sorted(key for key in unread if not is_computed(key))


def check_floating(model: PreTrainedModel, dtypes: Mapping[str, str]) -> None:
    """Raise `ValueError` if a weight in floating point was read from whole numbers, as of a quantisation that the config does not name.

    Args:
        model: a model that was loaded from the checkpoint.
        dtypes: dtype of each of the checkpoint's tensors by name, as safetensors names them.
    """
    whole = [key for key, dtype in dtypes.items() if dtype[0] in "IU"]
    if not whole or getattr(model, RULES, None) is not None:
        return
    held = model.state_dict()
    for key, names in names_in(model, whole, _used_transforms(model)).items():
        for name in names:
            if name in held and held[name].is_floating_point():
                raise ValueError(f"{key}: expected weights in floating point, got {dtypes[key]}, and no quantization_config")


def recording(kind: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """Return a subclass whose models keep the rules that loading applied. transformers forgets those of a dequantised model."""

    def adjust(self: Any, loading_info: Any) -> None:
        setattr(self, RULES, getattr(self, "_weight_conversions", None))
        kind._adjust_missing_and_unexpected_keys(self, loading_info)

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "_adjust_missing_and_unexpected_keys": adjust})


def count_unfit(model: PreTrainedModel, keys: Iterable[str]) -> tuple[int, int]:
    """Return how many tensors of `model` a checkpoint lacks, and how many of the checkpoint's it does not take.

    Args:
        model: a model that was built from a config, on any device.
        keys: names of the checkpoint's tensors.
    """
    names = names_in(model, keys, _all_transforms(model))
    filled = {name for found in names.values() for name in found}
    for one, other in model.all_tied_weights_keys.items():
        if filled & {one, other}:
            filled |= {one, other}
    return len(model.state_dict().keys() - filled), sum(not found for found in names.values())


def names_in(model: PreTrainedModel, keys: Iterable[str], transforms: Sequence[Any]) -> dict[str, list[str]]:
    """Return the names in the model of each key, or none, as `convert_and_load_state_dict_in_model` finds them.

    Args:
        model: a model, on any device.
        keys: names of the checkpoint's tensors.
        transforms: transformers' rules for the model.
    """
    from transformers import core_model_loading as rules

    renamings = [entry for entry in transforms if isinstance(entry, rules.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, rules.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    held, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, list[str]] = {}
    for key in sorted(keys, key=getattr(rules, "dot_natural_key", None)):  # some rules depend on the order
        name, pattern = rules.rename_source_key(key, renamings, converters, prefix, held)
        if name not in held and key in held:
            name, pattern = rules.rename_source_key(key, [], [], prefix, held)
        names = [name]
        if pattern is not None:
            first, *_ = targets = by_pattern[pattern].target_patterns
            names = [name.replace(first, target) for target in targets]
        found[key] = names if name in held else []
    return found


def _used_transforms(model: PreTrainedModel) -> Sequence[Any]:
    """Return the rules that loading `model` applied, or those of its class for a model that was not loaded."""
    used = getattr(model, RULES, None) or getattr(model, "_weight_conversions", None)
    return _all_transforms(model) if used is None else used


def _all_transforms(model: PreTrainedModel) -> Sequence[Any]:
    from transformers.conversion_mapping import get_model_conversion_mapping

    return get_model_conversion_mapping(model) or []
