"""What every op of the registry keeps, checked on the samples that each op brings."""

from __future__ import annotations

import copy
import functools

import pytest
import torch

from sparsekern import ops
from sparsekern.backends import implementations
from sparsekern.backends.libraries import LIBRARIES
from sparsekern.ops._registry import NAMESPACE, OPS, Op, Sample
from tests.conftest import COMPILED, ISAS, cpu_has

from .large_samples import LARGE
from .strategies import INTERPRETED

BIT_EXACT = {
    "admm_step_", "bitmask_pack", "bitmask_unpack", "gram_symmetrize_", "nm_mask", "nm_pack", "nm_q4_pack", "nm_q4_unpack", "nm_unpack", "semi_structured_pack", "semi_structured_prune_pack", "semi_structured_unpack", "topk_mask",
}  # fmt: skip
RELATIVE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
ROUNDED = {
    "linear_kl",
    "sensitivity_",
}  # on a device what lies between two products has the dtype of the inputs, whatever that of the result
WITHOUT_ISA = {"gram_symmetrize_"}  # moves data only: one code for every instruction set

EVERYWHERE = {name: op for name, op in OPS.items() if not op.only_on_cuda}
EVERY_OP = pytest.mark.parametrize("op", EVERYWHERE.values(), ids=EVERYWHERE.keys())


def samples(op: Op) -> list[Sample]:
    return list(op.samples(torch.Generator().manual_seed(0)))


def has_kernel(op: Op) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{op.name}", "CPU")


def call(function, sample: Sample) -> list[torch.Tensor]:
    """The tensors that a call returns, then those it was given, as they are after the call."""
    sample = copy.deepcopy(sample)
    result = function(*sample.args, **sample.kwargs)
    returned = [] if result is None else [result] if isinstance(result, torch.Tensor) else list(result)
    given = [v for v in (*sample.args, *sample.kwargs.values()) if isinstance(v, torch.Tensor)]
    return returned + given


def assert_same(op: Op, actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(actual) == len(expected)
    tolerance = max((RELATIVE[want.dtype] for want in expected if want.is_floating_point()), default=0.0)
    for got, want in zip(actual, expected, strict=True):
        if op.name == "gram_" and got.dim() == 2 and got.shape[0] == got.shape[1]:
            got, want = got.tril(), want.tril()  # the upper triangle is not part of the contract
        assert got.dtype == want.dtype and got.shape == want.shape
        if op.name in BIT_EXACT or not want.is_floating_point():
            assert_bits_equal(got, want)
        else:
            largest = want.abs().max().item() if want.numel() else 0.0
            rounded = op.name in ROUNDED and (INTERPRETED or got.is_cuda)
            relative = tolerance if rounded else RELATIVE[want.dtype]
            torch.testing.assert_close(got, want, rtol=relative, atol=relative * largest)


def assert_bits_equal(got: torch.Tensor, want: torch.Tensor) -> None:
    got, want = (t.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8) for t in (got, want))
    assert torch.equal(got, want)


def assert_bits(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for got, want in zip(actual, expected, strict=True):
        assert_bits_equal(got, want)


def strided(value):
    """The same values in memory with gaps, or with the last axis not the fastest."""
    if not isinstance(value, torch.Tensor) or value.dim() == 0:
        return value
    return value.repeat_interleave(2, dim=0)[::2] if value.dim() == 1 else value.mT.contiguous().mT


def test_this_run_says_what_it_checked(record_property, request):
    kind = request.config.getoption("--kernels")
    kernels = sorted(name for name, op in OPS.items() if has_kernel(op))
    record_property("implementation", kind or ("compiled" if COMPILED else "references"))
    record_property("kernels", ", ".join(kernels))
    if kind in ("cuda", "triton"):  # on a device the libraries of the CPU are loaded too
        assert kernels == sorted(name for name in OPS if any(known.name == kind for known in implementations(name)))
    else:
        assert bool(kernels) == COMPILED
    assert bool(LIBRARIES["_C"].reason) != COMPILED


@EVERY_OP
def test_every_op_brings_samples(op):
    assert len(samples(op)) >= 3


def test_one_op_is_for_one_kind_of_device():
    assert set(OPS) - set(EVERYWHERE) == {"cusparselt_linear"}


@EVERY_OP
def test_opcheck(op):
    for sample in samples(op):
        torch.library.opcheck(op.overload, sample.args, sample.kwargs)


def fewer(every: list[Sample], step: int, most: int) -> list[Sample]:
    """Return every `step`-th of more than `most` samples in Triton's interpreter, where some take seconds; elsewhere all."""
    return every[::step] if INTERPRETED and len(every) > most else every


@EVERY_OP
def test_kernel_equals_reference(op, isa, poisoned):
    for sample in fewer(samples(op), 3, 20):
        assert_same(op, call(op.overload, sample), call(op.reference, sample))


@EVERY_OP
def test_strides_do_not_change_the_result(op, isa, poisoned):
    for sample in fewer(samples(op), 4, 8):
        moved = Sample(tuple(map(strided, sample.args)), {k: strided(v) for k, v in sample.kwargs.items()})
        assert_same(op, call(op.overload, moved), call(op.overload, sample))


@EVERY_OP
def test_threads_do_not_change_the_result(op, threads):
    """To the bit where the kernel is ours. A reference calls products of torch, which promises no order of its sums."""
    same = assert_bits if has_kernel(op) else functools.partial(assert_same, op)
    large = [LARGE[op.name](torch.Generator().manual_seed(0))] if COMPILED and has_kernel(op) else []  # work that is shared
    for sample in (*samples(op), *large):
        threads(1)
        alone = call(op.overload, sample)
        threads(3)
        same(call(op.overload, sample), alone)


@EVERY_OP
def test_compiles_into_one_graph(op):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(lambda *a, **k: op.overload(*a, **k), fullgraph=True, backend="aot_eager")
        sample = samples(op)[-1]
        assert_same(op, call(compiled, sample), call(op.overload, sample))


def test_the_wrappers_compile_into_one_graph():
    """With their checks and parsed patterns, and again for other sizes."""

    def layer(weight, x):
        features = x.shape[1]
        gram = ops.gram_(torch.zeros(features, features), x, row_mask=torch.arange(len(x)) > 3, alpha=0.5)
        factor = ops.reverse_cholesky(ops.gram_symmetrize_(gram), damping=0.01)
        norm = ops.feature_norm_(torch.zeros(features), x)
        cross = ops.cross_gram_(torch.zeros(len(weight), features), x @ weight.T, x)
        new_weight, mask, error = ops.obs_sweep(weight, factor, pattern="2:4", block_size=32)
        again = ops.obs_sweep(weight, factor, mask=ops.nm_mask(weight, "2:4"))[0]
        sparse = ops.obs_sweep(weight, factor, pattern=0.5, scope="row")[0]
        unpacked = ops.semi_structured_unpack(*ops.semi_structured_pack(new_weight.bfloat16()))
        packed = ops.bitmask_pack(sparse)
        product = ops.bitmask_linear(x, **packed), ops.nm_linear(x, **ops.nm_pack(new_weight, 2, 4), n=2, m=4)
        kept = ops.topk_mask(weight, features // 2)
        return (
            gram,
            norm,
            cross,
            new_weight,
            mask,
            error,
            again,
            ops.bitmask_unpack(**packed, features=features),
            *product,
            unpacked,
            kept,
        )

    torch._dynamo.reset()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for rows, features in ((32, 64), (64, 96)):
            weight, x = torch.randn(rows, features), torch.randn(2 * features, features)
            for got, want in zip(compiled(weight, x), layer(weight, x), strict=True):
                assert torch.equal(got, want)


@EVERY_OP
def test_an_isa_that_the_cpu_lacks_is_refused(op, monkeypatch):
    with torch.device("cpu"):
        sample = samples(op)[0]
    for isa in (*(i for i in ISAS if not cpu_has(i)), "neon"):
        monkeypatch.setenv("SPARSEKERN_CPU_ISA", isa)
        if COMPILED and has_kernel(op) and op.name not in WITHOUT_ISA:
            with pytest.raises(ValueError, match=f"SPARSEKERN_CPU_ISA: .*{isa}"):
                call(op.overload, sample)
        else:
            call(op.overload, sample)
