"""Which models and samples can be trained on next tokens."""

from __future__ import annotations

import torch
from torch import nn

from ..batches import Batch

PROBE_TOKENS = 8


def check_trainable(model: nn.Module, batches: list[Batch], trainer: str = "Gradual") -> None:
    """Raise unless `model` predicts next tokens and can be trained, and `batches` hold tokens to predict.

    Args:
        model: the model.
        batches: the calibration data.
        trainer: what trains it, for messages.

    Raises:
        ValueError: no parameter requires a gradient, or one that does is not finite; every sample is shorter than two tokens; the
            model returns no logits for each position, or those of a position change with the tokens behind it.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"model: {trainer} trains it, but none of its parameters requires a gradient (requires_grad_())")
    if found := not_finite(model):
        raise ValueError(f"model: expected finite weights to train, got {found}")
    decodes = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if decodes or any(batch.main != "input_ids" for batch in batches):
        found = (
            type(model).__name__ if decodes else f"batches of {next(batch.main for batch in batches if batch.main != 'input_ids')}"
        )
        raise ValueError(f"model: {trainer} trains causal language models on token ids, got {found}")
    batch = next(filter(predicted_tokens, batches), None)
    if batch is None:
        raise ValueError(
            f"calibration: {trainer} predicts tokens from those before, so it needs samples of at least two tokens, got none"
        )
    ids = batch.inputs["input_ids"][:1, :PROBE_TOKENS]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] == 0).to(ids.dtype)  # token 1 instead of 0, 0 instead of any other
    logits, changed = (getattr(model(input_ids=tokens), "logits", None) for tokens in (ids, other))
    if logits is None or changed is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise ValueError(
            f"model: {trainer} trains causal language models, but {type(model).__name__} returns no logits for each token"
        )
    if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-4):
        raise ValueError(
            f"model: {trainer} trains causal language models, but in {type(model).__name__} the logits of a token change with those behind it"
        )


def not_finite(model: nn.Module) -> str | None:
    """Return the first NaN or Inf of the parameters that are trained, and where it is."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not (finite := torch.isfinite(parameter)).all():
            return f"{float(parameter.detach()[~finite][0])} in {name}"
    return None


def predicted_tokens(batch: Batch) -> int:
    """Return the number of tokens of a batch that are predicted: real tokens behind a real token."""
    mask = target_mask(batch)
    samples, length = batch.shape
    return samples * max(length - 1, 0) if mask is None else int(mask.sum())


def target_mask(batch: Batch) -> torch.Tensor | None:
    """Return where a batch holds a real token behind a real one, without the first position; None where there is no padding."""
    return None if batch.token_mask is None else batch.token_mask[:, 1:] & batch.token_mask[:, :-1]
