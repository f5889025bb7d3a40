"""Float32 products from bfloat16 pieces: which products are, and their error where tensor cores cut off what float32 rounds."""

from __future__ import annotations

import sys
import types

import pytest
import torch

from sparsekern.backends import products
from sparsekern.backends.devices import YES, Support


def split_in_three(x: torch.Tensor, dim: int, *, rising: bool = False) -> torch.Tensor:
    high = x.bfloat16()
    middle = (x - high).bfloat16()
    pieces = [high, middle, (x - high - middle).bfloat16()]
    return torch.cat(pieces[::-1] if rising else pieces, dim)


def cut_off(x: torch.Tensor) -> torch.Tensor:
    """Return the float32 next to each number, towards zero."""
    near = x.float()
    return torch.where(near.abs() > x.abs(), near.nextafter(torch.zeros(())), near).double()


class TensorCores:
    """The products of 16-bit matrices on a GPU, whose tensor cores add `step` products to a sum at once."""

    def __init__(self, step: int) -> None:
        self.step = step

    def add(self, out: torch.Tensor, left: torch.Tensor, right: torch.Tensor, begins: bool) -> None:
        assert left.dtype == right.dtype == torch.bfloat16
        sums = torch.zeros(out.shape, dtype=torch.float64)
        for begin in range(0, left.shape[-1], self.step):
            part = slice(begin, begin + self.step)
            sums = cut_off(sums + left[..., part].double() @ right[..., part, :].double())
        out.copy_(sums + (0 if begins else out.double()))


def one_by_one(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return the product as a GPU computes it without tensor cores: each element is a chain of multiply-adds."""
    sums = torch.zeros(len(left), right.shape[1])
    for k in range(left.shape[1]):
        sums = (sums.double() + left[:, k : k + 1].double() * right[k].double()).float()
    return sums


@pytest.fixture
def pieces(monkeypatch):
    monkeypatch.setitem(sys.modules, "sparsekern.triton_kernels.pieces", types.SimpleNamespace(split_in_three=split_in_three))
    monkeypatch.setattr(products, "has_pieces", lambda *args: True)
    monkeypatch.setattr(products, "_add_bf16", TensorCores(16).add)


@pytest.mark.parametrize("step", [8, 16])  # of Ampere's tensor cores, and of Hopper's
@pytest.mark.parametrize("draw", ["randn", "rand"])
def test_the_error_is_that_of_float32(pieces, monkeypatch, generator, draw, step):
    left, right = (getattr(torch, draw)(shape, generator=generator) for shape in ((12, 2048), (2048, 12)))
    exact = left.double() @ right.double()
    monkeypatch.setattr(products, "_add_bf16", TensorCores(step).add)

    def error(chain: int) -> float:
        monkeypatch.setattr(products, "CHAIN", chain)
        out = torch.full((12, 12), float("nan"))
        products.add_product(out, left, right, begins=True)
        return float((out - exact).norm() / exact.norm())

    theirs = float((one_by_one(left, right) - exact).norm() / exact.norm())
    assert error(products.CHAIN) <= 2 * theirs < error(2048)


@pytest.mark.parametrize("begins", [False, True])
@pytest.mark.parametrize("batch", [(), (3,)])
def test_pieces_are_added_to_what_is_there(pieces, generator, begins, batch):
    left, right = torch.randn(*batch, 5, 700, generator=generator), torch.randn(*batch, 700, 4, generator=generator)
    out = torch.full((*batch, 5, 4), float("nan") if begins else 1.0)
    products.add_product(out, left, right, begins)
    torch.testing.assert_close(out, (left.double() @ right.double()).float() + (0 if begins else 1), rtol=1e-5, atol=1e-5)


class OnDevice(types.SimpleNamespace):
    is_cuda, device = True, "cuda"


def test_large_products_on_a_gpu_have_pieces(monkeypatch):
    monkeypatch.setattr(products, "has_capability", lambda device, least: YES)
    monkeypatch.setattr(products, "has_triton", lambda: YES)
    large, small = OnDevice(shape=(4096, 2048)), OnDevice(shape=(4096, 1024))
    assert products.has_pieces(large, 1024) and not products.has_pieces(small, 1024)
    assert products.has_pieces(OnDevice(shape=(64, 4096, 2048)), 1024)
    assert not products.has_pieces(OnDevice(shape=(64, 4096, 1024)), 1024)
    assert not products.has_pieces(torch.empty(4096, 2048, device="meta"), 1024)
    assert not products.has_pieces(OnDevice(shape=(8192, 2052)), 1024) and not products.has_pieces(large, 2052)
    assert products.has_pieces(OnDevice(shape=(8191, 2048)), 1024)
    for missing in ("has_triton", "has_capability"):
        with monkeypatch.context() as patch:
            patch.setattr(products, missing, lambda *args: Support(False, "it is too old"))
            assert not products.has_pieces(large, 1024)


def test_nothing_is_rounded_to_tf32(pieces, monkeypatch):
    matmul, seen = torch.backends.cuda.matmul, []
    monkeypatch.setattr(products, "_add_bf16", lambda *args: seen.append(matmul.fp32_precision))
    before = matmul.fp32_precision
    with products.full_float32():
        products.add_product(torch.zeros(2, 2), torch.ones(2, 3), torch.ones(3, 2), begins=True)
    products.add_product(torch.zeros(2, 2), torch.ones(2, 3), torch.ones(3, 2), begins=True)
    assert seen == ["ieee"] * 3 + [before] * 3 and matmul.fp32_precision == before


@pytest.mark.parametrize(("op", "batch"), [("addmm", ()), ("baddbmm", (3,))])
def test_torch_is_asked_for_sums_in_float32(monkeypatch, op, batch):
    """It has no such product on a CPU."""
    asked = []
    schema = getattr(torch.ops.aten, op).dtype_out._schema
    monkeypatch.setattr(torch, op, lambda *args, **options: asked.append((args, options)))
    out, left = torch.zeros(*batch, 2, 2), torch.ones(*batch, 2, 3, dtype=torch.bfloat16)
    products._add_bf16(out, left, left.mT, begins=True)
    products._add_bf16(out, left, left.mT, begins=False)
    for (args, options), beta in zip(asked, (0.0, 1.0), strict=True):
        assert args[0] is options["out"] is out and args[1] is left and args[2].shape == (*batch, 3, 2)
        assert options["out_dtype"] == torch.float32 and options["beta"] == beta
        assert set(options) <= {argument.name for argument in schema.arguments}


def test_tf32_is_off_inside_and_as_it_was_afterwards():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        for allowed in ("tf32", "ieee"):
            matmul.fp32_precision = allowed
            with pytest.raises(KeyError), products.full_float32():
                assert matmul.fp32_precision == "ieee"
                raise KeyError
            assert matmul.fp32_precision == allowed
    finally:
        matmul.fp32_precision = before
