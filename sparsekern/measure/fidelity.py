"""How close a pruned model is to the dense one: the divergence of its predictions, and how often the most likely token is the same."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from ..data.perplexity import (
    WINDOW_COPIES,
    as_evaluation,
    check_predicts,
    each_window,
    evaluation_windows,
    hidden_bytes,
    loss_of,
    mean_of,
    perplexity_of,
    windows_together,
)
from ..data.predictions import LOGIT_ROWS, Predictions
from ..models.evaluation import evaluation_mode
from ..models.float32_products import float32_products
from ..models.in_step import in_step
from ..models.limits import vocabulary, window_length
from ..models.memory import forward_bytes, needs_of
from ..models.streaming import stream_of
from ..ranks import World
from ..reports.base import AGREEMENT, DIVERGENCE


@dataclass(frozen=True)
class Fidelity:
    """How close the predictions of a model are to those of the dense one.

    Attributes:
        divergence: the Kullback-Leibler divergence of the model's next-token distribution from the dense one's, in nats: the mean
            over the predicted tokens. Zero for equal predictions.
        agreement: the share of the predicted tokens for which both models hold the same token for the most likely one.
        perplexity: the model's perplexity on the same tokens.
        dense_perplexity: that of the dense model.
    """

    divergence: float
    agreement: float
    perplexity: float
    dense_perplexity: float

    def __str__(self) -> str:
        return (
            f"divergence {self.divergence:.4f} nats a token, same top token {self.agreement:.2%}, "
            f"perplexity {self.perplexity:.4f} (dense {self.dense_perplexity:.4f})"
        )

    def measured(self) -> dict[str, float]:
        """Return the values by name, as reports hold them."""
        return {
            "perplexity, dense": self.dense_perplexity,
            "perplexity, pruned": self.perplexity,
            DIVERGENCE: self.divergence,
            AGREEMENT: self.agreement,
        }


@torch.no_grad()
def fidelity(
    model: torch.nn.Module,
    dense: torch.nn.Module,
    ids: torch.Tensor | str | os.PathLike,
    length: int | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = False,
    max_memory: int | str | None = None,
) -> Fidelity:
    """Return how close the predictions of `model` are to those of `dense`, and the perplexities of both.

    Perplexity tells how well a model predicts a text, divergence how much pruning changed what it predicts: gains and losses do not
    cancel. No logits are stored but those of a few tokens. Processes of `torch.distributed` share the windows as in
    `sparsekern.perplexity`, and the figures do not depend on their number.

    Args:
        model: a transformers causal language model, in memory or streamed, dense or packed.
        dense: the model to compare with, which has the same vocabulary. It may be on another device.
        ids: tokens or a text, as for `sparsekern.perplexity`.
        length: tokens in a window. None is 2048, or the models' positions if they are fewer.
        tokenizer: the tokenizer of both models, which a text needs.
        progress: show a progress bar.
        max_memory: the most memory that two streamed models may take, in bytes or as `"8GB"`.

    Returns:
        A `Fidelity`: the divergence, the share of equal top tokens, and both perplexities.

    Raises:
        TypeError: `ids` is neither an integer tensor nor a text, or a model is not a causal language model.
        ValueError: as in `sparsekern.perplexity`, or the models have other vocabularies.
        FileNotFoundError: the text is a file that does not exist.

    Example:
        >>> found = sparsekern.fidelity(model, model, ids, length=16)
        >>> found.divergence, found.agreement
        (0.0, 1.0)
    """
    world = World.current()
    with world.together():
        check_predicts("model", model)
        check_predicts("dense", dense)
        words = vocabulary(model), vocabulary(dense)
        if words[0] != words[1]:
            raise ValueError(f"dense: expected a model of {words[0]} tokens like the other one, got one of {words[1]}")
        length = min(window_length(of, length) for of in (model, dense))
        windows = evaluation_windows(model, as_evaluation(ids, tokenizer, length), length)
        with evaluation_mode(model), evaluation_mode(dense):
            together = _together(model, dense, length, max_memory) or len(windows)

            def find(own: Sequence[torch.Tensor]) -> Iterator[tuple[float, ...]]:
                for at in range(0, len(own), together):
                    yield from _compared(model, dense, own[at : at + together])

            found = each_window("fidelity", windows, world, find, progress=progress)
    divergence, agreement, own, other = (mean_of(figures, len(windows), length) for figures in zip(*found, strict=True))
    return Fidelity(divergence, agreement, perplexity_of(own), perplexity_of(other))


def _together(model: torch.nn.Module, dense: torch.nn.Module, length: int, max_memory: int | str | None) -> int | None:
    """Return how many windows go through streamed models together within a limit; None where there is none."""
    if max_memory is None or stream_of(model) is None:
        return windows_together(model, length, max_memory)
    windows_together(dense, length, max_memory)  # raises for a dense model in memory
    needs = {f"{what}, of the dense model": size for what, size in needs_of(dense).items() if what != "the program"}
    needs["a window in a block of the dense model"] = forward_bytes(dense, length)
    return windows_together(model, length, max_memory, beside=needs, kept=WINDOW_COPIES * hidden_bytes(dense, length))


def _compared(model: torch.nn.Module, dense: torch.nn.Module, windows: Sequence[torch.Tensor]) -> Iterator[tuple[float, ...]]:
    """Yield what `_figures` returns for each window. Blocks of a streamed model are read once for all of them."""
    if stream_of(dense) is None:
        calls = [partial(_figures, model, dense, window, partial(_predictions, dense, window)) for window in windows]
    else:
        kept = list(in_step(dense, [partial(_predictions, dense, window) for window in windows]))
        calls = [
            partial(_figures, model, dense, window, partial(kept.__getitem__, number)) for number, window in enumerate(windows)
        ]
    yield from in_step(model, calls)


def _predictions(model: torch.nn.Module, window: torch.Tensor) -> Predictions:
    """Return the predictions for `window` `[length]`. It may run in a thread of its own, and so may `_figures`."""
    with torch.no_grad(), float32_products(model):
        return Predictions(model, window[None])


def _figures(
    model: torch.nn.Module, dense: torch.nn.Module, window: torch.Tensor, read: Callable[[], Predictions]
) -> tuple[float, ...]:
    """Return the sums over the predicted tokens of a window: divergence, agreements, and the negative log-likelihoods of both."""
    own, other = _predictions(model, window), read()
    sums = [0.0, 0.0, 0.0, 0.0]
    for start in range(0, own.rows, LOGIT_ROWS):
        rows = slice(start, min(start + LOGIT_ROWS, own.rows))
        with torch.no_grad():
            with float32_products(model):
                logits = own.logits(rows).float()
            with float32_products(dense):
                wanted = other.logits(rows).float().to(logits.device)
            targets = window[1:][rows]
            agree = logits.argmax(-1) == wanted.argmax(-1)
            own_loss, dense_loss = loss_of(logits, targets), loss_of(wanted, targets)
            kl = F.kl_div(F.log_softmax(logits, -1), F.log_softmax(wanted, -1), reduction="none", log_target=True).sum(-1)
        parts = (float(kl.double().sum()), float(agree.sum()), own_loss, dense_loss)
        sums = [total + part for total, part in zip(sums, parts, strict=True)]
    return tuple(sums)
