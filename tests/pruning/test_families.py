"""Every family through the whole pipeline, against the slow and obvious way."""

import copy

import pytest
import torch

import sparsekern
from sparsekern.models import find_blocks, find_linears
from tests.models.families import FAMILIES, tiny_ids, tiny_model
from tests.pruning.oracle import oracle_sparsegpt

DEAD = "ignore:.*never active in calibration:sparsekern.SparsekernWarning"  # OPT's ReLU has features that a few tokens never wake


def block_weights(model) -> dict[str, torch.Tensor]:
    return {linear.name: linear.weight for linear in find_linears(model)}


def assert_same_pruning(model, expected, masks) -> None:
    found, expected = block_weights(model), block_weights(expected)
    for name, mask in masks.items():
        assert torch.equal(found[name] != 0, mask & (expected[name] != 0)), name
        torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=2e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.filterwarnings(DEAD)
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_obvious_way(family):
    model, ids = tiny_model(family), tiny_ids()
    expected = copy.deepcopy(model)
    masks = oracle_sparsegpt(expected, [{"input_ids": sample[None]} for sample in ids], find_blocks(model).name, "2:4")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sparsekern.prune(model, "sparsegpt", "2:4", ids, batch_size=3, progress=False)
    assert {layer.name for layer in report.layers} == set(masks)
    assert_same_pruning(model, expected, masks)
    # Nothing but the weights of those linears has moved.
    pruned = {f"{name}.weight" for name in masks}
    for name, value in model.state_dict().items():
        assert name in pruned or torch.equal(value, before[name]), name
    assert report.sparsity == pytest.approx(0.5, abs=0.02 if family == "opt" else 1e-9)
    assert all(0 < layer.error < 0.3 for layer in report.layers)
    assert model(ids[:2]).logits.isfinite().all()


@pytest.mark.filterwarnings(DEAD)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family, side):
    """Padded batches give what the samples give one by one, without padding."""
    model = tiny_model(family)
    samples = [sample[:length] for sample, length in zip(tiny_ids(12), 2 * (16, 9, 12, 16, 5, 14), strict=True)]
    expected = copy.deepcopy(model)
    alone = [{"input_ids": sample[None]} for sample in samples]
    masks = oracle_sparsegpt(expected, alone, find_blocks(model).name, "2:4")
    batches = [padded_batch(samples[:5], side), padded_batch(samples[5:], side)]
    report = sparsekern.prune(model, "sparsegpt", "2:4", batches, progress=False)
    assert report.calibration_tokens == sum(map(len, samples))
    assert_same_pruning(model, expected, masks)


def padded_batch(samples, side: str) -> dict[str, torch.Tensor]:
    length = max(map(len, samples))
    ids, mask = torch.zeros(len(samples), length, dtype=torch.long), torch.zeros(len(samples), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    for row, sample in enumerate(samples):
        where = slice(length - len(sample), None) if side == "left" else slice(0, len(sample))
        ids[row, where], mask[row, where] = sample, 1
        positions[row, where] = torch.arange(len(sample))
    return {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
