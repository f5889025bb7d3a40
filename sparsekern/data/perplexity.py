"""Perplexity over non-overlapping windows, computed in chunks that keep the logits in memory small."""

from __future__ import annotations

import hashlib
import math
import os
import threading
from collections.abc import Iterator
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
from ..models.limits import check_count, check_length, check_token_ids, memory_limit, positions, vocabulary, window_length
from ..models.memory import forward_bytes, room_beside
from ..models.streaming import stream_of
from ..ranks import World, leaf_sizes
from .calibration import check_tokenizer, evaluation_ids, is_source

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WINDOW_COPIES = 4  # of the hidden states of a window that waits in front of a block: with its rotary table and what was made of it
LOGIT_ROWS = 256  # of logits at once: with a vocabulary of 150,000 in float32 they take 150 MB


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
        _check_model(model)
        length = window_length(model, length)
        windows = evaluation_windows(model, as_evaluation(ids, tokenizer, length), length)
        if world.size > 1:
            digest = hashlib.sha256(torch.stack(windows).cpu().numpy().tobytes()).hexdigest()
            world.check_alike({"ids": digest, "length": length})
        with evaluation_mode(model):
            together = windows_together(model, length, max_memory)
            own = _losses(model, windows, world, together or len(windows), progress=progress)
        losses = [loss for found in world.gather("perplexity", own) for loss in found]
    mean = reduce(add, losses) / (len(windows) * (length - 1))  # one after another, whoever computed them
    return math.exp(mean) if mean < 700 else math.inf


def windows_together(model: torch.nn.Module, length: int, max_memory: int | str | None, *, edited: bool = False) -> int | None:
    """Return how many windows go through a streamed model together within a limit; None where there is none.

    Args:
        model: the model.
        length: tokens in a window.
        max_memory: the limit.
        edited: blocks will be changed whenever they have been read.

    Raises:
        TypeError: `max_memory` is not a limit.
        ValueError: likewise, or the model is in memory, or one window does not fit.
    """
    if memory_limit(max_memory) is None or stream_of(model) is None:
        room_beside(model, max_memory)
        return None
    embeddings = cast("torch.Tensor", cast("PreTrainedModel", model).get_input_embeddings().weight)
    window = WINDOW_COPIES * length * embeddings.shape[1] * embeddings.element_size()
    logits = 2 * 4 * min(length, LOGIT_ROWS) * embeddings.shape[0]
    more = {"a window in a block": forward_bytes(model, length), "logits": logits, "the hidden states of a window": window}
    room = room_beside(model, max_memory, more, edited=edited)
    assert room is not None
    return 1 + room // window


def _losses(model: torch.nn.Module, windows: list[torch.Tensor], world: World, together: int, *, progress: bool) -> list[float]:
    """Return the losses of the windows of this process, which follow one another, some of them `together`."""
    counts = leaf_sizes(len(windows), world.size)
    begin = sum(counts[: world.rank])
    own = windows[begin : begin + counts[world.rank]]
    calls = [partial(_window_loss, model, window[None]) for window in own]
    losses = chain.from_iterable(in_step(model, calls[start : start + together]) for start in range(0, len(own), together))
    found: list[float] = []
    for loss in tqdm(losses, total=len(own), desc="perplexity", disable=not (progress and world.leads), leave=False):
        world.check()
        if not math.isfinite(loss):
            raise ValueError(f"perplexity: the model's output for window {begin + len(found)} holds NaN or Inf")
        found.append(loss)
    return found


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


def _check_model(model: torch.nn.Module) -> None:
    if not hasattr(model, "get_input_embeddings"):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}; sparsekern.load returns one")
    both = getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    if both or not getattr(model, "can_generate", lambda: True)():
        raise TypeError(f"model: expected a causal language model, got {type(model).__name__}, which predicts no next token")


def _windows(model: torch.nn.Module, ids: torch.Tensor, length: int) -> Iterator[torch.Tensor]:
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32) or ids.dim() not in (1, 2):
        got = f"{ids.dtype} {list(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"ids: expected an integer tensor [tokens] or [rows, tokens], got {got.removeprefix('torch.')}")
    _check_model(model)
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


def _window_loss(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Return the summed negative log-likelihood of `window` `[1, length]`. It may run in a thread of its own."""
    with torch.no_grad(), float32_products(model):
        return _loss_of(model, window)


def _loss_of(model: torch.nn.Module, window: torch.Tensor) -> float:
    """Return the summed negative log-likelihood of `window` `[1, length]`.

    The model runs with a head that sees the last position only, which keeps the logits small. Then the head's whole input is run
    through it in chunks. Some models change the logits after the head (soft-capping, scaling), which the chunks would miss. Their
    logits are computed all at once.
    """
    head = cast("PreTrainedModel", model).get_output_embeddings()
    window = window.to(cast("PreTrainedModel", model).device)
    targets = window[0, 1:]
    if head is None:
        return _loss(model(input_ids=window, use_cache=False).logits[0, :-1], targets)
    hidden: list[torch.Tensor] = []
    last: list[torch.Tensor] = []

    own = threading.get_ident()  # forwards of a streamed model take turns, and see each other's hooks

    def keep_last_position(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
        if threading.get_ident() != own:
            return None
        hidden.append(args[0])
        return (args[0][:, -1:], *args[1:])

    def keep_output(module: torch.nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if threading.get_ident() == own:
            last.append(output)

    hooks = [head.register_forward_pre_hook(keep_last_position), head.register_forward_hook(keep_output)]
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
