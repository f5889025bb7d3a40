"""Greedy generation from a fixed prompt, equal in every measurement."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def random_prompt(model: nn.Module, length: int) -> torch.Tensor:
    """Return `[1, length]` token ids on the model's device, equal in every call."""
    of = cast("PreTrainedModel", model)
    vocabulary = cast("nn.Embedding", of.get_input_embeddings()).num_embeddings
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(of.device)


def generate(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return exactly `tokens` tokens after the prompt, each the most likely one."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
    mask = torch.ones_like(prompt)
    return cast("Any", model).generate(prompt, attention_mask=mask, pad_token_id=0, **settings)[0, prompt.shape[1] :]
