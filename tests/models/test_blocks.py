import pytest
import torch
from torch import nn

from sparsekern.models import find_blocks, find_linears
from tests.models.families import FAMILIES, tiny_model

LISTS = {"gpt2": "transformer.h", "bloom": "transformer.h", "falcon": "transformer.h", "opt": "model.decoder.layers"}
LISTS["gpt_neox"] = "gpt_neox.layers"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_every_family(family):
    blocks = find_blocks(tiny_model(family))
    assert blocks.name == LISTS.get(family, "model.layers")
    assert len(blocks.modules) == 3
    assert blocks.block_name(2) == f"{blocks.name}.2"


def test_the_stacks_are_the_outermost_lists_of_modules_with_linears():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    model = nn.Module()
    model.adapters = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    model.blocks = nn.ModuleList([Block(), nn.Identity()])
    model.norms = nn.ModuleList([nn.LayerNorm(1000), nn.LayerNorm(1000)])
    model.nested = nn.ModuleList([nn.ModuleList([Block()]), nn.ModuleList([nn.Identity()])])
    blocks = find_blocks(model)
    assert [(stack.name, len(stack.modules)) for stack in blocks.stacks] == [("blocks", 2), ("nested.0", 1)]
    assert blocks.names == ("blocks.0", "blocks.1", "nested.0.0")
    assert [len(find_linears(module)) for module in blocks.modules] == [4, 0, 4]


def test_without_such_a_list_a_sequence_or_a_list_of_linears_is_taken():
    model = nn.Module()
    model.projections = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    assert find_blocks(model).name == "projections"
    model.layers = nn.Sequential(nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8)))
    assert find_blocks(model).name == "layers"
    assert len(find_blocks(model).modules) == 2


def test_linears_read_as_rows_of_outputs():
    model = tiny_model("gpt2")
    found = {linear.name: linear for linear in find_linears(model.transformer.h[0], "transformer.h.0")}
    assert {name: tuple(linear.weight.shape) for name, linear in found.items()} == {
        "transformer.h.0.attn.c_attn": (96, 32),
        "transformer.h.0.attn.c_proj": (32, 32),
        "transformer.h.0.mlp.c_fc": (128, 32),
        "transformer.h.0.mlp.c_proj": (32, 128),
    }
    module = model.transformer.h[0].mlp.c_fc
    x = torch.randn(5, 32)
    linear = found["transformer.h.0.mlp.c_fc"]
    assert linear.features == 32
    torch.testing.assert_close(module(x), x @ linear.weight.T + module.bias)
    linear.weight[3, 7] = 42.0
    assert module.weight[7, 3] == 42.0


def test_modules_with_one_weight_are_one_linear():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["c"].weight = model["a"].weight
    assert [(linear.name, len(linear.modules)) for linear in find_linears(model)] == [("a", 2), ("b", 1)]


def test_quantised_weights_are_refused():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)})
    model["a"].weight = nn.Parameter(torch.zeros(8, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match=r"a: expected a float32, bfloat16 or float16 matrix, got uint8 \(8, 1\); prune before"):
        find_linears(model)


def test_double_precision_is_refused():
    with pytest.raises(ValueError, match="a: expected a float32, bfloat16 or float16 matrix, got float64"):
        find_linears(nn.ModuleDict({"a": nn.Linear(4, 4).double()}))


def test_weights_that_are_not_loaded_are_refused():
    with pytest.raises(ValueError, match="a: its weight is on the meta device"):
        find_linears(nn.ModuleDict({"a": nn.Linear(4, 4, device="meta")}))


def test_parametrised_weights_are_refused():
    model = nn.ModuleDict({"a": nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))})
    with pytest.raises(ValueError, match="a: its weight is computed from other tensors"):
        find_linears(model)
