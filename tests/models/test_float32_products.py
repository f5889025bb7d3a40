"""Products of many tokens in float32, on CPUs without arithmetic for the model's dtype."""

from __future__ import annotations

import logging

import pytest
import torch
import torch.nn.functional as F

import sparsekern
from sparsekern.models import float32_products as module
from sparsekern.models.float32_products import float32_products, lacks_arithmetic, switched_on

from .. import tiny
from ..golden.cases import decoder
from .test_experts import tiny_mixture

HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def a_cpu_without_arithmetic(monkeypatch):
    monkeypatch.setattr(module, "lacks_arithmetic", lambda dtype: True)
    monkeypatch.setattr(module, "LEAST_WEIGHTS", 1)
    monkeypatch.delenv(module.VARIABLE, raising=False)


@pytest.fixture
def multiplied(monkeypatch):
    """The shapes of the left operands that were multiplied in float32."""
    shapes = []

    def counting(product):
        def multiply(*args, **kwargs):
            shapes.append(tuple(args[1 if product is module._addmm else 0].shape))
            return product(*args, **kwargs)

        return multiply

    monkeypatch.setattr(
        module, "PRODUCTS", {func: (counting(product), place) for func, (product, place) in module.PRODUCTS.items()}
    )
    return shapes


def operands(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator).to(dtype) for shape in shapes]


def assert_rounded_once(found: torch.Tensor, exact: torch.Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("copied", [2**24, 130, 1])
@pytest.mark.parametrize("dtype", HALVES)
def test_a_linear_is_rounded_once(dtype, copied, monkeypatch, multiplied):
    monkeypatch.setattr(module, "COPIED_WEIGHTS", copied)
    x, weight, bias = operands(dtype, (2, 16, 65), (7, 65), (7,))
    with float32_products():
        plain, biased = F.linear(x, weight), F.linear(x, weight, bias)
    assert_rounded_once(plain, x.double() @ weight.double().T, dtype)
    assert_rounded_once(biased, x.double() @ weight.double().T + bias.double(), dtype)
    assert multiplied == [(2, 16, 65)] * 2


@torch.no_grad()
@pytest.mark.parametrize("dtype", HALVES)
def test_other_products_are_rounded_once(dtype, multiplied):
    a, b, c = operands(dtype, (16, 24), (24, 8), (8,))
    many, others = operands(dtype, (3, 16, 24), (3, 24, 8))
    with float32_products():
        assert_rounded_once(torch.addmm(c, a, b, beta=0.5, alpha=2), 0.5 * c.double() + 2 * (a.double() @ b.double()), dtype)
        for found in (a @ b, a.matmul(b), torch.matmul(a, b)):
            assert_rounded_once(found, a.double() @ b.double(), dtype)
        for found in (torch.bmm(many, others), many.bmm(others), many @ others):
            assert_rounded_once(found, many.double() @ others.double(), dtype)
    assert len(multiplied) == 7


@torch.no_grad()
def test_products_that_would_gain_nothing_are_left_alone(monkeypatch, multiplied):
    x, weight = operands(torch.bfloat16, (16, 24), (8, 24))
    with float32_products():
        F.linear(x[:15], weight)
        F.linear(x[0], weight)
        F.linear(x.float(), weight.float())
        F.linear(input=x, weight=weight)
        torch.matmul(x, weight.T, out=x.new_empty(16, 8))
        with torch.enable_grad():
            F.linear(x, weight.requires_grad_())
        weight.requires_grad_(False)
        monkeypatch.setattr(module, "LEAST_WEIGHTS", weight.numel() + 1)
        F.linear(x, weight)
        monkeypatch.setattr(module, "LEAST_WEIGHTS", weight.numel())
        monkeypatch.setattr(module, "lacks_arithmetic", lambda dtype: dtype == torch.float16)
        F.linear(x, weight)
        assert not multiplied
        F.linear(x.half(), weight.half())
    assert multiplied == [(16, 24)]
    F.linear(x.half(), weight.half())
    assert len(multiplied) == 1  # outside of the context


@torch.no_grad()
def test_the_switch(monkeypatch, multiplied):
    x, weight = operands(torch.bfloat16, (16, 24), (8, 24))
    monkeypatch.setenv(module.VARIABLE, "0")
    with float32_products():
        F.linear(x, weight)
    assert not multiplied and not switched_on()
    monkeypatch.setenv(module.VARIABLE, "yes")
    with pytest.raises(ValueError, match="SPARSEKERN_FLOAT32_PRODUCTS: expected 0 or 1, got 'yes'"):
        sparsekern.prune(tiny.llama(96), "wanda", "2:4", torch.zeros(1, 8, dtype=torch.long), progress=False)


@torch.no_grad()
def test_a_model_without_half_weights_runs_as_ever(multiplied):
    x, weight = operands(torch.bfloat16, (16, 24), (8, 24))
    with float32_products(torch.nn.Linear(2, 2)):
        F.linear(x, weight)
    assert not multiplied
    with float32_products(torch.nn.Linear(2, 2).bfloat16()):
        F.linear(x, weight)
    assert len(multiplied) == 1


@torch.no_grad()
def test_it_is_said_once(caplog):
    module._say.cache_clear()
    x, weight = operands(torch.bfloat16, (16, 24), (8, 24))
    with caplog.at_level(logging.WARNING, "sparsekern"), float32_products():
        F.linear(x, weight)
        F.linear(x, weight)
    (record,) = caplog.records
    assert "no bfloat16 arithmetic" in record.getMessage() and module.VARIABLE in record.getMessage()


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, True),
        ({"architecture": "x86_64", "avx512_bf16": True}, False),
        ({"architecture": "x86_64", "amx_bf16": True}, False),
        ({"architecture": "aarch64"}, False),
        ({}, False),
    ],
)
def test_which_cpus_lack_arithmetic(capabilities, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert lacks_arithmetic.__wrapped__(torch.bfloat16) is expected
    assert lacks_arithmetic.__wrapped__(torch.float32) is False


@pytest.mark.parametrize("make", [lambda: decoder("llama"), lambda: decoder("gpt2"), lambda: tiny_mixture("qwen3_moe")])
def test_pruning_and_perplexity_multiply_in_float32_and_nothing_else_changes(make, monkeypatch, multiplied):
    ids = torch.randint(3, 90, (4, 32), generator=torch.Generator().manual_seed(0))
    found = {}
    for value in ("0", "1"):
        monkeypatch.setenv(module.VARIABLE, value)
        model = make().bfloat16()
        report = sparsekern.prune(model, "wanda", "2:4", ids, progress=False)
        pruned_in_float32 = len(multiplied)
        found[value] = report, sparsekern.perplexity(model, ids, length=32)
        assert (pruned_in_float32 > 0) == (len(multiplied) > pruned_in_float32) == (value == "1")
    (plain, value), (fast, other) = found["0"], found["1"]
    assert [(layer.name, layer.zeros) for layer in plain.layers] == [(layer.name, layer.zeros) for layer in fast.layers]
    assert other == pytest.approx(value, rel=0.05)
