"""Code shared by the products with packed experts, `bitmask_experts_linear` and `nm_experts_linear`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch.nn.functional import linear

from .._checks import HALF_OR_FLOAT, check_tensor
from ._torch_op import Gradients

WeightOf = Callable[[int], torch.Tensor]  # the dense weight of an expert, `[out_features, in_features]`


def check_choice(x: torch.Tensor, experts: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `x` is a matrix and `experts` names experts for each of its rows."""
    check_tensor("x", x, ndim=2, dtypes=HALF_OR_FLOAT)
    check_tensor("experts", experts, ndim=2, dtypes=(torch.int64,), shape=(x.shape[0], None), device=x.device)


def check_bias(bias: torch.Tensor | None, experts: int, rows: int, x: torch.Tensor) -> None:
    """Raise `TypeError` or `ValueError` unless `bias` is None or has a value for each row of each expert."""
    if bias is not None:
        check_tensor("bias", bias, ndim=2, dtypes=(x.dtype,), shape=(experts, rows), device=x.device)


def check_ids(experts: torch.Tensor, count: int) -> None:
    """Raise `ValueError` if an id names none of `count` experts."""
    wrong = (experts < 0) | (experts >= count)
    if wrong.any():
        raise ValueError(f"experts: expected ids from 0 to {count - 1}, got {int(experts[wrong][0])}")


def reference_product(
    x: torch.Tensor, experts: torch.Tensor, rows: int, weight_of: WeightOf, bias: torch.Tensor | None
) -> torch.Tensor:
    """Multiply each row of `x` by the weights of its experts, one expert after another: `[tokens, choices, rows]`."""
    y = x.new_empty((*experts.shape, rows))
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        added = None if bias is None else bias[expert].float()
        y[token, choice] = linear(x[token].float(), weight_of(expert).float(), added).to(x.dtype)
    return y


def gradients_of_experts(
    saved: tuple[str, ...], unpack: Callable[[Mapping[str, torch.Tensor], int, int], torch.Tensor]
) -> Gradients:
    """Return the gradients of a product with experts to `x` and `bias`.

    Args:
        saved: names of the packed tensors.
        unpack: `unpack(given, expert, in_features)` makes the weight of one expert from the saved tensors.
    """

    def formula(given, shapes, grad, wanted):
        experts = given["experts"]
        found = {}
        if "x" in wanted:
            columns = shapes["x"][1]
            found["x"] = _back(grad, experts, columns, lambda expert: unpack(given, expert, columns))
        if "bias" in wanted:
            found["bias"] = grad.new_zeros(shapes["bias"]).index_add(0, experts.flatten(), grad.flatten(0, 1))
        return found

    return Gradients(("x", "bias"), ("experts", *saved), formula)


def _back(grad: torch.Tensor, experts: torch.Tensor, columns: int, weight_of: WeightOf) -> torch.Tensor:
    """Return the gradient to `x`, one expert after another."""
    if type(experts) not in (torch.Tensor, torch.nn.Parameter) or experts.is_meta:
        raise RuntimeError(
            "a product with packed experts has no gradient in a compiled graph; differentiate it outside of torch.compile"
        )
    total = grad.new_zeros((len(grad), columns))
    for expert in experts.unique().tolist():
        token, choice = (experts == expert).nonzero(as_tuple=True)
        total = total.index_add(0, token, grad[token, choice] @ weight_of(expert))
    return total
