from __future__ import annotations

import torch

from baselines.plain import plain_masked_adamw
from sparsekern.ops import masked_adamw_

from ..problem import Case, Place, Problem

TORCH = "torch's fused AdamW and mask multiplies"
LR = 1e-3


def step(place: Place, rows: int, columns: int, half: bool) -> Problem:
    """Both sides step on and on from the same state, on one gradient."""
    weight, grad = place.randn(rows, columns), place.randn(rows, columns)
    mask = place.rand(rows, columns) < 0.5
    start = weight * mask
    copy = torch.empty_like(weight, dtype=torch.bfloat16) if half else None
    ours, moments, steps = start.clone(), [torch.zeros_like(weight), torch.zeros_like(weight)], [0]
    theirs = torch.nn.Parameter(start.clone())
    theirs.grad = grad.clone()
    optimizer = torch.optim.AdamW([theirs], lr=LR, fused=True, weight_decay=0.1)

    def run() -> torch.Tensor:
        steps[0] += 1
        return masked_adamw_(ours, grad, *moments, step=steps[0], lr=LR, mask=mask, weight_decay=0.1, half=copy)

    def check(result: torch.Tensor) -> None:
        expected = torch.nn.Parameter(start.clone())
        expected.grad = grad.clone()
        own = torch.optim.AdamW([expected], lr=LR, weight_decay=0.1)
        for _ in range(steps[0]):
            plain_masked_adamw(own, expected, mask)
        torch.testing.assert_close(result, expected.detach(), rtol=1e-4, atol=1e-5)
        assert not result[~mask].any()

    element = weight.numel()
    return Problem(
        calls=[run],
        check=check,
        baselines={TORCH: [lambda: plain_masked_adamw(optimizer, theirs, mask, copy)]},
        read=17 * element,
        written=(14 if half else 12) * element,
        captured=False,
    )


CASES = [
    Case(
        f"masked_adamw_ {rows}x{columns}{', bfloat16 copy' if half else ''}",
        step,
        {"rows": rows, "columns": columns, "half": half},
        {"rows": 64, "columns": 96},
        op="masked_adamw_",
        cpu={TORCH: 3.0},
        cuda={TORCH: 3.0} if rows == 4096 else None,
    )
    for rows, columns, half in [(4096, 4096, False), (4096, 4096, True), (1536, 576, False)]
]


def test_masked_adamw(timed, case):
    timed(case)
