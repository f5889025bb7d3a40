"""Weights that a model divides in place while it is evaluated, so that float16 does not overflow (RWKV's `rescale_every`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

SETTING = "rescale_every"


def restore_scales(model: nn.Module) -> None:
    """Give divided weights their values of the checkpoint back. The next forward divides them again."""
    for module in _dividing(model):
        if module.layers_are_rescaled:
            training, module.training = module.training, True
            with torch.no_grad():
                module._rescale_layers()
            module.training = training


@contextmanager
def undivided(model: nn.Module) -> Iterator[None]:
    """Let the forwards of `model` within divide no weights. They compute the same otherwise."""
    found = [(module, getattr(module.config, SETTING)) for module in _dividing(model)]
    restore_scales(model)
    for module, _ in found:
        setattr(module.config, SETTING, 0)
    try:
        yield
    finally:
        for module, setting in found:
            setattr(module.config, SETTING, setting)
            module.layers_are_rescaled = False


def check_undivided(model: nn.Module) -> None:
    """Raise `ValueError` if the forward of a model divides weights in place, which packed weights do not allow."""
    if _dividing(model):
        raise ValueError(
            f"model: {type(model).__name__} divides weights in place while it runs, which packed weights do not allow; "
            f"set model.config.{SETTING} = 0 first, which only float16 needs"
        )


def _dividing(model: nn.Module) -> list[Any]:
    """Return the modules that divide weights."""
    found = (module for module in model.modules() if hasattr(module, "_rescale_layers"))
    return [module for module in found if getattr(getattr(module, "config", None), SETTING, 0) > 0]
