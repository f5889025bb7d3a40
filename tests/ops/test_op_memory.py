"""Ops on tensors that share memory, on other layouts, and on shapes that no memory holds."""

from __future__ import annotations

import pytest
import torch

from sparsekern import ops
from sparsekern.backends.libraries import LIBRARIES
from sparsekern.layouts.packed_rows import pack_bitmask_rows, pack_nm_rows
from sparsekern.ops._memory import shares_memory

from .calls import EVERY_WRITING_OP, first_sample, named, written


@EVERY_WRITING_OP
@pytest.mark.parametrize("inference", [False, True])
def test_arguments_that_share_memory_with_what_is_written_are_refused_by_name(op, inference):
    wrapper = getattr(ops, op.name)
    with torch.inference_mode(inference):
        given = named(op, first_sample(op, 1))
        tried = 0
        for target in written(op, given):
            for other, value in given.items():
                if other == target or not isinstance(value, torch.Tensor) or not given[target].is_floating_point():
                    continue
                fresh = named(op, first_sample(op, 1))
                memory = torch.zeros(fresh[target].nbytes + fresh[other].nbytes, dtype=torch.uint8)
                fresh[target] = place_in(memory, 0, fresh[target])
                begin = fresh[target].nbytes - 4  # one element in common
                fresh[other] = place_in(memory, begin, fresh[other])
                message = f"^({target}, {other}|{other}, {target}): expected tensors that share no memory"
                if not inference:
                    with pytest.raises(ValueError, match=message):
                        op.overload(**fresh)
                if op.friendly:
                    fresh = {k: v for k, v in fresh.items() if k not in op.friendly["pattern"]} | {"pattern": "2:4"}
                with pytest.raises(ValueError, match=message):
                    wrapper(**fresh)
                tried += 1
        assert tried or len(given) == 1


def place_in(memory: torch.Tensor, begin: int, like: torch.Tensor) -> torch.Tensor:
    return memory[begin : begin + like.nbytes].view(like.dtype).view(like.shape).copy_(like)


def test_what_is_written_to_has_a_place_for_each_element():
    for gram in (torch.zeros(1).expand(4, 4), torch.zeros(7).as_strided((4, 4), (1, 1))):
        with pytest.raises(ValueError, match="^gram: expected elements that do not overlap, got strides"):
            ops.gram_(gram, torch.randn(3, 4))


def test_parts_of_one_tensor_that_do_not_meet_are_taken():
    x = torch.randn(7, 5)
    sums = torch.zeros(5, 2)
    ops.feature_norm_(sums[:, 0], x, sum=sums[:, 1])
    torch.testing.assert_close(sums, torch.stack((x.square().sum(0), x.sum(0)), 1))
    both = torch.zeros(4, 8)
    gram, inputs = both[:, :4], both[:, 4:].copy_(torch.randn(4, 4))
    ops.gram_(gram, inputs)
    torch.testing.assert_close(gram.tril(), (inputs.T @ inputs).tril())


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float32), (torch.float32, torch.bfloat16), (torch.bool, torch.float32)])
def test_shared_memory_is_told_to_the_byte(dtypes, generator):
    """Against the marks that every single element leaves."""
    pool = torch.zeros(96, dtype=torch.uint8)

    def some(dtype):
        size = dtype.itemsize
        while True:
            shape = torch.randint(1, 4, (2,), generator=generator).tolist()
            strides = torch.randint(0, 6, (2,), generator=generator).tolist()
            start = int(torch.randint(0, 8, (), generator=generator))
            reach = start + sum(s * (n - 1) for s, n in zip(strides, shape, strict=True))
            if (reach + 1) * size <= len(pool):
                return pool.view(dtype).as_strided(shape, strides, start)

    def touched(tensor):
        size, base = tensor.element_size(), tensor.data_ptr() - pool.data_ptr()
        elements = [
            (i * tensor.stride(0) + j * tensor.stride(1)) * size for i in range(tensor.shape[0]) for j in range(tensor.shape[1])
        ]
        return {base + place + byte for place in elements for byte in range(size)}

    answers = set()
    for _ in range(300):
        a, b = some(dtypes[0]), some(dtypes[1])
        answers.add(answer := shares_memory(a, b))
        assert answer == bool(touched(a) & touched(b)) == shares_memory(b, a)
    assert answers == {True, False}


@pytest.mark.parametrize("convert", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr, torch.Tensor.to_mkldnn])
def test_other_layouts_are_refused_by_name(convert):
    for call, name in (
        (lambda: ops.gram_(torch.zeros(4, 4), convert(torch.eye(4))), "x"),
        (lambda: ops.nm_mask(convert(torch.eye(4))), "scores"),
        (lambda: ops.reverse_cholesky(convert(torch.eye(4))), "gram"),
    ):
        with pytest.raises(TypeError, match=f"^{name}: expected a dense tensor, got layout "):
            call()


HUGE = 2**58
FOUR = torch.zeros(1, device="cpu").expand(2**50, 4)


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("x", lambda: ops.bitmask_linear(torch.empty(HUGE, 0), **pack_bitmask_rows(torch.zeros(0, 0)))),
        ("x", lambda: ops.bitmask_linear(torch.empty(2**31, 2**31, 0), **pack_bitmask_rows(torch.zeros(0, 0)))),
        ("x", lambda: ops.nm_linear(torch.empty(HUGE, 0), **pack_nm_rows(torch.zeros(3, 0), 2, 4), n=2, m=4)),
        ("x", lambda: ops.nm_linear(FOUR, **pack_nm_rows(torch.zeros(3, 4), 2, 4), n=2, m=4)),
        ("scores", lambda: ops.topk_mask(torch.empty(HUGE, 0), 0)),
        ("scores", lambda: ops.nm_mask(FOUR, "2:4")),
        ("x", lambda: ops.gram_(torch.zeros(4, 4), FOUR)),
        ("x", lambda: ops.cross_gram_(torch.zeros(0, 0), torch.empty(HUGE, 0), torch.empty(HUGE, 0))),
        ("cross", lambda: ops.gram_solve(torch.zeros(0, 0), torch.empty(HUGE, 0))),
        ("weight", lambda: ops.head_neuron_scores(torch.zeros(4), FOUR)),
        ("weight", lambda: ops.obs_sweep(torch.empty(HUGE, 0), torch.zeros(0, 0), "2:4")),
        ("activated", lambda: ops.plain_split(FOUR, FOUR, FOUR)),
    ],
)
def test_shapes_that_no_memory_holds_are_refused_by_name(name, call):
    """They would end in a crash, in years of counting, or in torch's message about a call inside a kernel."""
    with pytest.raises(ValueError, match=f"^{name}: expected a shape that memory can hold, got "):
        call()


@pytest.mark.parametrize("rows", [0, 3])
def test_packed_products_of_empty_inputs(rows):
    bitmask, nm = pack_bitmask_rows(torch.zeros(rows, 0)), pack_nm_rows(torch.zeros(rows, 0), 2, 4)
    for tokens in ((5,), (2, 0), (40, 3)):
        x = torch.empty(*tokens, 0)
        for y in (ops.bitmask_linear(x, **bitmask), ops.nm_linear(x, **nm, n=2, m=4)):
            assert torch.equal(y, torch.zeros(*tokens, rows))


COMPILED = LIBRARIES["_C"].loaded


@pytest.mark.skipif(not COMPILED, reason="no compiled library")
def test_calls_past_the_wrappers_stay_in_memory_too():
    raw, rows = torch.ops.sparsekern, pack_bitmask_rows(torch.zeros(0, 0)).values()
    assert raw.bitmask_linear(torch.empty(2**39, 0), *rows).shape == (2**39, 0)
    assert raw.nm_linear(torch.empty(2**39, 0), *pack_nm_rows(torch.zeros(0, 0), 2, 4).values(), 2, 4).shape == (2**39, 0)
    assert raw.topk_mask(torch.empty(HUGE, 0), 0).shape == (HUGE, 0)


@pytest.mark.skipif(not COMPILED, reason="no compiled library")
@pytest.mark.skipif(torch.__version__ < "2.13", reason="older versions of torch do not give their words")
def test_torchs_errors_inside_a_kernel_are_in_its_words():
    with pytest.raises(RuntimeError, match="(?s)^(?!.*API call failed).*allocate"):
        torch.ops.sparsekern.nm_mask(torch.zeros(1).expand(2**46, 4), 2, 4)
