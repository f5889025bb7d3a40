"""Tensors of a checkpoint turned into those of a model and back, by transformers' own rules.

Only this file and `checkpoint_keys.py` use these rules, which are half private.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch


def convert(model: Any, tensors: Mapping[str, torch.Tensor], settings: Any) -> Any:
    """Put tensors of a checkpoint, or what the rules make of them, in the place of the model's.

    Args:
        model: a transformers model.
        tensors: by their names in the checkpoint.
        settings: the `LoadStateDictConfig` that transformers made for the checkpoint.

    Returns:
        The loading info of transformers.
    """
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # there would be one for each block
    try:
        return convert_and_load_state_dict_in_model(model, dict(tensors), settings)[0]
    finally:
        if shown:
            logging.enable_progress_bar()


def converted_back(model: Any, state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the model under the names and in the shapes of its checkpoint."""
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, dict(state))


def joins_tensors(model: Any) -> bool:
    """Return whether a rule that loading `model` used makes new tensors, such as fused experts of single ones, and not only new names."""
    from transformers.core_model_loading import WeightConverter

    return any(isinstance(rule, WeightConverter) for rule in getattr(model, "_weight_conversions", None) or ())
