"""Checks for shared memory. A kernel that writes to one tensor while it reads another would read its own results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeGuard

import torch


def check_memory(given: Mapping[str, object], written: Sequence[str]) -> None:
    """Raise `ValueError` if a tensor that is written to shares memory with another argument, or within itself."""
    tensors = {name: value for name, value in given.items() if _has_memory(value)}
    spans = {name: _span(tensor) for name, tensor in tensors.items()}
    for name in written:
        if name not in spans:
            continue
        tensor, (begin, end) = tensors[name], spans[name]
        if _overlaps_itself(tensor):
            raise ValueError(f"{name}: expected elements that do not overlap, got strides {tensor.stride()}")
        for other, (other_begin, other_end) in spans.items():
            if other != name and begin < other_end and other_begin < end and shares_memory(tensor, tensors[other]):
                raise ValueError(f"{name}, {other}: expected tensors that share no memory, since {name} is written to")


def shares_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return whether an element of one tensor shares a byte with an element of the other."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    if a.device != b.device or a_end <= b_begin or b_end <= a_begin:
        return False
    if _is_dense(a) and _is_dense(b):
        return True
    first, last = min(a_begin, b_begin), max(a_end, b_end)
    unit = math.gcd(a.element_size(), b.element_size(), a_begin - first, b_begin - first)
    taken = torch.zeros((last - first) // unit, dtype=torch.bool, device="cpu")
    taken[_places(a, first, unit)] = True
    return bool(taken[_places(b, first, unit)].any())


def _overlaps_itself(tensor: torch.Tensor) -> bool:
    if tensor.is_contiguous():
        return False
    begin, end = _span(tensor)
    if tensor.numel() * tensor.element_size() > end - begin:
        return True
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    reach = 0
    for stride, size in sizes:
        if stride <= reach:  # may overlap elements within reach of the smaller strides: count them
            unit = tensor.element_size()
            return len(_places(tensor, begin, unit).unique()) < tensor.numel()
        reach += stride * (size - 1)
    return False


def _has_memory(value: object) -> TypeGuard[torch.Tensor]:
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, torch.nn.Parameter):  # traced ones are subclasses
        return False
    if value.layout != torch.strided or value.is_meta or torch._is_functional_tensor(value):
        return False
    return value.numel() > 0


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first address of a tensor and the end of its last element."""
    begin = tensor.data_ptr()
    if tensor.is_contiguous():
        return begin, begin + tensor.nbytes
    reach = sum(s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True))
    return begin, begin + (reach + 1) * tensor.element_size()


def _is_dense(tensor: torch.Tensor) -> bool:
    begin, end = _span(tensor)
    return tensor.numel() * tensor.element_size() == end - begin


def _places(tensor: torch.Tensor, first: int, unit: int) -> torch.Tensor:
    """Return the indices of all units of memory that the elements occupy, counted from the address `first`."""
    size = tensor.element_size()
    places = torch.arange(size // unit, device="cpu") + (tensor.data_ptr() - first) // unit
    for stride, count in zip(tensor.stride(), tensor.shape, strict=True):
        if stride:  # a repeated axis occupies no more memory
            places = (places[:, None] + torch.arange(count, device="cpu") * (stride * size // unit)).flatten()
    return places
