"""What distillation reads of a causal language model: hidden states in front of its head, or logits where the head is not the end."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import nn

from ..batches import Batch

PROBE_TOKENS = 8


class Reader:
    """The outputs of a model for the tokens of a batch.

    Attributes:
        head: the weight of the head, `[vocabulary, features]`, if logits are the products with it and nothing else; None otherwise.
    """

    def __init__(self, model: nn.Module, batch: Batch) -> None:
        """Look at what the model does behind its head, on the first tokens of `batch`."""
        self._model: Any = model
        module = cast("Any", model).get_output_embeddings()
        self.head: torch.Tensor | None = None
        self._module: nn.Module | None = None
        if type(module) is nn.Linear and module.bias is None:
            ids = batch.inputs["input_ids"][:1, :PROBE_TOKENS]
            hidden, last, logits = _run(model, module, {"input_ids": ids})
            if last is not None and torch.equal(last.to(logits.dtype), logits):
                self.head, self._module = module.weight, module

    def read(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states of the real tokens, `[tokens, features]`, or their logits where there is no plain head."""
        if self._module is None:
            found = self._model(**batch.inputs, use_cache=False).logits
        else:
            found, _, _ = _run(self._model, self._module, batch.inputs)
        mask = batch.mask()
        return found.flatten(0, 1) if mask is None else found[mask]


def _run(model: Any, head: nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]:
    """Return the input of the head, and its output and the model's logits for the last position, the only one that it computes."""
    hidden: list[torch.Tensor] = []
    last: list[torch.Tensor] = []

    def keep_last_position(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        hidden.append(args[0])
        return (args[0][:, -1:].detach(), *args[1:])

    def keep_output(module: nn.Module, args: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        last.append(output)

    hooks = [head.register_forward_pre_hook(keep_last_position), head.register_forward_hook(keep_output)]
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        for hook in hooks:
            hook.remove()
    return hidden[0], last[0] if len(last) == 1 else None, logits


def frozen_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of the embeddings and of the head."""
    modules = (cast("Any", model).get_input_embeddings(), cast("Any", model).get_output_embeddings())
    frozen = {parameter for module in modules if module is not None for parameter in module.parameters()}
    return frozen | {
        parameter for module in model.modules() if isinstance(module, nn.Embedding) for parameter in module.parameters()
    }


def dense_copy(model: nn.Module, pruned: Iterable[nn.Parameter] = ()) -> nn.Module:
    """Return a copy of a model that shares its embeddings and its head, unless they are `pruned`: no training changes them."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in frozen_parameters(model) - set(pruned)}
    return copy.deepcopy(model, memo)


def copied_bytes(model: nn.Module) -> int:
    """Return the bytes of weights that `dense_copy` makes."""
    frozen = frozen_parameters(model)
    return sum(parameter.nbytes for parameter in model.parameters() if parameter not in frozen)
