"""Linears that transformers joins with others in the files of a model, in a way that packed tensors do not allow."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import nn


def joined_in_files(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Return those of the linears `names` whose tensors, packed ones too, a conversion of transformers joins or divides.

    Most conversions name weights. One that names modules, such as `query_key_value` of q, k and v, takes the tensors of packed
    linears for weights.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or not isinstance(model, modeling.PreTrainedModel):
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    known = get_model_conversion_mapping(model, add_legacy=False)
    back = [conversion.reverse_transform() for conversion in known if hasattr(conversion, "operations")]
    return [name for name in names if any(one.rename_source_key(f"{name}.values")[1] is not None for one in back)]
