"""`cusparselt_linear` without a GPU: where it is refused, and how its composition of torch's calls pads tokens and keeps algorithms.

The C++ kernel runs in tests/native/test_cusparselt_plans.py, packed layers that use the op in tests/runtime/test_compression.py.
"""

import pytest
import torch

from sparsekern import ops
from sparsekern.ops._registry import OPS
from tests.ops.test_contracts import has_kernel


@pytest.fixture
def composition(monkeypatch):
    """The composition on the CPU with stand-ins for torch's calls, and the shapes that they were called with."""
    reference = OPS["cusparselt_linear"].reference
    scope, products, searches = reference.__globals__, [], []

    def product(compressed, dense, *, bias, transpose_result, alg_id, split_k, split_k_mode):
        products.append((tuple(dense.shape), alg_id))
        result = compressed @ dense + (0 if bias is None else bias[:, None])
        return result.t() if transpose_result else result

    class Library:
        @staticmethod
        def mm_search(compressed, dense, bias, alpha, out_dtype, transpose_result):
            searches.append(tuple(dense.shape))
            return 7, 2, 1, 0

    monkeypatch.setattr(torch, "_cslt_sparse_mm", product)
    monkeypatch.setattr(torch._C, "_cusparselt", Library, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setitem(scope, "_algorithms", {})
    return reference, products, searches


@pytest.mark.parametrize("tokens", [1, 8, 13])
@pytest.mark.parametrize("biased", [False, True])
def test_tokens_are_padded_to_a_multiple_of_eight(composition, generator, tokens, biased):
    multiply, products, _ = composition
    x, weight = torch.randn(tokens, 16, generator=generator), torch.randn(32, 16, generator=generator)
    bias = torch.randn(32, generator=generator) if biased else None
    found = multiply(x, weight, 32, bias)
    torch.testing.assert_close(found, torch.nn.functional.linear(x, weight, bias))
    ((shape, algorithm),) = products
    assert shape == (16, -(-tokens // 8) * 8) and algorithm == 7


def test_numbers_of_tokens_up_to_a_power_of_two_share_a_search(composition, generator):
    multiply, _, searches = composition
    weight = torch.randn(32, 16, generator=generator)
    for tokens in (9, 12, 16, 17, 10):
        multiply(torch.randn(tokens, 16, generator=generator), weight, 32)
    assert searches == [(16, 16), (16, 24)]


def test_no_tokens_make_no_call(composition):
    multiply, products, _ = composition
    assert multiply(torch.zeros(0, 16), torch.zeros(32, 16), 32).shape == (0, 32) and not products


def test_tensors_on_two_devices_are_refused(composition):
    multiply, products, _ = composition
    with pytest.raises(ValueError, match="x: expected a tensor on meta, as the compressed weight, got one on cpu"):
        multiply(torch.zeros(8, 16), torch.zeros(32, 16, device="meta"), 32)
    assert not products


def test_it_is_refused_on_other_devices():
    if not has_kernel(OPS["cusparselt_linear"]):  # --kernels=cuda has one on the CPU
        with pytest.raises(NotImplementedError, match="Could not run 'sparsekern::cusparselt_linear' .*'CPU' backend"):
            ops.cusparselt_linear(torch.zeros(2, 8), torch.zeros(72), 8)


def test_the_shape_of_its_result():
    fake = ops.cusparselt_linear(torch.zeros(2, 8, device="meta"), torch.zeros(72, device="meta"), 16)
    assert fake.shape == (2, 16) and fake.is_meta
