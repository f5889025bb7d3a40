"""Tiny pruned models to pack."""

from __future__ import annotations

import torch
from torch import nn

from tests import tiny


def prune_linears(model: nn.Module, share: float = 0.6, *, skip: str = "lm_head") -> nn.Module:
    """Set `share` of every linear's weights to zero, at random."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, module in model.named_modules():
            if name != skip and type(module).__name__ in ("Linear", "Conv1D"):
                module.weight.mul_(torch.rand(module.weight.shape, generator=generator) >= share)
    return model


def two_of_four(linear: nn.Linear) -> None:
    """Make the weight one that is smaller as 2:4 than as a bitmask."""
    with torch.no_grad():
        linear.weight.fill_(1).mul_(torch.tensor([0.0, 1, 0, 1]).repeat(linear.in_features // 4))


def llama(dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    # Cast by loading, not by .to(): the rotary frequencies of a loaded model are float32 whatever its dtype.
    model = prune_linears(tiny.llama(**{"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96} | changes))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=None, eos_token_id=None)
    return prune_linears(GPT2LMHeadModel(config).eval())


def ids(rows: int = 2, tokens: int = 9) -> torch.Tensor:
    return torch.randint(0, 96, (rows, tokens), generator=torch.Generator().manual_seed(2))
