from __future__ import annotations

import pytest
import torch

from sparsekern.ops.cross_gram import reference
from sparsekern.triton_kernels.cross_gram import cross_gram_


@pytest.mark.parametrize(("p", "q"), [(264, 130), (40, 520), (261, 64)])
@pytest.mark.parametrize(
    ("dtype", "masked"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_whole_waves_and_splits(few_multiprocessors, p, q, dtype, masked):
    x, y = torch.randn(150, p).to(dtype), torch.randn(150, q).to(dtype)
    options = {"row_mask": torch.arange(150) % 5 > 0 if masked else None, "alpha": -0.5}
    cross = torch.randn(p, q)
    expected = cross.clone()
    cross_gram_(cross, x, y, **options)
    reference(expected, x, y, **options)
    torch.testing.assert_close(cross, expected, rtol=1e-5, atol=2e-4)


def test_one_operand_that_the_copy_engine_cannot_read():
    x, y = torch.randn(70, 64).bfloat16(), torch.randn(70, 33).bfloat16()
    cross, expected = torch.zeros(64, 33), torch.zeros(64, 33)
    cross_gram_(cross, x, y)
    reference(expected, x, y)
    torch.testing.assert_close(cross, expected, rtol=1e-5, atol=1e-4)


def test_a_direct_call_does_not_leave_its_memory():
    for shapes, message in [
        (((3, 3), (2, 3), (2, 4)), r"y: expected shape \(2, 3\)"),
        (((4, 3), (2, 3), (2, 3)), r"x: expected shape \(2, 4\)"),
        (((3, 3), (5, 3), (2, 3)), r"x: expected shape \(2, 3\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            torch.ops.sparsekern.cross_gram_(*map(torch.zeros, shapes))
