"""The mixture that a dense decoder becomes: transformers' GLM-4-MoE, whose routing weights can all be 1.

Its router scores are sigmoids, which are neither divided by their sum nor dependent on the number of experts. With logits near zero,
every score is near 1/2, and the scaling factor 2 makes it a routing weight near 1. So an expert adds what its neurons added to the dense
model, whatever number of experts is active. The logits only decide the order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

PARTS = ("gate_proj", "up_proj", "down_proj")
TINY = 2.0**-12  # root mean square of the router's logits: routing weights are 1 up to about this, and float32 resolves their order


@dataclass(frozen=True)
class Split:
    """The experts of one feed-forward network.

    Attributes:
        shared: neurons that are active for every token, `[n]` int64.
        experts: neurons of each expert, `[experts, n]` int64.
        weight: the router's weight, `[experts, hidden]` float32.
        bias: what is added to the router's logits to choose experts, `[experts]` float32.
    """

    shared: torch.Tensor
    experts: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def check_decoder(model: nn.Module) -> None:
    """Raise `ValueError` unless the model is a decoder of Llama's shape, whose parts GLM-4-MoE has too."""
    config: Any = getattr(model, "config", None)
    kind = type(model).__name__
    if not kind.endswith("ForCausalLM") or not isinstance(getattr(config, "rope_parameters", None), dict):
        raise ValueError(
            f"model: expected a decoder with rotary positions and a gated feed-forward network, such as Llama, got {kind}"
        )
    names = set(model.state_dict())
    layer = "model.layers.0."
    known = {f"{layer}mlp.{part}.weight" for part in PARTS}
    known |= {f"{layer}{name}_layernorm.weight" for name in ("input", "post_attention")}
    known |= {f"{layer}self_attn.{name}_proj.{part}" for name in "qkv" for part in ("weight", "bias")}
    known |= {f"{layer}self_attn.{name}.weight" for name in ("o_proj", "q_norm", "k_norm")}
    found = {name for name in names if name.startswith(layer)}
    if missing := sorted(known - found - {name for name in known if name.endswith("bias") or "_norm." in name}):
        raise ValueError(f"model: expected a decoder of Llama's shape, got {kind} without {missing[0]}")
    if unknown := sorted(found - known):
        raise ValueError(f"model: expected a decoder of Llama's shape, got {kind} with {unknown[0]}")
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or ())
    if kinds - {"full_attention"} or (window is not None and not kinds):
        raise ValueError(f"model: expected full attention in every layer, got {kind} with a window of {window} tokens")


def make_mixture(model: nn.Module, splits: list[Split], top_k: int) -> nn.Module:
    """Return a `Glm4MoeForCausalLM` with the weights of `model`, its neurons divided among experts.

    Args:
        model: a dense decoder that `check_decoder` accepts.
        splits: the experts of each layer.
        top_k: number of experts that are active beside the shared neurons.

    Raises:
        ValueError: the model has weights that the class has not.
    """
    from transformers import Glm4MoeForCausalLM

    dense, first = dict(model.state_dict()), splits[0]
    shared = first.shared.numel() // first.experts.shape[1]
    config = _config_of(model, dense, experts=len(first.experts), size=first.experts.shape[1], shared=shared, top_k=top_k)
    state: dict[str, torch.Tensor] = {}
    for index, split in enumerate(splits):
        gate, up, down = (dense.pop(f"model.layers.{index}.mlp.{part}.weight") for part in PARTS)
        prefix = f"model.layers.{index}.mlp"
        state[f"{prefix}.experts.gate_up_proj"] = torch.cat((gate[split.experts], up[split.experts]), 1)
        state[f"{prefix}.experts.down_proj"] = down.T[split.experts].transpose(1, 2)
        state[f"{prefix}.gate.weight"] = split.weight
        # The bias is added to sigmoids, whose slope at zero is 1/4.
        state[f"{prefix}.gate.e_score_correction_bias"] = split.bias / 4
        neurons = split.shared
        parts = zip(PARTS, (gate[neurons], up[neurons], down[:, neurons]), strict=True)
        state |= {f"{prefix}.shared_experts.{part}.weight": weight for part, weight in parts}
    state |= dense
    with torch.device("meta"):
        mixture = Glm4MoeForCausalLM(config)
    own = mixture.state_dict()
    if different := sorted(own.keys() ^ state.keys()):
        raise ValueError(
            f"model: expected the weights of a Llama-like decoder, got {type(model).__name__} that differs in {different[0]}"
        )
    state = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    mixture.load_state_dict(state, assign=True)
    mixture.model.rotary_emb = type(mixture.model.rotary_emb)(config).to(next(model.parameters()).device)
    mixture.tie_weights()
    mixture.generation_config = getattr(model, "generation_config", mixture.generation_config)
    return mixture.requires_grad_(True).eval()


def _config_of(model: nn.Module, dense: dict[str, torch.Tensor], *, experts: int, size: int, shared: int, top_k: int) -> Any:
    from transformers import Glm4MoeConfig

    old: Any = model.config
    same = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "rms_norm_eps",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
    )
    attention: Any = model.get_submodule("model.layers.0.self_attn")
    make: Any = Glm4MoeConfig  # it takes more arguments than its signature names
    return make(
        **{name: getattr(old, name) for name in same},
        head_dim=attention.head_dim,
        attention_bias="model.layers.0.self_attn.q_proj.bias" in dense,
        use_qk_norm="model.layers.0.self_attn.q_norm.weight" in dense,
        attention_dropout=getattr(old, "attention_dropout", 0.0),
        rope_parameters={"partial_rotary_factor": 1.0, **old.rope_parameters},
        moe_intermediate_size=size,
        n_routed_experts=experts,
        n_shared_experts=shared,
        num_experts_per_tok=top_k,
        first_k_dense_replace=0,
        num_mtp_layers=0,
        n_group=1,
        topk_group=1,
        norm_topk_prob=False,
        routed_scaling_factor=2.0,
        dtype=next(model.parameters()).dtype,
    )
