from __future__ import annotations

import pytest
import torch

from sparsekern import backends
from sparsekern.backends import table
from sparsekern.backends.masked_lstsq import AsyncScalar

ARGUMENTS = (torch.zeros(2, 8), torch.eye(8), torch.ones(2, 8, dtype=torch.bool))


def reference() -> None:
    raise AssertionError("it is to be chosen, not called")


def test_factorisations_are_the_references(monkeypatch):
    monkeypatch.setitem(table.AVAILABILITY, "triton", lambda: backends.Support(True))
    (triton,) = backends.implementations("masked_lstsq")
    for solver, chosen in (("auto", triton.run), ("cg", triton.run), ("cholesky", reference)):
        assert backends.choose("masked_lstsq", reference, ARGUMENTS, {"solver": solver}) is chosen
    with (
        backends.use(masked_lstsq="triton"),
        pytest.raises(ValueError, match="masked_lstsq: the triton implementation was requested, but solver is 'cholesky', which"),
    ):
        backends.choose("masked_lstsq", reference, ARGUMENTS, {"solver": "cholesky"})


def test_a_number_on_its_way_is_what_it_was_when_it_left():
    number = torch.tensor(3, dtype=torch.int32)
    sent = AsyncScalar(number)
    number.fill_(4)
    assert sent.value() == 3 and AsyncScalar(number).value() == 4
