"""Recognise models with low-rank or other adapters, by peft's classes or by their structure."""

from __future__ import annotations

from torch import nn

MERGE = "merge the adapter into its base model first (peft: `model = model.merge_and_unload()`)"


def check_no_adapter(model: nn.Module) -> None:
    """Raise `ValueError` if a model has adapters.

    Their matrices would be pruned like those of the model, and transformers saves the adapter alone.
    """
    found = next((name for name, module in model.named_modules() if _is_of_adapter(module)), None)
    if found is None and not getattr(model, "_hf_peft_config_loaded", False):
        return
    where = f" at {found}" if found else ""
    raise ValueError(f"model: expected one without adapters, got a {type(model).__name__} with an adapter{where}; {MERGE}")


def _is_of_adapter(module: nn.Module) -> bool:
    """Return whether a module is of peft, or a layer that is wrapped as peft wraps it: `base_layer`, and an adapter beside it."""
    if any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__):
        return True
    wraps = isinstance(module._modules.get("base_layer"), nn.Module)
    return wraps and (hasattr(module, "adapter_layer_names") or any(name.startswith("lora_") for name in module._modules))
