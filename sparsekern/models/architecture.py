"""The transformers class that a checkpoint is loaded as: the one that `config.architectures` names."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .._warnings import warn
from .checkpoint_keys import count_unfit

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

# Where no class is named, the first of these wins among those that fit the weights equally well.
AUTO_CLASSES = (
    "AutoModelForImageTextToText",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSeq2SeqLM",
    "AutoModelForCausalLM",
    "AutoModelForMaskedLM",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForImageClassification",
    "AutoModelForZeroShotImageClassification",
    "AutoModelForCTC",
    "AutoModel",
)


def class_to_load(config: PretrainedConfig, source: str, keys: Iterable[str] | None, *, trust_remote_code: bool) -> Any:
    """Return the class with the `from_pretrained` to load a checkpoint with.

    The classes that `config.architectures` names come first. Where there are none that transformers knows, it is the class of the
    model type that fits the weights best, and a warning says so.

    Args:
        config: the config of the checkpoint.
        source: names the checkpoint in messages.
        keys: names of the checkpoint's tensors, if they are known before it is loaded.
        trust_remote_code: use the code that the checkpoint contains, if it names any.

    Raises:
        ValueError: the names are not a list of names; the class is in code that the checkpoint contains, which `trust_remote_code` does not allow; or
            transformers builds no model from the config.
    """
    names = _names(config, source)
    remote = _remote_classes(config)
    if trust_remote_code and remote:
        return _auto_class(next((remote[name] for name in names if name in remote), next(iter(remote.values()))))
    known: dict[type[PreTrainedModel], PretrainedConfig] = {}
    for kind in filter(None, map(_class_named, names)):
        if (part := _config_for(kind, config)) is not None:
            known[kind] = part
    if known:
        first = next(iter(known))
        built = [(kind, _on_meta(kind, part)) for kind, part in known.items()] if len(known) > 1 and keys is not None else []
        return _best(built, keys) or first
    if brought := [name for name in names if name in remote]:
        raise ValueError(
            f"model: {source!r}: {brought[0]} is code that comes with the model, which is not run by default "
            "(trust_remote_code=True or --trust-remote-code allows it)"
        )
    found = _best(_classes_for(config, first_only=keys is None), keys)
    if found is None:
        raise ValueError(f"model: {source!r}: transformers builds no model from its config, of type {config.model_type!r}")
    why = (
        f"names {', '.join(names)}, which transformers does not know for {config.model_type!r}"
        if names
        else "names no architecture"
    )
    warn(f"model: {source!r}: its config.json {why}; it is loaded as {found.__name__}", stacklevel=4)
    return found


def _names(config: PretrainedConfig, source: str) -> list[str]:
    names = getattr(config, "architectures", None) or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"model: {source!r}: architectures in config.json: expected a list of class names, got {names!r}")
    return names


def is_encoder_config(config: PretrainedConfig) -> bool:
    """Return whether a config is of a model type with a masked-LM form, and not for a decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)


def _remote_classes(config: PretrainedConfig) -> dict[str, str]:
    """Return the auto class by the name of each model class that the checkpoint contains, causal language models first."""
    auto_map = getattr(config, "auto_map", None)
    places = auto_map.items() if isinstance(auto_map, Mapping) else ()
    entries = {auto: place for auto, place in places if auto.startswith("AutoModel") and isinstance(place, str)}
    ordered = sorted(entries, key=lambda auto: auto != "AutoModelForCausalLM")
    return {entries[auto].rpartition(".")[2]: auto for auto in ordered}


def _auto_class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _class_named(name: str) -> type[PreTrainedModel] | None:
    """Return the model class of that name, of transformers or registered with its auto classes, or None."""
    import transformers

    found = getattr(transformers, name, None)
    if found is None:
        registered = (auto._model_mapping._extra_content for auto in map(_auto_class, AUTO_CLASSES))
        found = next((kind for extra in registered for kind in extra.values() if kind.__name__ == name), None)
    if not isinstance(found, type) or not issubclass(found, transformers.PreTrainedModel):
        return None
    return None if found.forward is torch.nn.Module.forward else found  # a base of classes


def _config_for(kind: type[PreTrainedModel], config: PretrainedConfig) -> PretrainedConfig | None:
    """Return the config, or the part of it, that a class takes; None if it is for another class."""
    from transformers import PretrainedConfig

    parts = (part for part in vars(config).values() if isinstance(part, PretrainedConfig))
    wanted = kind.config_class
    found = next((part for part in (config, *parts) if wanted is None or isinstance(part, wanted)), None)
    return config if found is None and borrows(kind, config) else found


def borrows(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """Return whether a model type has a config of its own and the class of another (EXAONE, which runs as a Llama).

    Such a model keeps its config. The names of its tensors on disk depend on the model type.
    """
    if isinstance(config, kind.config_class or object):
        return False
    mappings = (_auto_class(name)._model_mapping for name in AUTO_CLASSES)
    return any(type(config) in mapping and mapping[type(config)] is kind for mapping in mappings)


def _on_meta(kind: Any, config: PretrainedConfig) -> PreTrainedModel | None:
    """Build a model without weights, or return None if that fails."""
    try:
        with torch.device("meta"):
            return kind(copy.deepcopy(config))
    except (ArithmeticError, AttributeError, ImportError, LookupError, RuntimeError, TypeError, ValueError):
        return None  # as its own code does not take the config, it is not a candidate


def _classes_for(config: PretrainedConfig, *, first_only: bool) -> Iterator[tuple[type, PreTrainedModel | None]]:
    """Yield the classes of transformers for a config's model type, each with a model without weights."""
    for name in AUTO_CLASSES:
        if name == "AutoModelForCausalLM" and is_encoder_config(config):
            continue
        model = _on_meta(_auto_class(name).from_config, config)
        if model is not None:
            yield type(model), model
            if first_only:
                return


def _best(candidates: Iterable[tuple[type, PreTrainedModel | None]], keys: Iterable[str] | None) -> Any:
    """Return the class whose model lacks the fewest weights, then leaves the fewest over; the first of equals."""
    built: Sequence = [(kind, model) for kind, model in candidates if model is not None]
    if not built or keys is None:
        return built[0][0] if built else None
    held = list(keys)
    return min(built, key=lambda candidate: count_unfit(candidate[1], held))[0]
