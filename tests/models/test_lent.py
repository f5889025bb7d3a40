"""Weights that blocks borrow from others of their kind."""

import torch
from torch import nn

from sparsekern.models.lent import Lent


def block(width, value, kind=nn.Linear):
    made = nn.Sequential(kind(width, width), nn.BatchNorm1d(width))
    for tensor in (*made.parameters(), *made.buffers()):
        tensor.data.fill_(value)
    return made


class Other(nn.Linear):
    """Another class with the same tensors."""


def test_a_block_borrows_from_one_of_its_kind_alone():
    lent, empty = Lent(), block(4, 0)
    assert not lent.fill(empty)
    lent.keep(block(4, 3))
    assert lent.fill(empty)
    assert all((tensor == 3).all() for tensor in (*empty.parameters(), *empty.buffers()))
    assert not lent.fill(block(5, 0)) and not lent.fill(block(4, 0, Other)) and not lent.fill(block(4, 0).to(torch.bfloat16))


def test_two_kinds_are_kept_and_the_one_that_was_used_last_stays():
    lent = Lent()
    lent.keep(block(2, 1))
    lent.keep(block(3, 1))
    assert lent.fill(block(2, 0))
    lent.keep(block(4, 1))
    assert lent.fill(block(2, 0)) and lent.fill(block(4, 0)) and not lent.fill(block(3, 0))
