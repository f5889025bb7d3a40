"""`SparseLinear` on a device: what it gives on the CPU, without waiting once a weight has been checked, and compiled."""

from __future__ import annotations

import copy

import pytest
import torch

from sparsekern.layouts.packed_rows import SLACK, TILE_ROWS, pack_bitmask_rows, pack_nm_rows
from sparsekern.ops import bitmask_experts_linear, bitmask_linear, nm_experts_linear, nm_linear
from sparsekern.runtime import SparseLinear
from tests.ops.experts import assert_close_to_exact as assert_close_to_exact_of_experts
from tests.ops.experts import choice, sparse_experts
from tests.ops.test_bitmask_experts_linear import packed_of as packed_experts_of
from tests.ops.test_bitmask_linear import assert_close_to_exact, sparse
from tests.ops.test_nm_experts_linear import experts_of
from tests.ops.test_nm_experts_linear import packed_of as nm_experts_of
from tests.ops.test_nm_linear import nm_weight

pytestmark = pytest.mark.gpu

FORMATS = pytest.mark.parametrize("format", ["bitmask", "2:4", "4:8"])
COLUMNS = 4096


def layer(format: str, dtype: torch.dtype, generator: torch.Generator) -> SparseLinear:
    dense = torch.nn.Linear(320, 72, dtype=dtype)
    n, m = (2, 4) if format == "bitmask" else map(int, format.split(":"))
    dense.weight = torch.nn.Parameter(nm_weight(72, 320 // m, n, m, dtype, generator))
    return SparseLinear.from_linear(dense, format)


@FORMATS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moved_to_a_device_it_multiplies_as_before(generator, format, dtype):
    here = layer(format, dtype, generator)
    there = copy.deepcopy(here).cuda()
    assert there.check() is None
    for tokens in (1, 5, 40):
        x = torch.randn(2, tokens, 320, generator=generator).to(dtype)
        with torch.no_grad():
            got, want = there(x.cuda()).cpu(), here(x)
        torch.testing.assert_close(got, want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)
    x = torch.randn(3, 320, generator=generator).to(dtype).cuda().requires_grad_()
    there(x).sum().backward()
    torch.testing.assert_close(x.grad.cpu(), here.dense_weight().sum(0).expand(3, -1), rtol=1e-2, atol=1e-2)


@FORMATS
def test_decoding_does_not_wait(generator, format):
    on_device = layer(format, torch.bfloat16, generator).cuda()
    x = torch.randn(1, 320, generator=generator).bfloat16().cuda()
    with torch.no_grad():
        on_device(x)  # compiles, and checks the weight
        torch.cuda.synchronize()
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            on_device(x)
        finally:
            torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("tokens", [1, 5, 300])
def test_products_with_experts_do_not_wait(generator, tokens):
    """Once the first one has checked the weights: with one token, in jobs of 16 and of 64."""
    weight, experts = sparse_experts(4, 40, 320, torch.bfloat16, generator), choice(4, tokens, 2, generator).cuda()
    packed = [tensor.cuda() for tensor in packed_experts_of(weight)]
    two_of_four = [tensor.cuda() for tensor in nm_experts_of(experts_of(4, 40, 320, 2, 4, torch.bfloat16, generator), 2, 4)]
    x = torch.randn(tokens, 320, generator=generator).bfloat16().cuda()
    calls = lambda: bitmask_experts_linear(x, experts, *packed), lambda: nm_experts_linear(x, experts, *two_of_four, 2, 4)  # noqa: E731
    first = [call() for call in calls]
    torch.cuda.synchronize()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = [call() for call in calls]
    finally:
        torch.cuda.set_sync_debug_mode(before)
    for got, want in zip(again, first, strict=True):
        assert torch.equal(got, want)
    assert_close_to_exact_of_experts(first[0].cpu(), x.cpu(), experts.cpu(), weight)


@FORMATS
def test_compiled_with_cuda_graphs(generator, format):
    torch._dynamo.reset()
    on_device = layer(format, torch.bfloat16, generator).cuda()
    compiled = torch.compile(on_device, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(1, 320, generator=generator).bfloat16().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            assert torch.equal(compiled(x), on_device(x))


@pytest.mark.parametrize("tokens", [1, 5, 20])
def test_more_than_2_31_values_of_a_bitmask(room, generator, tokens):
    """One tile of rows, again and again."""
    room(40)
    weight = sparse(TILE_ROWS, COLUMNS, torch.bfloat16, generator)
    packed = pack_bitmask_rows(weight)
    slots = int(packed["starts"][-1])
    tiles = 2**31 // (2 * slots) + 4
    values = torch.cat(
        (packed["values"][: 2 * slots].cuda().repeat(tiles), torch.zeros(2 * SLACK, dtype=torch.bfloat16, device="cuda"))
    )
    starts = torch.arange(tiles + 1, device="cuda") * slots
    order = torch.arange(tiles * TILE_ROWS, dtype=torch.int32, device="cuda")
    x = torch.randn(tokens, COLUMNS, generator=generator).bfloat16().cuda()
    y = bitmask_linear(x, values, packed["bitmask"].cuda().repeat(tiles, 1), starts, order)
    sorted_weight = weight[packed["order"].long()].cuda()
    for tile in (0, tiles - 1):
        assert_close_to_exact(y[:, tile * TILE_ROWS :][:, :TILE_ROWS], x, sorted_weight)


@pytest.mark.parametrize("tokens", [1, 5, 20])
@pytest.mark.parametrize("n, m", [(2, 4), (4, 8)])
def test_more_than_2_31_values_of_a_pattern(room, generator, n, m, tokens):
    room(40)
    weight = nm_weight(64, COLUMNS // m, n, m, torch.bfloat16, generator)
    values, codes = pack_nm_rows(weight, n, m).values()
    times = 2**31 // values.numel() + 4
    x = torch.randn(tokens, COLUMNS, generator=generator).bfloat16().cuda()
    y = nm_linear(x, values.cuda().repeat(times, 1), codes.cuda().repeat(times, 1), n, m)
    for first in (0, len(y[0]) - 64):
        assert_close_to_exact(y[:, first : first + 64], x, weight.cuda())
