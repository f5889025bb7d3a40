"""Products of float32 in ops and methods run in full float32 on a GPU, whatever the user allows outside."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import sparsekern
from sparsekern import ALPS, COPAL, NM, Unstructured
from sparsekern.backends import use
from sparsekern.methods.existing_zeros import sweep_keeping_zeros
from sparsekern.methods.statistics import GramImportance
from sparsekern.ops import OPS

from ..tiny import llama

PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "linalg_solve_triangular", "cholesky_solve"}


class Watch(TorchDispatchMode):
    """Notes which products of float32 would be rounded to TF32 on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.products: list[tuple[str, bool]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2].rstrip("_")
        if name in PRODUCTS and args[0].dtype == torch.float32:
            self.products.append((name, torch.backends.cuda.matmul.fp32_precision != "ieee"))
        return func(*args, **kwargs or {})

    @property
    def rounded(self) -> list[str]:
        return [name for name, rounds in self.products if rounds]


@pytest.fixture(autouse=True)
def tf32():
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    torch.backends.cuda.matmul.fp32_precision = before


def test_a_product_that_would_be_rounded_is_noticed():
    with Watch() as watch:
        torch.ones(2, 2) @ torch.ones(2, 2)
    assert watch.rounded == ["mm"]


SOLVING = ("cross_gram_", "gram_inverse", "gram_solve", "masked_lstsq", "obs_sweep")


@pytest.mark.parametrize("op", SOLVING)
def test_references(op, generator):
    call = next(iter(OPS[op].samples(generator)))
    with Watch() as watch, use(**{op: "reference"}):
        OPS[op].overload(*call.args, **call.kwargs)
    assert watch.products and not watch.rounded


def zeros_kept(layer):
    weight = layer.weight.clone()
    weight[:, ::3] = 0
    factor = sparsekern.ops.reverse_cholesky(layer.statistics().gram, 0.01)
    sweep_keeping_zeros(weight, factor, Unstructured(0.5), scope="block", block_size=16)


METHODS = {
    "alps": lambda layer: ALPS(max_iterations=3).solve(layer.weight, layer.statistics(), NM(2, 4)),
    "copal": lambda layer: COPAL(form="gram").solve(layer.weight, GramImportance(layer.weight, layer.statistics()), NM(2, 4)),
    "statistics": lambda layer: layer.statistics().solve(layer.weight, 0.01),
    "existing zeros": zeros_kept,
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("method", METHODS)
def test_methods(layer, method):
    with Watch() as watch:
        METHODS[method](layer)
    assert watch.products and not watch.rounded


def test_feed_forward_networks(monkeypatch):
    watch = Watch()
    solve = sparsekern.SparseLLM.solve_feed_forward

    def watched(self, problem):
        with watch:
            return solve(self, problem)

    monkeypatch.setattr(sparsekern.SparseLLM, "solve_feed_forward", watched)
    sparsekern.prune(
        llama(num_hidden_layers=1), sparsekern.SparseLLM(iterations=2), "2:4", torch.randint(0, 64, (2, 64)), progress=False
    )
    assert watch.products and not watch.rounded
