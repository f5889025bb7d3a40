"""The class that a streamed model is loaded with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from .linears import mark_unread
from .streaming import Stream


def streamed(kind: type, blocks_of: Callable[[nn.Module], Sequence[str]]) -> type:
    """Return a subclass of a transformers class whose `from_pretrained` returns a streamed model of that class.

    Args:
        kind: the class.
        blocks_of: returns the names of the blocks of a dense model on the meta device.
    """

    def dense(model: Any) -> nn.Module:
        with torch.device("meta"):
            made: nn.Module = kind(copy.deepcopy(model.config))
        for parameter in made.parameters():
            mark_unread(parameter)
        return made

    def load(model: Any, state: Any, files: Any, settings: Any, expected_keys: Any = None) -> tuple[Any, None]:
        if settings.hf_quantizer is not None and not hasattr(settings.hf_quantizer, "check_block"):
            raise ValueError(f"stream: expected a checkpoint in floating point, got one of {type(settings.hf_quantizer).__name__}")
        for parameter in model.parameters():
            mark_unread(parameter)
        stream = Stream(model, files, settings, blocks_of(model if settings.hf_quantizer is None else dense(model)))
        info = stream.fill(model)
        stream.attach(model)
        model.__class__ = kind  # only the loading differs
        return info, None

    return type(kind.__name__, (kind,), {"_load_pretrained_model": staticmethod(load), "__module__": kind.__module__})
