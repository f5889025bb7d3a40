"""Ops are ordinary ops of torch: gradients or a refusal, version counters, autocast, fake tensors."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.nn.functional import linear

from sparsekern import backends, ops
from sparsekern.layouts.packed_rows import pack_bitmask_rows, pack_nm_rows
from sparsekern.ops._registry import OPS

from .calls import EVERY_OP, EVERY_WRITING_OP, EVERYWHERE, first_sample, floats, named, tensors_of, written

PRODUCTS = {"bitmask_experts_linear", "bitmask_linear", "int8_linear", "nm_experts_linear", "nm_linear", "nm_q4_linear"}
# The op as torch dispatches it, and the call that does the work of its autograd kernels itself.
EITHER_WAY = pytest.mark.parametrize("way", ["overload", "call"])


@EITHER_WAY
@EVERY_OP
def test_a_result_that_requires_a_gradient_gives_it_or_raises(op, way):
    given = named(op, first_sample(op))
    for name, value in floats(given).items():
        if name not in written(op, given) and not (op.name in PRODUCTS and name in ("values", "scales")):
            value.requires_grad_(True)
    results = [result for result in tensors_of(getattr(op, way)(**given)) if result.requires_grad]
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
        if name not in written(op, given) and not (op.name in PRODUCTS and name in ("values", "scales")):
            value.requires_grad_(True)
    results = zip(tensors_of(op.overload(**given)), tensors_of(op.overload(**plain)), strict=True)
    for got, want in (*results, *((given[name], plain[name]) for name in written(op, given))):
        assert torch.equal(got, want)


@EITHER_WAY
@EVERY_WRITING_OP
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_writes_count_as_versions(op, way, place, mode):
    for _ in range(2):
        given = named(op, first_sample(op, place))
        before = {name: given[name]._version for name in written(op, given)}
        with mode():
            getattr(op, way)(**given)
        assert before and all(given[name]._version > version for name, version in before.items())


@EITHER_WAY
@EVERY_WRITING_OP
def test_what_backward_needs_and_an_op_overwrites_is_refused_by_torch(op, way):
    given = named(op, first_sample(op))
    for name in written(op, given):
        if given[name].is_floating_point():
            fresh = named(op, first_sample(op))
            factor = torch.ones_like(fresh[name], requires_grad=True)
            product = (factor * fresh[name]).sum()
            getattr(op, way)(**fresh)
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


@EITHER_WAY
@EVERY_WRITING_OP
def test_what_is_written_to_requires_no_gradient(op, way):
    given = named(op, first_sample(op))
    for name in written(op, given):
        if not given[name].is_floating_point():
            continue
        fresh = named(op, first_sample(op))
        fresh[name].requires_grad_(True)
        with pytest.raises(ValueError, match=f"^{name}: expected a tensor that requires no gradient, since {op.name} writes to it"):
            getattr(op, way)(**fresh)
        with torch.no_grad():
            getattr(op, way)(**fresh)
        assert fresh[name].grad_fn is None


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda x: ops.gram_inverse(x.T @ x)[0].sum(), "gram_inverse: has no gradient, but one was requested"),
        (lambda x: ops.gram_symmetrize_(x * 2).sum(), "gram: expected a tensor that requires no gradient"),
    ],
)
def test_compiled_ops_without_a_gradient_refuse_it_by_name(backend, step, message):
    torch._dynamo.reset()
    x = torch.eye(4, requires_grad=True)
    with pytest.raises(Exception, match=message):  # the compiler wraps it while it traces
        torch.compile(step, fullgraph=True, backend=backend)(x).backward()
    assert x.grad is None


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


@EITHER_WAY
@EVERY_OP
def test_inference_mode_stays_as_it_was(op, way):
    """What excludes autograd for the length of a call must not include it afterwards where it was excluded before."""
    for mode in (torch.inference_mode, torch.enable_grad):
        with mode():
            before = str(torch._C._dispatch_tls_local_exclude_set())
            getattr(op, way)(**named(op, first_sample(op)))
            assert str(torch._C._dispatch_tls_local_exclude_set()) == before


@EVERY_WRITING_OP
def test_tensors_of_inference_mode_are_written_to(op):
    """They have no version."""
    plain = named(op, first_sample(op))
    op.call(**plain)
    with torch.inference_mode():
        given = named(op, first_sample(op))
        op.call(**given)
    for name in written(op, given):
        assert given[name].is_inference() and torch.equal(given[name], plain[name])


@EITHER_WAY
@pytest.mark.parametrize("op", [op for op in EVERYWHERE if floats(named(op, first_sample(op)))], ids=lambda op: op.name)
def test_forward_mode_is_refused(op, way):
    given = named(op, first_sample(op))
    with forward_ad.dual_level():
        name, value = next(iter(floats(given).items()))
        given[name] = forward_ad.make_dual(value, torch.ones_like(value))
        with pytest.raises(RuntimeError, match=f"^{op.name}: has no forward-mode gradient, but an input carries a tangent"):
            getattr(op, way)(**given)


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
