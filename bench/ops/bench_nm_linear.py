from __future__ import annotations

import pytest
import torch

from sparsekern.ops import nm_mask
from sparsekern.runtime.formats import NMPacked

from .bench_bitmask_linear import SHAPES, product_case


def nm_weight(shape: tuple[int, int], pattern: str, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    weight = torch.randn(shape, generator=generator)
    return (weight * nm_mask(weight.abs(), pattern)).to(dtype)


@SHAPES
@pytest.mark.parametrize("against, goal", [("F.linear bf16", 2.4), ("our dense bf16", None)])
def test_one_token(measure, generator, shape, against, goal):
    weight = nm_weight(shape, "2:4", torch.bfloat16, generator)
    product_case(measure, weight, NMPacked(2, 4), against, goal, 1, generator, "nm_linear 2:4")


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_one_token_of_other_patterns(measure, generator, pattern):
    n, m = map(int, pattern.split(":"))
    weight = nm_weight((4096, 4096), pattern, torch.bfloat16, generator)
    product_case(measure, weight, NMPacked(n, m), "F.linear bf16", None, 1, generator, f"nm_linear {pattern}")


@pytest.mark.parametrize("tokens", [4, 16, 64, 512])
def test_tokens(measure, generator, tokens):
    weight = nm_weight((4096, 4096), "2:4", torch.bfloat16, generator)
    product_case(measure, weight, NMPacked(2, 4), "F.linear bf16", 0.9, tokens, generator, "nm_linear 2:4")
