"""The families of models that llama.cpp runs and `export_gguf` writes: their names there, and their parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

ROTARY = ("default", "linear", "llama3")  # kinds of scaled rotary embeddings


@dataclass(frozen=True)
class Architecture:
    """A family in llama.cpp.

    Attributes:
        name: its name there.
        interleaves: whether its rotary embedding turns neighbouring pairs of a head, where transformers turns the two halves. The rows
            of query and key are then in another order.
        query_biases: whether it reads biases of query, key and value.
    """

    name: str
    interleaves: bool
    query_biases: bool


LLAMA = Architecture("llama", interleaves=True, query_biases=True)
FAMILIES = {  # model_type of transformers
    "llama": LLAMA,
    "mistral": LLAMA,
    "qwen2": Architecture("qwen2", interleaves=False, query_biases=True),
    "qwen3": Architecture("qwen3", interleaves=False, query_biases=False),
}


def architecture_of(model: nn.Module) -> Architecture:
    """Return the family of a model.

    Raises:
        ValueError: llama.cpp has no such family, or computes something else for a setting of its config.
    """
    config = getattr(model, "config", None)
    family = getattr(config, "model_type", None)
    if family not in FAMILIES or config is None:
        raise ValueError(f"model: expected one of {', '.join(FAMILIES)} to write as GGUF, got {family or type(model).__name__}")
    found, rotary = FAMILIES[family], _rotary(config)
    for name, value, wanted in (
        ("hidden_act", config.hidden_act, ("silu",)),
        ("rope_parameters.rope_type", rotary.get("rope_type", "default"), ROTARY),
        ("rope_parameters.partial_rotary_factor", rotary.get("partial_rotary_factor", 1.0), (1.0,)),
        ("attention_bias", bool(getattr(config, "attention_bias", False)), (False, True) if found.query_biases else (False,)),
    ):
        if value not in wanted:
            raise ValueError(
                f"model: expected {name} {' or '.join(map(str, wanted))} in the config of a {family}, as llama.cpp has it, got {value}"
            )
    return found


def add_parameters(writer: Any, config: PretrainedConfig) -> None:
    """Add the parameters of a model to a `gguf.GGUFWriter`.

    A window that attention slides over is no parameter there: the context is then no longer than the window, within which both agree.
    """
    rotary, head = _rotary(config), head_size(config)
    writer.add_context_length(min(filter(None, (config.max_position_embeddings, _window(config)))))
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(float(rotary["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if rotary.get("rope_type") == "linear":
        from gguf import RopeScalingType

        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rotary["factor"]))


def rotary_divisors(config: PretrainedConfig) -> torch.Tensor | None:
    """Return what llama.cpp divides each rotary frequency by, `[head / 2]` float32; None where it divides by nothing."""
    rotary = _rotary(config)
    if rotary.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    head = head_size(config)
    plain = rotary["rope_theta"] ** -(torch.arange(0, head, 2, dtype=torch.float64) / head)
    return (plain / scaled.double()).float()


def interleaved(rows: int, heads: int) -> torch.Tensor:
    """Return the rows of a query or key weight in the order in which the two halves of each head alternate, `[rows]` int64."""
    return torch.arange(rows).view(heads, 2, -1).transpose(1, 2).flatten()


def head_size(config: PretrainedConfig) -> int:
    """Return the features of an attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rotary(config: PretrainedConfig) -> Mapping[str, Any]:
    found: Mapping[str, Any] = getattr(config, "rope_parameters", None) or {}
    return found


def _window(config: PretrainedConfig) -> int | None:
    """Return the tokens of the window that attention slides over, None if it sees all."""
    kinds = getattr(config, "layer_types", None)
    slides = kinds is None or "sliding_attention" in kinds
    return getattr(config, "sliding_window", None) if slides else None
