from __future__ import annotations

import torch

from sparsekern.ops import feature_norm_, head_neuron_scores

from ..problem import Case, Place, Problem

GATHERED, PLAIN = "gather, square, sum", "plain torch"


def streamed(place: Place, tokens: int, hidden: int, features: int, head_size: int) -> Problem:
    """From masked tokens to scores, by `feature_norm_` and `head_neuron_scores`."""
    batches = place.randn(tokens, features).split(max(1, tokens // 8))
    masks = [place.rand(len(x)) > 0.2 for x in batches]
    weight = place.randn(hidden, features)

    def ours() -> torch.Tensor:
        sums = torch.zeros(features, device=place.device)
        for x, mask in zip(batches, masks, strict=True):
            feature_norm_(sums, x, row_mask=mask)
        return head_neuron_scores(sums, weight, head_size)

    def gathered(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """As the public code: the features of unmasked tokens are copied, squared, then added up."""
        sums = sum(x[mask].to(dtype).square().sum(0) for x, mask in zip(batches, masks, strict=True))
        return (sums * weight.to(dtype).square().mean(0)).view(-1, head_size).mean(1)

    def check(found: torch.Tensor) -> None:
        torch.testing.assert_close(found.double(), gathered(torch.float64), rtol=1e-5, atol=0)

    return Problem(
        calls=[ours],
        check=check,
        baselines={GATHERED: [gathered]},
        read=sum(x.nbytes for x in batches) + weight.nbytes,
    )


def scores(place: Place, rows: int, features: int, head_size: int) -> Problem:
    """From sums of squares to scores, by `head_neuron_scores` alone."""
    squares = place.randn(features).square()
    weights = [place.randn(rows, features, dtype=torch.bfloat16) for _ in place.copies(2 * rows * features)]

    def plain(weight: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return (squares.to(dtype) * weight.to(dtype).square().mean(0)).view(-1, head_size).mean(1)

    def check(found: torch.Tensor) -> None:
        torch.testing.assert_close(found.double(), plain(weights[0], torch.float64), rtol=1e-5, atol=0)

    return Problem(
        calls=[lambda w=w: head_neuron_scores(squares, w, head_size) for w in weights],
        check=check,
        baselines={PLAIN: [lambda w=w: plain(w) for w in weights]},
        read=weights[0].nbytes,
    )


CASES = [
    *(
        Case(
            f"head_neuron_scores [16384, {features}]",
            streamed,
            {"tokens": 16384, "hidden": 768, "features": features, "head_size": head_size},
            {"tokens": 64, "hidden": 48, "features": 2 * max(head_size, 16)},
            cpu={GATHERED: None},
            rounds=9,
        )
        for features, head_size in ((768, 64), (3072, 1))
    ),
    *(
        Case(
            f"head_neuron_scores [4096, {features}] bfloat16, {units}",
            scores,
            {"rows": 4096, "features": features, "head_size": head_size},
            {"rows": 64, "features": 2 * max(head_size, 16)},
            op="head_neuron_scores",
            cpu={PLAIN: None},
            cuda={PLAIN: None},
        )
        for features, head_size, units in ((11008, 1, "neurons"), (4096, 128, "heads of 128"))
    ),
]


def test_head_neuron_scores(timed, case):
    timed(case)
