"""Blocks, linears and weights that a run cannot follow: each is refused by name, or stays dense and is said to."""

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import SparsekernWarning
from tests.pruning.test_bad_input import QUIET


class Toy(nn.Module):
    """Called like a transformers model, with a block list to misuse."""

    def __init__(self, blocks, order=None, between=None):
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.layers = nn.ModuleList(blocks)
        self.order = order or range(len(blocks))
        self.between = between or (lambda x: x)

    def forward(self, input_ids, use_cache=False):
        x = self.embed(input_ids)
        for index in self.order:
            x = self.between(self.layers[index](x))
        return x


class Block(nn.Module):
    def __init__(self, in_place=False):
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.in_place = in_place

    def forward(self, x):
        y = self.linear(x)
        return x.add_(y) if self.in_place else x + y


IDS = torch.arange(16).view(2, 8)


def test_a_block_that_is_not_run_stays_dense_and_it_is_said():
    model = Toy([Block(), Block()], order=[0])
    with pytest.warns(sparsekern.SparsekernWarning, match="layers.1: the calibration batches do not run this block"):
        report = sparsekern.prune(model, "wanda", calibration=IDS, **QUIET)
    assert [layer.name for layer in report.layers] == ["layers.0.linear"]


def test_a_block_that_runs_twice():
    with pytest.raises(
        ValueError, match=r"model: a forward runs layers.0 more than once \(2 times\), which block-by-block pruning cannot follow"
    ):
        sparsekern.prune(Toy([Block(), Block()], order=[0, 1, 0]), "wanda", calibration=IDS, **QUIET)


def test_a_tensor_that_travels_beside_the_arguments():
    class Writer(Block):
        def forward(self, x):
            self.shared[0] = x + self.linear(x)
            return self.shared[0]

    class Reader(Block):
        def forward(self, x):
            return x + self.linear(self.shared[0] * 2)

    blocks = [Writer(), Block(), Reader()]
    blocks[0].shared = blocks[2].shared = [None]
    with pytest.raises(ValueError, match="model: layers.2 reads a tensor that layers.0 made and that is not among"):
        sparsekern.prune(Toy(blocks, between=lambda x: x * 1), "wanda", calibration=IDS, **QUIET)


def test_a_block_that_overwrites_its_input():
    with pytest.raises(ValueError, match="layers.0 changes its input in place"):
        sparsekern.prune(Toy([Block(in_place=True), Block()]), "wanda", calibration=IDS, **QUIET)


def test_a_linear_s_input_overwritten_later():
    class Overwriting(Block):
        def __init__(self):
            super().__init__()
            self.other = nn.Linear(8, 8)

        def forward(self, x):
            y = x + 1
            z = self.linear(y)
            return x + z + self.other(y.mul_(2))

    with pytest.raises(ValueError, match="the input of layers.0.linear is overwritten after its use"):
        sparsekern.prune(Toy([Overwriting(), Overwriting()]), "wanda", calibration=IDS, **QUIET)


def test_one_block_twice():
    block = Block()
    with pytest.raises(ValueError, match="layers runs the same block more than once"):
        sparsekern.prune(Toy([block, block]), "wanda", calibration=IDS, **QUIET)


def test_one_weight_in_two_blocks():
    blocks = [Block(), Block()]
    blocks[1].linear.weight = blocks[0].linear.weight
    with pytest.raises(ValueError, match="shares its weight with a linear of another block"):
        sparsekern.prune(Toy(blocks), "wanda", calibration=IDS, **QUIET)


def test_a_linear_that_no_token_reaches():
    class Lazy(Block):
        def __init__(self):
            super().__init__()
            self.unused = nn.Linear(4, 4)

    model = Toy([Lazy(), Lazy()])
    dense = model.layers[1].unused.weight.clone()
    with pytest.raises(ValueError, match="unseen: no calibration token reached layers.0.unused; .* This block is unchanged"):
        sparsekern.prune(model, "wanda", calibration=IDS, unseen="error", **QUIET)
    with pytest.warns(
        SparsekernWarning, match="no calibration token reached layers.0.unused, layers.1.unused, which are pruned by magn"
    ):
        sparsekern.prune(model, "wanda", calibration=IDS, **QUIET)
    assert torch.equal(model.layers[1].unused.weight, sparsekern.Magnitude().solve(dense, None, sparsekern.NM(2, 4)).weight)


def test_two_devices():
    model = Toy([Block(), Block()])
    model.embed.weight = nn.Parameter(torch.empty(16, 8, device="meta"))
    with pytest.raises(ValueError, match="model: expected all weights on one device, got cpu, meta"):
        sparsekern.prune(model, "magnitude", **QUIET)


def test_stacked_matrices_stay_dense_and_it_is_said():
    class Stacked(Block):
        def __init__(self):
            super().__init__()
            self.heads = nn.Parameter(torch.randn(2, 8, 8))

    with pytest.warns(SparsekernWarning, match="layers.0.heads, layers.1.heads: parameters .* not linear layers stay dense"):
        sparsekern.prune(Toy([Stacked(), Stacked()]), "magnitude", **QUIET)


def test_experts_of_an_unknown_layout_are_refused_unless_include_names_the_rest():
    class Unknown(Block):
        def __init__(self):
            super().__init__()
            self.experts = nn.Parameter(torch.randn(2, 8, 8))

    model = Toy([Unknown(), Unknown()])
    dense = model.layers[0].linear.weight.clone()
    with pytest.raises(ValueError, match=r"model: layers.0 \(Unknown\) holds experts in a layout .* not know.* include names"):
        sparsekern.prune(model, "magnitude", **QUIET)
    assert torch.equal(model.layers[0].linear.weight, dense)
    with pytest.warns(SparsekernWarning, match="layers.0.experts, layers.1.experts: parameters .* stay dense"):
        sparsekern.prune(model, "magnitude", include="*.linear", **QUIET)
    assert (model.layers[0].linear.weight == 0).float().mean() == 0.5


def test_rows_that_cannot_be_told_from_padding():
    class Routed(Block):
        def forward(self, x):
            return x + self.linear(x.flatten(0, 1)[:5]).sum(0)

    class Masked(Toy):
        def forward(self, input_ids, attention_mask, use_cache=False):
            return super().forward(input_ids)

    batch = {"input_ids": IDS, "attention_mask": (IDS > 3).long()}
    with pytest.raises(ValueError, match=r"layers.0.linear: an input of shape \(5, 8\) in a padded batch of 1 x 8 tokens"):
        sparsekern.prune(Masked([Routed(), Routed()]), "wanda", calibration=[batch], **QUIET)
