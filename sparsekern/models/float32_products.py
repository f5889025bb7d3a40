"""Products of many tokens in float32, where the CPU has no arithmetic for the dtype of the model.

PyTorch multiplies bfloat16 and float16 on such a CPU at a fifth to an eighth of its rate in float32. A float32 copy of the operands
costs 10 bytes a weight, and is made again for each product, a part of the weight at a time.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

VARIABLE = "SPARSEKERN_FLOAT32_PRODUCTS"
LEAST_ROWS = 16  # of the left operand; a copy of the weight costs more than it saves for fewer
LEAST_WEIGHTS = 2**14  # of the right operand; smaller products are left alone
COPIED_WEIGHTS = 2**24  # of a weight in float32 at once, 64 MiB
ARITHMETIC = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("avx512_fp16", "amx_fp16")}
logger = logging.getLogger("sparsekern")


@contextmanager
def float32_products(model: nn.Module | None = None) -> Iterator[None]:
    """Multiply many tokens in float32 within, in this thread, where the CPU has no arithmetic for their dtype.

    Sums are in float32 either way; the operands are exact, and results are rounded to the dtype once. Only products on a CPU without
    gradients are changed. The logger `sparsekern` says once that there was one. `SPARSEKERN_FLOAT32_PRODUCTS=0` changes nothing.

    Args:
        model: the model that runs within; nothing is changed for one without weights in bfloat16 or float16. None is any.

    Raises:
        ValueError: `SPARSEKERN_FLOAT32_PRODUCTS` is neither `0` nor `1`.
    """
    halves = model is None or any(parameter.dtype in ARITHMETIC for parameter in model.parameters())
    if not switched_on() or not halves:
        yield
        return
    with _Float32Products():
        yield


def switched_on() -> bool:
    """Return the value of `SPARSEKERN_FLOAT32_PRODUCTS`.

    Raises:
        ValueError: it is neither `0` nor `1`.
    """
    value = os.environ.get(VARIABLE, "1")
    if value not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def lacks_arithmetic(dtype: torch.dtype) -> bool:
    """Return whether this is an x86 CPU without instructions that multiply `dtype`. Of other CPUs it is not known."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    features = ARITHMETIC.get(dtype)
    if features is None or capabilities.get("architecture") != "x86_64":
        return False
    return not any(capabilities.get(feature) for feature in features)


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    rows, step = x.float(), max(1, COPIED_WEIGHTS // max(1, weight.shape[1]))
    if len(weight) <= step:
        return F.linear(rows, weight.float(), None if bias is None else bias.float()).to(x.dtype)
    found = x.new_empty((*x.shape[:-1], len(weight)))
    for begin in range(0, len(weight), step):
        part = slice(begin, begin + step)
        found[..., part] = F.linear(rows, weight[part].float(), None if bias is None else bias[part].float())
    return found


def _addmm(
    input: torch.Tensor, mat1: torch.Tensor, mat2: torch.Tensor, *, beta: float = 1, alpha: float = 1, out: None = None
) -> torch.Tensor:
    return torch.addmm(input.float(), mat1.float(), mat2.float(), beta=beta, alpha=alpha).to(mat1.dtype)


def _matmul(input: torch.Tensor, other: torch.Tensor, *, out: None = None) -> torch.Tensor:
    return torch.matmul(input.float(), other.float()).to(input.dtype)


# A product: the function in float32, and the places of the operands
PRODUCTS: Mapping[Callable[..., torch.Tensor], tuple[Callable[..., torch.Tensor], int]] = {
    F.linear: (_linear, 0),
    torch.addmm: (_addmm, 1),
    **dict.fromkeys((torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm), (_matmul, 0)),
}


class _Float32Products(TorchFunctionMode):
    """Replaces products of many tokens. Within its own work it is inactive."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        product = PRODUCTS.get(func)
        if product is not None and _gains(func, args[product[1] :], kwargs):
            _say(args[product[1]].dtype)
            return product[0](*args, **kwargs)
        return func(*args, **kwargs)


def _gains(func: Callable[..., Any], operands: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a product of two operands is faster in float32. Operands that are given by keyword are left to torch."""
    if len(operands) < 2 or kwargs.get("out") is not None or torch.is_grad_enabled():
        return False
    left, right = operands[:2]
    if left.dtype not in ARITHMETIC or right.dtype != left.dtype or not left.is_cpu or not lacks_arithmetic(left.dtype):
        return False
    if left.dim() < 2 or right.dim() < 2 or right.numel() < LEAST_WEIGHTS:
        return False
    rows = left.shape[-2] if left.dim() == right.dim() else left.numel() // max(1, left.shape[-1])
    return rows >= LEAST_ROWS


@functools.cache
def _say(dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    logger.warning(
        "this CPU has no %s arithmetic: products of many tokens run in float32, and are rounded to %s (%s=0 leaves them to PyTorch)",
        name, name, VARIABLE,
    )  # fmt: skip
