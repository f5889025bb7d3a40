"""The tokens of the rows that experts with linears of their own are called with.

Such experts get the rows that are routed to them, whose shape does not tell which are padding. So where a batch has padding, the module
that calls the experts is watched: beside each tensor whose rows are tokens goes a tensor of the same shape that holds the number of
each row's token, and what is done to the one is done to the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ...models.gates import listed_experts

aten = torch.ops.aten
MOVES = {  # what only moves, copies or picks entries of its first argument
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default,
    aten.index.Tensor, aten.index_select.default, aten.slice.Tensor, aten.select.int, aten.permute.default, aten.transpose.int,
    aten.t.default, aten.clone.default, aten.alias.default, aten.detach.default, aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
    aten.unbind.int, aten.gather.default,
}  # fmt: skip


class TokenRows(TorchDispatchMode):
    """Follows the tokens of rows through the operations within."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # id -> (the tensor itself, kept alive; its tokens)

    def begin(self, x: torch.Tensor) -> None:
        """Take a tensor `[..., features]` whose rows are the tokens of a batch, in their order."""
        self._known[id(x)] = x, torch.arange(x.shape[:-1].numel(), device=x.device).view(*x.shape[:-1], 1).expand(x.shape)

    def forget(self) -> None:
        """Forget all tensors."""
        self._known.clear()

    def of(self, x: torch.Tensor) -> torch.Tensor | None:
        """Return the number of each row's token, `[rows]`; None where it is not known."""
        found = self._known.get(id(x))
        return None if found is None or not x.shape[-1] else found[1][..., 0].flatten()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor) and id(args[0]) in self._known and func in MOVES:
            moved = self._known[id(args[0])][1]
            moved = moved.reshape(args[1]) if func in (aten.view.default, aten._unsafe_view.default) else func(moved, *args[1:])
            pairs = zip(output, moved, strict=True) if isinstance(output, (list, tuple)) else [(output, moved)]
            self._known |= {id(made): (made, tokens) for made, tokens in pairs}
        elif isinstance(output, torch.Tensor) and output.dim() > 1 and func not in MOVES:
            self._inherit(output, [value for value in args if isinstance(value, torch.Tensor) and id(value) in self._known])
        return output

    def _inherit(self, output: torch.Tensor, sources: list[torch.Tensor]) -> None:
        """Give the rows of a result the tokens of the rows that it was made from, one by one."""
        tokens = [self._known[id(source)][1] for source in sources if source.shape[:-1] == output.shape[:-1] and source.dim() > 1]
        if tokens and all(torch.equal(other[..., 0], tokens[0][..., 0]) for other in tokens[1:]):
            self._known[id(output)] = output, tokens[0][..., :1].expand(output.shape)


@contextmanager
def followed(owners: Iterable[nn.Module], tokens: int | None = None) -> Iterator[Callable[[torch.Tensor], torch.Tensor | None]]:
    """Follow the tokens of rows within, from each call of `owners` on.

    Args:
        owners: the modules that hand rows to experts. Each is called with the rows of all tokens.
        tokens: the number of tokens; None takes the rows of the first tensor of a call.

    Yields:
        A function from the input of an expert's linear to the number of each row's token, `[rows]`; to None where it is not known.
    """
    rows = TokenRows()
    hidden: list[torch.Tensor] = []

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        rows.forget()
        hidden[:] = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)][:1]
        if hidden and tokens in (None, hidden[0].shape[:-1].numel()):
            rows.begin(hidden[0])

    def of(x: torch.Tensor) -> torch.Tensor | None:
        found = rows.of(x)
        if found is None or x.shape[-1] != hidden[0].shape[-1]:
            return found
        given = hidden[0].reshape(-1, x.shape[-1])[found]
        return found if torch.equal(given, x.reshape(given.shape)) else None

    with ExitStack() as stack:
        for owner in set(owners):
            stack.callback(owner.register_forward_pre_hook(begin, with_kwargs=True).remove)
        stack.enter_context(rows)
        yield of


def unknown_tokens() -> str:
    """Return the message for rows of an expert that may be padding."""
    return (
        "the rows that this expert is called with do not tell which are padding; calibrate with samples of one length, or leave it out "
        "with exclude"
    )


def owners_of(blocks: Iterable[tuple[str, nn.Module]], names: Iterable[str]) -> dict[str, nn.Module]:
    """Return for each linear of `names` that is an expert's the module that holds its list of experts, which calls them.

    Args:
        blocks: names and modules of blocks.
        names: names of linears.
    """
    found: dict[str, nn.Module] = {}
    names = list(names)
    for prefix, block in blocks:
        for experts in listed_experts(block, prefix):
            owner = block.get_submodule(experts.rpartition(".")[0].removeprefix(prefix).removeprefix("."))
            found |= {name: owner for name in names if name.startswith(f"{experts}.")}
    return found
