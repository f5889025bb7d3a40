from __future__ import annotations

import pytest
import torch

from sparsekern.ops import admm_step_

CASES = [(4096, 4096, 0.5, "matrix"), (4096, 4096, 0.5, "row"), (4096, 4096, "2:4", "matrix"), (1536, 576, 0.5, "matrix")]


def plain(offset: torch.Tensor, dual: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor, pattern, scope: str) -> torch.Tensor:
    """The step as torch has it: `kthvalue` for the threshold, a top-k for groups of four."""
    z = weight + offset + dual
    size = z.abs()
    if pattern == "2:4":
        groups = size.view(-1, 4)
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(1, groups.topk(2, dim=1).indices, True).view_as(z)
    elif scope == "row":
        kept = size > torch.kthvalue(size, int(pattern * z.shape[1]), dim=1, keepdim=True).values
    else:
        kept = size > torch.kthvalue(size.flatten(), int(pattern * z.numel())).values
    projected = z * kept
    dual.copy_(z - projected)
    offset.copy_(projected - dual - weight)
    changed = (kept != mask).sum()
    mask.copy_(kept)
    return changed


@pytest.mark.parametrize(("rows", "columns", "pattern", "scope"), CASES)
def test_step(measure, generator, rows, columns, pattern, scope):
    offset, dual, weight = (torch.randn(rows, columns, generator=generator) for _ in range(3))
    mask = torch.rand(rows, columns, generator=generator) < 0.5
    ours, theirs = [[t.clone() for t in (offset, dual, mask)] for _ in range(2)]
    admm_step_(*ours, weight, pattern, scope=scope)
    plain(*theirs, weight, pattern, scope)
    same = ours[2] == theirs[2]
    assert int((~same).sum()) <= rows  # `kthvalue` drops all that equal the threshold
    for got, want in zip(ours, theirs, strict=True):
        assert torch.equal(got[same], want[same])
    measure(
        lambda: admm_step_(*ours, weight, pattern, scope=scope),
        against=lambda: plain(*theirs, weight, pattern, scope),
        baseline="plain torch",
        goal=1.5,
        group=f"admm_step_ {rows}x{columns} {pattern} {scope}",
        bytes=26 * weight.numel(),
    )
