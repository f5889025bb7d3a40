"""Which models and samples can be trained on next tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..._checks import on_one_line
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
    if why := why_not_causal(model, batches):
        raise ValueError(f"model: {trainer} trains causal language models, but {why}")
    if _to_predict(batches) is None:
        raise ValueError(
            f"calibration: {trainer} predicts tokens from those before, so it needs samples of at least two tokens, got none"
        )


def why_not_causal(model: nn.Module, batches: Sequence[Batch]) -> str | None:
    """Return why a model does not predict each token from those before it; None if it does, or if there is no token to predict.

    Args:
        model: the model.
        batches: the calibration data.
    """
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return f"{name} is an encoder with a decoder"
    other_input = next((batch.main for batch in batches if batch.main != "input_ids"), None)
    if other_input is not None:
        return f"{name} takes {other_input}"
    batch = _to_predict(batches)
    if batch is None:
        return None
    ids = batch.inputs["input_ids"][:1, :PROBE_TOKENS]
    other = ids.clone()
    other[:, -1] = (ids[:, -1] == 0).to(ids.dtype)  # token 1 instead of 0, 0 instead of any other
    try:
        logits, changed = (getattr(model(input_ids=tokens), "logits", None) for tokens in (ids, other))
    except (TypeError, ValueError) as error:
        return f"the forward of {name} refuses token ids alone: {on_one_line(error)}"
    if logits is None or changed is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        return f"{name} returns no logits for each token"
    if not torch.allclose(logits[:, :-1], changed[:, :-1], rtol=1e-3, atol=1e-4):
        return f"in {name} the logits of a token change with those behind it"
    return None


def _to_predict(batches: Iterable[Batch]) -> Batch | None:
    """Return the first batch that holds tokens to predict."""
    return next(filter(predicted_tokens, batches), None)


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
