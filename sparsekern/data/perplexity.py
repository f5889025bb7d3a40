"""Perplexity over non-overlapping windows, without ever holding the logits of a whole window."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from tqdm import tqdm

LOGIT_ROWS = 256  # 256 rows of a vocabulary of 150,000 in float32 are 150 MB


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: torch.Tensor, length: int = 2048, *, progress: bool = False) -> float:
    """The perplexity of `model` on `ids`: `exp` of the mean negative log-likelihood of each token but the first of its window.

    Args:
        model: a transformers causal language model; computed in its own dtype, the likelihoods in float32.
        ids: `[tokens]` or `[rows, tokens]` int64. Each row is cut into windows of its own; a remainder shorter than `length`
            is left out.
        length: tokens in a window.
        progress: show a progress bar.

    Returns:
        A float; `inf` where the mean exceeds what `exp` can hold.

    Raises:
        ValueError: fewer tokens than one window; a window longer than the model's positions; ids that the model does not know; NaN or Inf in the model's output.
        TypeError: `ids` is not an integer tensor, or `model` no model.

    Source: the protocol of the GPTQ and SparseGPT papers (raw text joined, windows of 2048).
    """
    windows = evaluation_windows(model, ids, length)
    training = model.training
    model.eval()
    try:
        total = 0.0
        for index, window in enumerate(tqdm(windows, desc="perplexity", disable=not progress, leave=False)):
            loss = _window_loss(model, window[None])
            if not math.isfinite(loss):
                raise ValueError(f"perplexity: the model's output for window {index} holds NaN or Inf")
            total += loss
    finally:
        model.train(training)
    mean = total / (len(windows) * (length - 1))
    return math.exp(mean) if mean < 700 else math.inf


def evaluation_windows(model: torch.nn.Module, ids: torch.Tensor, length: int) -> list[torch.Tensor]:
    """The windows that `perplexity` takes of `ids`. Raises what it raises of them."""
    return list(_windows(model, ids, length))


def _windows(model: torch.nn.Module, ids: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or ids.dim() not in (1, 2):
        raise TypeError("ids: expected an integer tensor [tokens] or [rows, tokens]")
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}; sparsekern.load makes one of a name")
    if not getattr(model, "can_generate", lambda: True)():
        raise TypeError(f"model: expected a causal language model, got {type(model).__name__}, which predicts no next token")
    if length < 2:
        raise ValueError(f"length: expected at least 2, got {length}")
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and length > positions:
        raise ValueError(f"length: expected at most {positions}, the positions of this model, got {length}")
    vocabulary = getattr(model.get_input_embeddings(), "num_embeddings", None)
    low, high = map(int, ids.aminmax()) if ids.numel() else (0, 0)
    if low < 0 or (vocabulary is not None and high >= vocabulary):
        raise ValueError(
            f"ids: expected token ids from 0 to {'' if vocabulary is None else vocabulary - 1}, got {low if low < 0 else high}; "
            "is this the model's own tokenizer?"
        )
    rows = ids if ids.dim() == 2 else ids[None]
    if rows.shape[1] < length or not len(rows):
        raise ValueError(f"ids: one window of length {length} needs {length} tokens, got {rows.numel()}")
    for row in rows:
        yield from row[: len(row) // length * length].view(-1, length)


def _window_loss(model: torch.nn.Module, window: torch.Tensor) -> float:
    """The summed negative log-likelihood of `window` `[1, length]`.

    The head is given only the last position, which keeps the logits small; its true input is kept and goes through it in chunks.
    Where the model changes the head's logits afterwards (soft-capping, scaling), the chunks would not, so all are computed at once.
    """
    head = model.get_output_embeddings()
    window = window.to(model.device)
    targets = window[0, 1:]
    if head is None:
        return _loss(model(input_ids=window, use_cache=False).logits[0, :-1], targets)
    hidden, last = [], []

    def keep_last_position(module, args):
        hidden.append(args[0])
        return (args[0][:, -1:], *args[1:])

    hooks = [
        head.register_forward_pre_hook(keep_last_position),
        head.register_forward_hook(lambda module, args, output: last.append(output)),
    ]
    try:
        logits = model(input_ids=window, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    if not last or not torch.equal(last[0].to(logits.dtype), logits):
        return _loss(model(input_ids=window, use_cache=False).logits[0, :-1], targets)
    rows = hidden[0][0, :-1]
    return sum(
        _loss(head(rows[start : start + LOGIT_ROWS]), targets[start : start + LOGIT_ROWS])
        for start in range(0, len(rows), LOGIT_ROWS)
    )


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> float:
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum").item()
