"""Ops are ordinary ops of torch: gradients or a refusal, version counters, autocast, fake tensors, tensors that share memory."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import linear

from sparsekern import backends, ops
from sparsekern.backends.libraries import LIBRARIES
from sparsekern.layouts.packed_rows import pack_bitmask_rows, pack_nm_rows
from sparsekern.ops._memory import shares_memory
from sparsekern.ops._registry import OPS

EVERYWHERE = [op for op in OPS.values() if not op.only_on_cuda]
EVERY_OP = pytest.mark.parametrize("op", EVERYWHERE, ids=lambda op: op.name)
WRITING = [op for op in OPS.values() if op.name.endswith("_")]
EVERY_WRITING_OP = pytest.mark.parametrize("op", WRITING, ids=lambda op: op.name)
PRODUCTS = {"bitmask_linear", "nm_linear"}


def first_sample(op, place: int = 0):
    return copy.deepcopy(list(op.samples(torch.Generator().manual_seed(0)))[place])


def named(op, sample) -> dict:
    return {**dict(zip(op.signature.parameters, sample.args, strict=False)), **sample.kwargs}


def written(op, given: dict) -> list[str]:
    arguments = {argument.name: argument.alias_info for argument in op.overload._schema.arguments}
    return [name for name in given if arguments[name] is not None and arguments[name].is_write]


def floats(given: dict) -> dict[str, torch.Tensor]:
    return {name: value for name, value in given.items() if isinstance(value, torch.Tensor) and value.is_floating_point()}


def tensors_of(result) -> list[torch.Tensor]:
    """What an op or its wrapper returns, as a list."""
    if isinstance(result, torch.Tensor):
        return [result]
    return [] if result is None else list(result.values()) if isinstance(result, dict) else list(result)


@EVERY_OP
def test_a_result_that_requires_a_gradient_gives_it_or_raises(op):
    given = named(op, first_sample(op))
    for name, value in floats(given).items():
        if name not in written(op, given) and not (op.name in PRODUCTS and name == "values"):
            value.requires_grad_(True)
    results = [result for result in tensors_of(op.overload(**given)) if result.requires_grad]
    assert all(result.is_floating_point() for result in results)
    for result in results:
        if op.name in PRODUCTS:
            result.sum().backward(retain_graph=True)
            assert given["x"].grad.shape == given["x"].shape
        else:
            with pytest.raises(RuntimeError, match=f"^{op.name}: has no gradient, but one was requested; detach"):
                result.sum().backward(retain_graph=True)


@EVERY_OP
def test_gradients_change_no_result(op):
    given, plain = named(op, first_sample(op)), named(op, first_sample(op))
    for name, value in floats(given).items():
        if name not in written(op, given) and not (op.name in PRODUCTS and name == "values"):
            value.requires_grad_(True)
    results = zip(tensors_of(op.overload(**given)), tensors_of(op.overload(**plain)), strict=True)
    for got, want in (*results, *((given[name], plain[name]) for name in written(op, given))):
        assert torch.equal(got, want)


@EVERY_WRITING_OP
@pytest.mark.parametrize("place", [0, 1])
def test_writes_count_as_versions(op, place):
    for _ in range(2):
        given = named(op, first_sample(op, place))
        before = {name: given[name]._version for name in written(op, given)}
        with torch.no_grad():
            op.overload(**given)
        assert before and all(given[name]._version > version for name, version in before.items())


@EVERY_WRITING_OP
def test_what_backward_needs_and_an_op_overwrites_is_refused_by_torch(op):
    given = named(op, first_sample(op))
    for name in written(op, given):
        if given[name].is_floating_point():
            fresh = named(op, first_sample(op))
            factor = torch.ones_like(fresh[name], requires_grad=True)
            product = (factor * fresh[name]).sum()
            op.overload(**fresh)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                product.backward()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_writes_count_too(backend):
    def step(gram, x):
        ops.gram_(gram, x)
        return ops.gram_symmetrize_(gram)

    if backend == "inductor":
        pytest.importorskip("torch._inductor.codecache")
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    gram, x, factor = torch.zeros(8, 8), torch.randn(5, 8), torch.ones(8, 8, requires_grad=True)
    product = (factor * gram).sum()
    compiled(gram, x)
    torch.testing.assert_close(gram, x.T @ x)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@EVERY_WRITING_OP
def test_what_is_written_to_requires_no_gradient(op):
    given = named(op, first_sample(op))
    for name in written(op, given):
        if not given[name].is_floating_point():
            continue
        fresh = named(op, first_sample(op))
        fresh[name].requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor that requires no gradient, since {op.name} writes to it"):
            op.overload(**fresh)
        with torch.no_grad():
            op.overload(**fresh)
        assert fresh[name].grad_fn is None


@pytest.mark.parametrize("run", ["kernel", "reference"])
@pytest.mark.parametrize("name", ["gram_", "cross_gram_", "feature_norm_", "sensitivity_"])
def test_statistics_keep_no_graph_of_a_batch(name, run):
    op = OPS[name]
    total = named(op, first_sample(op))
    held = []
    for _ in range(3):
        given = named(op, first_sample(op))
        for known, value in floats(given).items():
            if known in written(op, given):
                given[known] = total[known]
            else:
                given[known] = value.requires_grad_(True) * 1.0
                held.append(weakref.ref(given[known]))
        if run == "reference":
            with backends.use(**{name: "reference"}):
                op.overload(**given)
        else:
            op.overload(**given)
    del given, value
    gc.collect()
    assert held and all(reference() is None for reference in held)
    assert not any(total[known].requires_grad for known in written(op, total))


PACKED = {
    "bitmask": (pack_bitmask_rows, lambda x, packed, bias: ops.bitmask_linear(x, **packed, bias=bias)),
    "2:4": (lambda w: pack_nm_rows(w, 2, 4), lambda x, packed, bias: ops.nm_linear(x, **packed, n=2, m=4, bias=bias)),
}


def packed_problem(kind: str, dtype: torch.dtype = torch.float32):
    pack, product = PACKED[kind]
    weight = torch.randn(19, 40).to(dtype)
    weight = torch.where(ops.nm_mask(weight.abs(), "2:4"), weight, 0)
    return weight, pack(weight), product


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("shape", [(40,), (1, 40), (2, 3, 40), (33, 40), (0, 40)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_products_have_the_gradients_of_the_dense_one(kind, shape, dtype):
    weight, packed, product = packed_problem(kind, dtype)
    found, expected = [], []
    for results, call in ((found, lambda x, bias: product(x, packed, bias)), (expected, lambda x, bias: linear(x, weight, bias))):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_(True)
        bias = torch.linspace(-1, 1, 19).to(dtype).requires_grad_(True)
        call(x, bias).square().sum().backward()
        results += [x.grad, bias.grad]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(
            got, want, rtol=tolerance, atol=tolerance * max(1.0, float(want.abs().max()) if want.numel() else 1)
        )


@pytest.mark.parametrize("kind", PACKED)
def test_second_gradients_of_packed_products(kind):
    weight, packed, product = packed_problem(kind)

    def penalty(x):
        (grad,) = torch.autograd.grad(product(x, packed, None).square().sum(), x, create_graph=True)
        return grad.square().sum()

    x = torch.randn(3, 40, requires_grad=True)
    penalty(x).backward()
    second = 2 * weight.T @ weight
    torch.testing.assert_close(x.grad, 2 * x.detach() @ second @ second, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("kind", PACKED)
def test_compiled_gradients_of_packed_products(kind):
    weight, packed, product = packed_problem(kind)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: product(x, packed, None).square().sum(), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 40, requires_grad=True)
    compiled(x).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach() @ weight.T @ weight, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_values_have_no_gradient(kind):
    _, packed, product = packed_problem(kind)
    packed["values"].requires_grad_(True)
    with pytest.raises(
        ValueError, match="^values: expected a tensor that requires no gradient, since .*_linear has no gradient for it"
    ):
        product(torch.randn(2, 40), packed, None)


@pytest.mark.parametrize("kind", PACKED)
def test_packed_tensors_that_change_before_backward_are_refused(kind):
    _, packed, product = packed_problem(kind)
    y = product(torch.randn(2, 40, requires_grad=True), packed, None).sum()
    packed["values"].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@EVERY_OP
def test_forward_mode_is_refused(op):
    given = named(op, first_sample(op))
    with forward_ad.dual_level():
        name, value = next(iter(floats(given).items()))
        given[name] = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match=f"^{op.name}: has no forward-mode gradient, but an input carries a tangent"):
            op.overload(**given)


@EVERY_OP
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(op, dtype):
    for place in (0, -1):
        given, plain = named(op, first_sample(op, place)), named(op, first_sample(op, place))
        with torch.autocast(torch.get_default_device().type, dtype=dtype):
            results = tensors_of(op.overload(**given))
        expected = tensors_of(op.overload(**plain))
        for got, want in zip(
            [*results, *(given[name] for name in written(op, given))],
            [*expected, *(plain[name] for name in written(op, plain))],
            strict=True,
        ):
            assert got.dtype == want.dtype and torch.equal(got, want)


@EVERY_OP
def test_fake_tensors_go_through_the_wrappers_outside_of_compile(op):
    """With the wrapper's own arguments where it has some."""
    sample = first_sample(op)
    given = named(op, sample)
    if op.friendly:
        for known in op.friendly["pattern"]:
            given.pop(known, None)
        given["pattern"] = "2:4"
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        mode.shape_env = torch.fx.experimental.symbolic_shapes.ShapeEnv()
        fake = {name: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for name, v in given.items()}
        result = getattr(ops, op.name)(**fake)
    real = getattr(ops, op.name)(**given)
    for got, want in zip(tensors_of(result), tensors_of(real), strict=True):
        assert got.dtype == want.dtype and got.dim() == want.dim()


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
                if op.friendly:
                    fresh = {k: v for k, v in fresh.items() if k not in op.friendly["pattern"]} | {"pattern": "2:4"}
                with pytest.raises(
                    ValueError, match=f"^({target}, {other}|{other}, {target}): expected tensors that share no memory"
                ):
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
