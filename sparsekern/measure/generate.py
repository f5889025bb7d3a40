"""Greedy generation from a fixed prompt, the same in every measurement."""

from __future__ import annotations

import torch
from torch import nn


def random_prompt(model: nn.Module, length: int) -> torch.Tensor:
    """Return `[1, length]` token ids on the model's device, the same in every call."""
    vocabulary = model.get_input_embeddings().num_embeddings
    return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0)).to(model.device)


def generate(model: nn.Module, prompt: torch.Tensor, tokens: int) -> torch.Tensor:
    """Return exactly `tokens` tokens after the prompt, the most likely one each time."""
    settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "num_beams": 1, "use_cache": True}
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, pad_token_id=0, **settings)[0, prompt.shape[1] :]
