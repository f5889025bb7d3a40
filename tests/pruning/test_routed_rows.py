"""Padding among the rows that experts with linears of their own are called with."""

import copy

import pytest
import torch
from torch import nn

import sparsekern
from tests.models.zoo import ZOO
from tests.models.zoo.checks import tensors

pytestmark = pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")
WIDTH, COUNT = 8, 3


def boolean(x, chosen, expert):
    return chosen == expert, x[chosen == expert]


def numbers(x, chosen, expert):
    rows = (chosen == expert).nonzero().flatten()
    return rows, x[None, rows].reshape(-1, WIDTH)


def selected(x, chosen, expert):
    rows = (chosen == expert).nonzero().flatten()
    return rows, x.index_select(0, rows)


def sorted_by_expert(x, chosen, expert):
    order = chosen.argsort(stable=True)
    sizes = torch.bincount(chosen, minlength=COUNT).tolist()
    return order.split(sizes)[expert], x[order].split(sizes)[expert]


def scaled(x, chosen, expert):
    return chosen == expert, x[chosen == expert] * 0.5


class Mixed(nn.Module):
    """Experts of two linears, for the rows that `pick` gives them."""

    def __init__(self, pick):
        super().__init__()
        self.pick, self.router = pick, nn.Linear(WIDTH, COUNT)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Linear(16, WIDTH)) for _ in range(COUNT))

    def forward(self, hidden):
        x = hidden.view(-1, WIDTH)
        chosen, out = self.router(x).argmax(1), x.clone()
        for number, expert in enumerate(self.experts):
            rows, own = self.pick(x, chosen, number)
            out[rows] += expert(own)
        return out.view_as(hidden)


class Model(nn.Module):
    def __init__(self, pick):
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, WIDTH), nn.ModuleList([Mixed(pick), Mixed(pick)])

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


def padded_batch():
    """Three samples, padded on the left and on the right, and the same without padding."""
    ids = torch.randint(0, 32, (3, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :9], mask[2, 15:] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}, [
        {"input_ids": row[real.bool()][None]} for row, real in zip(ids, mask, strict=True)
    ]


def made(pick):
    torch.manual_seed(0)
    return Model(pick)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pick", [boolean, numbers, selected, sorted_by_expert])
def test_padding_is_left_out(pick, method):
    batch, samples = padded_batch()
    found, expected = made(pick), made(pick)
    sparsekern.prune(found, method, "2:4", [batch], progress=False)
    sparsekern.prune(expected, method, "2:4", samples, progress=False)
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)
    with_padding = made(pick)
    sparsekern.prune(with_padding, method, "2:4", [{"input_ids": batch["input_ids"]}], progress=False)
    assert any(not torch.equal(a == 0, b == 0) for a, b in zip(found.parameters(), with_padding.parameters(), strict=True))


@pytest.mark.parametrize("pick", [boolean, numbers, selected, sorted_by_expert])
def test_an_expert_that_is_called_without_a_row(pick):
    batch, samples = padded_batch()
    found, expected = made(pick), made(pick)
    for model in (found, expected):
        model.layers[0].router.bias.data[1] = -100
    sparsekern.prune(found, "wanda", "2:4", [batch], progress=False)
    sparsekern.prune(expected, "wanda", "2:4", samples, progress=False)
    for (name, ours), theirs in zip(found.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_that_are_changed_on_the_way_are_refused_before_any_work():
    batch, samples = padded_batch()
    model = made(scaled)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"experts.0.0: the rows that this expert is called with do not tell which are padding"):
        sparsekern.prune(model, "wanda", "2:4", [batch], progress=False)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sparsekern.prune(model, "wanda", "2:4", samples, progress=False)


def test_a_streamed_model_prunes_experts_that_no_token_reached(tmp_path):
    """Reading and releasing their block is no use of their weights: they are pruned by magnitude, as in memory."""
    family = ZOO["nllb_moe"]
    family.model().save_pretrained(tmp_path / "dense")
    found = []
    for stream in (False, True):
        model = sparsekern.load(tmp_path / "dense", device="cpu", stream=stream)
        out = tmp_path / str(stream)
        sparsekern.prune(model, "wanda", "2:4", calibration=family.calibration(), out=out, progress=False)
        found.append(tensors(out))
    resident, streamed = found
    assert resident.keys() == streamed.keys()
    for name, value in resident.items():
        assert torch.equal(streamed[name], value), name
