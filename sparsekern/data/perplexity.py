"""Perplexity over non-overlapping windows, computed in chunks that keep the logits in memory small."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial, reduce
from itertools import chain
from operator import add
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ..models.evaluation import evaluation_mode
from ..models.float32_products import float32_products
from ..models.in_step import in_step
from ..models.limits import (
    check_count,
    check_length,
    check_token_ids,
    memory_limit,
    positions,
    predicts_next_tokens,
    vocabulary,
    window_length,
)
from ..models.memory import forward_bytes, room_beside
from ..models.streaming import stream_of
from ..ranks import World, leaf_sizes
from .calibration import check_tokenizer, evaluation_ids, is_source
from .predictions import LOGIT_ROWS, Predictions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW_COPIES = 4  # of the hidden states of a window that waits in front of a block: with its rotary table and what was made of it


@torch.no_grad()
def perplexity(
    model: torch.nn.Module,
    ids: torch.Tensor | str | os.PathLike,
    length: int | None = None,
    *,
    tokenizer: Any = None,
    progress: bool = False,
    max_memory: int | str | None = None,
) -> float:
    """Return the perplexity of `model` on `ids`.

    It is `exp` of the mean negative log-likelihood of all tokens but the first of each window.

    Where a process group of `torch.distributed` is initialised, as under `torchrun`, its processes share the windows. All of them call this
    function with the same arguments, and get the same figure, which does not depend on their number.

    Args:
        model: a transformers causal language model. It runs in its own dtype; the likelihoods are computed in float32.
        ids: `[tokens]` or `[rows, tokens]` int64, or a text as `sparsekern.data.read_documents` takes it, such as `"wiki.txt"`. Each
            row is cut into its own windows; a remainder shorter than `length` is dropped. A built-in text is read from its held-out
            part. Each window of a text begins with the special tokens that the tokenizer puts in front of a text, such as BOS. The
            windows of a tensor are taken unchanged.
        length: tokens in a window. None is 2048, or the model's positions if they are fewer.
        tokenizer: the model's tokenizer, which a text needs.
        progress: show a progress bar.
        max_memory: the most memory that a streamed model may take, in bytes or as `"8GB"`. As many windows as fit go through its blocks
            together; the figure does not depend on it.

    Returns:
        The perplexity, or `inf` if it exceeds the range of a float.

    Raises:
        TypeError: `ids` is neither an integer tensor nor a text, or `model` is not a causal language model.
        ValueError: there are fewer tokens than one window needs, `length` exceeds the model's positions, an id is not in its
            vocabulary, a text comes without `tokenizer` or cannot be read, or the model's output holds NaN or Inf.
        FileNotFoundError: the text is a file that does not exist.

    Example:
        >>> value = sparsekern.perplexity(model, ids, length=16)
        >>> value > 1
        True
        >>> value = sparsekern.perplexity(model, "text.txt", length=16, tokenizer=tokenizer)

    Source: the protocol of the GPTQ and SparseGPT papers (raw text joined, windows of 2048).
    """
    world = World.current()
    with world.together():
        check_predicts("model", model)
        length = window_length(model, length)
        windows = evaluation_windows(model, as_evaluation(ids, tokenizer, length), length)
        with evaluation_mode(model):
            together = windows_together(model, length, max_memory) or len(windows)

            def find(own: Sequence[torch.Tensor]) -> Iterator[tuple[float, ...]]:
                calls = [partial(_window_loss, model, window[None]) for window in own]
                return chain.from_iterable(in_step(model, calls[at : at + together]) for at in range(0, len(own), together))

            losses = [loss for (loss,) in each_window("perplexity", windows, world, find, progress=progress)]
    return perplexity_of(mean_of(losses, len(windows), length))


def windows_together(
    model: torch.nn.Module,
    length: int,
    max_memory: int | str | None,
    *,
    edited: bool = False,
    beside: Mapping[str, int] | None = None,
    kept: int = 0,
) -> int | None:
    """Return how many windows go through a streamed model together within a limit; None where there is none.

    Args:
        model: the model.
        length: tokens in a window.
        max_memory: the limit.
        edited: blocks will be changed whenever they have been read.
        beside: bytes of what else is in memory, by what they are for.
        kept: bytes that are kept besides for each window.

    Raises:
        TypeError: `max_memory` is not a limit.
        ValueError: likewise, or the model is in memory, or one window does not fit.
    """
    if memory_limit(max_memory) is None or stream_of(model) is None:
        room_beside(model, max_memory)
        return None
    window = WINDOW_COPIES * hidden_bytes(model, length) + kept
    logits = 2 * 4 * min(length, LOGIT_ROWS) * _embeddings(model).shape[0]
    more = {"a window in a block": forward_bytes(model, length), "logits": logits, "the hidden states of a window": window}
    more |= beside or {}
    room = room_beside(model, max_memory, more, edited=edited)
    assert room is not None
    return 1 + room // window


def hidden_bytes(model: torch.nn.Module, length: int) -> int:
    """Return the bytes of the hidden states of a window."""
    return length * _embeddings(model).shape[1] * _embeddings(model).element_size()


def _embeddings(model: torch.nn.Module) -> torch.Tensor:
    return cast("torch.Tensor", cast("PreTrainedModel", model).get_input_embeddings().weight)


def each_window(
    what: str,
    windows: Sequence[torch.Tensor],
    world: World,
    find: Callable[[Sequence[torch.Tensor]], Iterator[tuple[float, ...]]],
    *,
    progress: bool,
) -> list[tuple[float, ...]]:
    """Return what is found for each window, in order, whichever process computed it.

    Args:
        what: what is found, for the progress bar and messages.
        windows: the windows, alike on all processes.
        world: the processes, which share them.
        find: yields figures for each of the windows that it is given, which are those of this process.
        progress: show a progress bar.

    Raises:
        ValueError: a figure is not finite; or processes have other windows.
    """
    if world.size > 1:
        digest = hashlib.sha256(torch.stack(list(windows)).cpu().numpy().tobytes()).hexdigest()
        world.check_alike({"ids": digest, "length": len(windows[0])})
    counts = leaf_sizes(len(windows), world.size)
    begin = sum(counts[: world.rank])
    own = windows[begin : begin + counts[world.rank]]
    found: list[tuple[float, ...]] = []
    for figures in tqdm(find(own), total=len(own), desc=what, disable=not (progress and world.leads), leave=False):
        world.check()
        if not all(map(math.isfinite, figures)):
            raise ValueError(f"{what}: the model's output for window {begin + len(found)} holds NaN or Inf")
        found.append(figures)
    return [figures for part in world.gather(what, found) for figures in part]


def mean_of(figures: Sequence[float], windows: int, length: int) -> float:
    """Return the mean over the predicted tokens of sums by window, which are added one after another."""
    return reduce(add, figures) / (windows * (length - 1))


def perplexity_of(mean: float) -> float:
    """Return the perplexity for a mean negative log-likelihood; `inf` beyond the range of a float."""
    return math.exp(mean) if mean < 700 else math.inf


def as_evaluation(ids: torch.Tensor | str | os.PathLike, tokenizer: Any, length: int) -> torch.Tensor:
    """Return the windows `[windows, length]` of a text, or a tensor unchanged.

    Raises:
        TypeError: `tokenizer` is not a tokenizer.
        ValueError: a text comes without `tokenizer`, or `evaluation_ids` refuses it.
    """
    if not is_source(ids):
        return ids
    if tokenizer is None:
        raise ValueError(f"tokenizer: expected the model's tokenizer to read ids={str(ids)!r} with, got None")
    check_tokenizer(tokenizer)
    return evaluation_ids(ids, tokenizer, length)


def evaluation_windows(model: torch.nn.Module, ids: torch.Tensor, length: int) -> list[torch.Tensor]:
    """Return the windows that `perplexity` cuts from a tensor.

    Raises:
        TypeError: `ids` is not an integer tensor, or `model` is not a causal language model.
        ValueError: as in `perplexity`.
    """
    return list(_windows(model, ids, length))


def check_predicts(argument: str, model: torch.nn.Module) -> None:
    """Raise `TypeError` unless the model of an argument is a causal language model of transformers."""
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"{argument}: expected a transformers model, got {type(model).__name__}; sparsekern.load returns one")
    if not predicts_next_tokens(model):
        raise TypeError(f"{argument}: expected a causal language model, got {type(model).__name__}, which predicts no next token")


def _windows(model: torch.nn.Module, ids: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected an integer tensor [tokens] or [rows, tokens], got {got.removeprefix('torch.')}")
    check_predicts("model", model)
    check_count("length", length)
    if length < 2:
        raise ValueError(f"length: expected at least 2, got {length}")
    check_length("length", length, positions(model))
    check_token_ids("ids", ids, vocabulary(model))
    rows = ids if ids.dim() == 2 else ids[None]
    if rows.shape[1] < length or not len(rows):
        got = f"{rows.shape[1]}" if ids.dim() == 1 else f"{len(rows)} rows of {rows.shape[1]}"
        raise ValueError(f"ids: one window of length {length} needs {length} tokens, got {got}")
    for row in rows:
        yield from row[: len(row) // length * length].view(-1, length)


def _window_loss(model: torch.nn.Module, window: torch.Tensor) -> tuple[float]:
    """Return the summed negative log-likelihood of `window` `[1, length]`. It may run in a thread of its own."""
    with torch.no_grad(), float32_products(model):
        found = Predictions(model, window)
        return (sum(loss_of(found.logits(rows), window[0, 1:][rows]) for rows in found.parts()),)


def loss_of(logits: torch.Tensor, targets: torch.Tensor) -> float:
    """Return the summed negative log-likelihood of `targets` `[tokens]` by `logits` `[tokens, vocabulary]`."""
    return F.cross_entropy(logits.float(), targets.to(logits.device), reduction="sum").item()
