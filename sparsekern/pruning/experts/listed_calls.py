"""The calls of experts that are modules of their own: their tokens, their outputs and the weights that scale these.

Such experts are called one by one with the rows that are routed to them. Which tokens these rows are is followed through the module that
calls the experts. A routing weight is how much the output of that module changes with an expert's: the gradient of a sum of the one by
the other. Where the outputs are scaled and added, it is the same for all features of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ...models.listed_experts import ListedExperts
from ..blockwise.routed_rows import followed
from ..values import replaced, tensors_in

CLOSE = 0.01  # relative difference between the features of a routing weight that is taken for rounding


@dataclass(frozen=True, eq=False)
class ListedCall:
    """One call of the module that calls listed experts.

    Attributes:
        tokens: the number of tokens.
        rows: for each expert, the token of each of its rows.
        weights: for each expert, the routing weight of each of its rows.
        outputs: for each expert, its outputs `[rows, hidden]`, before the routing weights scale them.
    """

    tokens: int
    rows: list[torch.Tensor]
    weights: list[torch.Tensor]
    outputs: list[torch.Tensor]

    def by_expert(self, count: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return for each of the `count` experts the tokens that are routed to it, and their routing weights."""
        return list(zip(self.rows, self.weights, strict=True))


@contextmanager
def watched_lists(found: Iterable[ListedExperts], visit: Callable[[ListedExperts, ListedCall], object]) -> Iterator[None]:
    """Call `visit` with every call of these experts within, after their module has run.

    Raises:
        ValueError: the tokens of an expert's rows cannot be told, one goes to an expert twice, or more is done with the outputs of
            experts than to scale and add them.
    """
    found = list(found)
    with ExitStack() as stack:
        tokens_of = stack.enter_context(followed(experts.owner for experts in found)) if found else None
        for experts in found:
            assert tokens_of is not None
            stack.enter_context(_watched(experts, tokens_of, visit))
        yield


@contextmanager
def _watched(
    experts: ListedExperts,
    tokens_of: Callable[[torch.Tensor], torch.Tensor | None],
    visit: Callable[[ListedExperts, ListedCall], object],
) -> Iterator[None]:
    owner: Any = experts.owner
    forward = owner.forward
    taken: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by expert: the tokens of its rows, and its outputs

    def after(number: int) -> Callable[..., torch.Tensor]:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: object) -> torch.Tensor:
            (x, *_) = tensors_in((args, kwargs))
            tokens = tokens_of(x)
            if tokens is None or not isinstance(output, torch.Tensor):
                raise ValueError(
                    f"model: which tokens expert {number} of {experts.name} is called with cannot be told, so it has no score"
                )
            if number in taken or len(tokens.unique()) != len(tokens):
                raise ValueError(
                    f"model: {experts.name} hands a token to expert {number} more than once, so its router does not choose among its experts"
                )
            taken[number] = tokens, output.detach().requires_grad_()
            return taken[number][1]

        return hook

    def run(*args: Any, **kwargs: Any) -> Any:
        taken.clear()
        with torch.enable_grad():
            output = forward(*args, **kwargs)
        call = _call(experts, tensors_in((args, kwargs))[0], taken, tensors_in(output)[0])
        taken.clear()
        visit(experts, call)
        return replaced(output, torch.Tensor, torch.Tensor.detach)

    with ExitStack() as stack:
        for number, module in enumerate(experts.members.values()):
            stack.callback(module.register_forward_hook(after(number), with_kwargs=True).remove)
        before = vars(owner).get("forward")
        owner.forward = run
        stack.callback(_restore, owner, before)
        yield


def _restore(owner: Any, forward: Any) -> None:
    del owner.forward
    if forward is not None:
        owner.forward = forward


def _call(
    experts: ListedExperts, hidden: torch.Tensor, taken: dict[int, tuple[torch.Tensor, torch.Tensor]], output: torch.Tensor
) -> ListedCall:
    """Return the call whose experts had these tokens and outputs, and whose module returned `output`."""
    used = [outputs for _, outputs in taken.values()]
    found = torch.autograd.grad(output, used, torch.ones_like(output), allow_unused=True) if used else ()
    gradients = dict(zip(taken, found, strict=True))
    nothing = hidden.new_zeros(0)
    call = ListedCall(hidden.shape[:-1].numel(), [], [], [])
    for number in range(experts.count):
        if number not in taken:
            call.rows.append(nothing.long())
            call.weights.append(nothing)
            call.outputs.append(nothing.view(0, hidden.shape[-1]))
            continue
        tokens, outputs = taken[number]
        gradient = gradients[number]
        features = torch.zeros_like(outputs) if gradient is None else gradient
        features = features.reshape(-1, outputs.shape[-1])
        weights = features[:, 0]
        if float((features - weights[:, None]).norm()) > CLOSE * float(features.norm()):
            raise ValueError(
                f"model: more is done with the outputs of {experts.name} than to scale and add them, so they have no scores"
            )
        call.rows.append(tokens)
        call.weights.append(weights)
        call.outputs.append(outputs.detach().reshape(features.shape))
    return call
