"""Cut heads and neurons out of an encoder, and record the remaining sizes in its config so that it can be built again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from .encoder import Encoder, SubLayer

CONFIG_KEY = "sparsekern_units"
SIZED = "sized_by_sparsekern"


class NoHeads(nn.Module):
    """An attention without heads: nothing is attended to, and only the bias of the output projection remains."""

    def __init__(self, out_name: str | None = None, out: nn.Linear | None = None) -> None:
        super().__init__()
        self._out_name = out_name
        if out_name is not None:
            self.add_module(out_name, out)

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> tuple[torch.Tensor, None]:
        features = hidden_states[..., :0]
        return (features if self._out_name is None else getattr(self, self._out_name)(features)), None


def keep_units(sublayer: SubLayer, kept: torch.Tensor) -> None:
    """Cut all units out of the linears of a sub-layer, in place, except those at the indices `kept`."""
    features = (kept[:, None] * sublayer.head_size + torch.arange(sublayer.head_size, device=kept.device)).flatten()
    for linear in sublayer.inputs:
        _cut(linear, linear.weight.detach()[features], linear.bias.detach()[features])
    _cut(sublayer.out, sublayer.out.weight.detach()[:, features], sublayer.out.bias.detach())
    if sublayer.kind == "heads":
        _set_heads(sublayer, len(kept))


def record_units(encoder: Encoder) -> None:
    """Write the remaining units of each sub-layer into the model's config."""
    left: dict[str, list[int]] = {"heads": [], "neurons": []}
    for sublayer in encoder.sublayers:
        left[sublayer.kind].append(sublayer.units)
    setattr(encoder.model.config, CONFIG_KEY, left)


def recorded_units(config) -> dict[str, list[int]] | None:
    """Return what `record_units` wrote, or None where no units were cut."""
    return getattr(config, CONFIG_KEY, None)


def check_units(config, source: str) -> None:
    """Raise `ValueError` unless the sizes that a config records are possible."""
    left, layers = recorded_units(config), config.num_hidden_layers
    most = {"heads": config.num_attention_heads, "neurons": getattr(config, "intermediate_size", getattr(config, "hidden_dim", 0))}
    for kind, limit in most.items():
        found = left.get(kind) if isinstance(left, dict) else None
        if not isinstance(found, list) or len(found) != layers or not all(isinstance(n, int) and 0 <= n <= limit for n in found):
            raise ValueError(
                f"model: {source}: {CONFIG_KEY}.{kind} in config.json: "
                f"expected {layers} whole numbers from 0 to {limit}, got {found!r}"
            )


def cut_to_size(model: nn.Module, units: Mapping[str, Sequence[int]]) -> None:
    """Give a newly built model the sizes that a config records; its weights are arbitrary until they are loaded."""
    left = {kind: iter(counts) for kind, counts in units.items()}
    for sublayer in Encoder(model).sublayers:
        keep_units(sublayer, torch.arange(next(left[sublayer.kind]), device=sublayer.out.weight.device))


def sized(kind: type) -> type:
    """Return a subclass of the transformers class `kind` that builds models with the sizes in their config."""

    def build(self, config, *args, **kwargs):
        kind.__init__(self, config, *args, **kwargs)
        cut_to_size(self, recorded_units(config))

    return type(kind.__name__, (kind,), {"__init__": build, "__module__": kind.__module__, SIZED: True})


def is_sized(model: nn.Module) -> bool:
    """Return whether `model` is of a class that `sized` made."""
    return getattr(type(model), SIZED, False)


def _cut(linear: nn.Linear, weight: torch.Tensor, bias: torch.Tensor) -> None:
    trained = linear.weight.requires_grad
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format), requires_grad=trained)
    linear.bias = nn.Parameter(bias.clone(), requires_grad=trained)
    linear.out_features, linear.in_features = weight.shape


def _set_heads(sublayer: SubLayer, heads: int) -> None:
    attention = sublayer.owner.module
    if heads == 0:
        inside = sublayer.owns_output
        sublayer.owner.put(NoHeads(sublayer.output.attribute, sublayer.out) if inside else NoHeads())
        return
    for name, value in (("num_attention_heads", heads), ("n_heads", heads), ("all_head_size", heads * sublayer.head_size)):
        if hasattr(attention, name):
            setattr(attention, name, value)
