from __future__ import annotations

import pytest
import torch

from sparsekern.ops import feature_norm_, head_neuron_scores

TOKENS, HIDDEN = 16384, 768


def streamed(batches, masks, weight: torch.Tensor, head_size: int) -> torch.Tensor:
    sums = torch.zeros(weight.shape[1])
    for x, mask in zip(batches, masks, strict=True):
        feature_norm_(sums, x, row_mask=mask)
    return head_neuron_scores(sums, weight, head_size)


def gathered(batches, masks, weight: torch.Tensor, head_size: int) -> torch.Tensor:
    """As the public code goes about it: the features of real tokens are copied, squared, then added up."""
    sums = sum(x[mask].square().sum(0) for x, mask in zip(batches, masks, strict=True))
    return (sums * weight.square().mean(0)).view(-1, head_size).mean(1)


@pytest.mark.parametrize(("features", "head_size"), [(768, 64), (3072, 1)], ids=["heads", "neurons"])
def test_head_neuron_scores(measure, generator, features, head_size):
    batches = torch.randn(TOKENS, features, generator=generator).split(2048)
    masks = [torch.rand(len(x), generator=generator) > 0.2 for x in batches]
    weight = torch.randn(HIDDEN, features, generator=generator)
    expected = gathered([x.double() for x in batches], masks, weight.double(), head_size)
    torch.testing.assert_close(streamed(batches, masks, weight, head_size).double(), expected, rtol=1e-5, atol=0)
    measure(
        lambda: streamed(batches, masks, weight, head_size),
        against=lambda: gathered(batches, masks, weight, head_size),
        baseline="gather, square, sum",
        group=f"head_neuron_scores [{TOKENS}, {features}]",
        bytes=sum(x.nbytes for x in batches) + weight.nbytes,
        rounds=9,
    )
