"""What a causal language model predicts for a window of tokens, a few rows of logits at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LOGIT_ROWS = 256  # of logits at once: with a vocabulary of 150,000 in float32 they take 150 MB


class Predictions:
    """The logits of a model for all tokens of a window but the last.

    The model runs with a head that sees the last position only, which keeps the logits small. The head's whole input is kept, and run
    through it in parts. Some models change the logits after the head (soft-capping, scaling), which the parts would miss. Their logits
    are computed, and kept, all at once.

    Attributes:
        rows: the number of tokens.
    """

    def __init__(self, model: torch.nn.Module, window: torch.Tensor) -> None:
        """Run a model.

        Args:
            model: a causal language model.
            window: `[1, length]` token ids.
        """
        window = window.to(cast("PreTrainedModel", model).device)
        self.rows = window.shape[1] - 1
        self._head: torch.nn.Module | None = cast("PreTrainedModel", model).get_output_embeddings()
        hidden = None if self._head is None else _before(model, self._head, window)
        if hidden is None:
            self._head, hidden = None, model(input_ids=window, use_cache=False).logits
        self._kept = hidden[0, :-1]

    def parts(self) -> Iterator[slice]:
        """Yield the rows whose logits are computed together: a few, or all of them where they are kept."""
        step = LOGIT_ROWS if self._head is not None else self.rows
        yield from (slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step))

    def logits(self, rows: slice) -> torch.Tensor:
        """Return the logits of some rows, `[rows, vocabulary]`."""
        kept = self._kept[rows]
        return kept if self._head is None else self._head(kept)


def _before(model: torch.nn.Module, head: torch.nn.Module, window: torch.Tensor) -> torch.Tensor | None:
    """Return the input of the head, `[1, length, features]`; None where logits are more than what the head returns."""
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
    return hidden[0] if last and torch.equal(last[0].to(logits.dtype), logits) else None
