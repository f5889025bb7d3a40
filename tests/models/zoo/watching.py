"""What each weight of a model is multiplied by, seen from the multiplications themselves.

Neither hooks nor names are used, so this is independent of how pruning finds linears and their inputs, and sees what it may have missed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.overrides import TorchFunctionMode

PRODUCTS = {
    torch.nn.functional.linear: "rows",
    torch.addmm: "transposed",
    torch.baddbmm: "transposed",
    torch.matmul: "transposed",
    torch.Tensor.matmul: "transposed",
    torch.Tensor.__matmul__: "transposed",
    torch.mm: "transposed",
    torch.bmm: "transposed",
    torch.Tensor.mm: "transposed",
    torch.Tensor.bmm: "transposed",
}
GROUPED = [getattr(owner, name, None) for owner, name in ((torch, "_grouped_mm"), (torch.nn.functional, "grouped_mm"))]
UNREADABLE = (torch.einsum, *GROUPED)  # no family may use them unnoticed


@dataclass
class Seen:
    """The inputs of one matrix.

    Attributes:
        squares: `[features]` float64, the sum of each feature's squares over all rows.
        rows: the number of rows, zero ones among them.
        transposed: True if the matrix is stored `[in_features, out_features]`.
    """

    squares: torch.Tensor
    rows: int
    transposed: bool


class Watch(TorchFunctionMode):
    """Watches the multiplications by parameters of `model` within.

    Attributes:
        seen: by the name of a parameter and the number of an expert (0 for a plain matrix), its inputs.
        read: the parameters of two dimensions that were multiplied from the left, as no linear does.
    """

    def __init__(self, model: torch.nn.Module, prefix: str = "") -> None:
        """Watch the parameters whose names begin with `prefix`."""
        super().__init__()
        self._parameters = {name: value for name, value in model.named_parameters() if name.startswith(prefix)}
        self._names = {value.untyped_storage().data_ptr(): name for name, value in self._parameters.items()}
        self.seen: dict[tuple[str, int], Seen] = {}
        self.read: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in PRODUCTS:
            with torch._C.DisableTorchFunctionSubclass():
                self._look(function, args, kwargs or {})
        elif function in UNREADABLE and any(self._name(value) for value in args):
            raise NotImplementedError(f"{function.__name__} multiplies by a parameter, which nobody watches")
        return function(*args, **(kwargs or {}))

    def _look(self, function, args, kwargs) -> None:
        transposed = PRODUCTS[function] == "transposed"
        first = 1 if function in (torch.addmm, torch.baddbmm) else 0
        x, weight = args[first], args[first + 1] if len(args) > first + 1 else kwargs["weight"]
        if (left := self._name(x)) is not None and self._parameters[left].dim() == 2:
            self.read.add(left)
        if (name := self._name(weight)) is None:
            return
        if weight.dim() == 3:  # one matrix of each expert, by the rows of each expert
            for expert, rows in enumerate(x.unbind(0)):
                self._add(name, expert, rows, transposed)
        elif weight.dim() == 2:
            transposed ^= weight.stride(0) == 1 != weight.stride(1)  # a view of the parameter the other way round
            self._add(name, weight.storage_offset() // weight.numel(), x, transposed)

    def _name(self, x: object) -> str | None:
        return self._names.get(x.untyped_storage().data_ptr()) if isinstance(x, torch.Tensor) else None

    def _add(self, name: str, expert: int, x: torch.Tensor, transposed: bool) -> None:
        rows = x.detach().double().reshape(-1, x.shape[-1])
        found = self.seen.setdefault((name, expert), Seen(rows.new_zeros(rows.shape[1]), 0, transposed))
        found.squares += rows.square().sum(0)
        found.rows += len(rows)
