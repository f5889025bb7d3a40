"""2:4 weights as PyTorch's semi-structured tensors: what can be had without a GPU, and, marked so, their products on one.

Without a GPU "cuSPARSELt" is a stand-in that compresses by doing nothing and multiplies by the dense product.
"""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional
from torch.sparse import SparseSemiStructuredTensorCUSPARSELT, SparseSemiStructuredTensorCUTLASS

from sparsekern import backends
from sparsekern.backends.cusparselt_linear import library
from sparsekern.layouts.semi_structured import FORMATS
from sparsekern.ops import semi_structured_pack, semi_structured_prune_pack, semi_structured_unpack
from sparsekern.ops.cusparselt_linear import Algorithm, through_torch
from sparsekern.ops.semi_structured_pack import sparse_weight
from sparsekern.runtime import semi_structured_linear, to_semi_structured
from sparsekern.runtime.semi_structured import SemiStructuredTensor

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of SparseSemiStructuredTensor:UserWarning")
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype).removeprefix("torch."))


def pruned(rows: int, columns: int, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    return semi_structured_unpack(*semi_structured_prune_pack(torch.randn(rows, columns, generator=generator).to(dtype)))


@pytest.mark.parametrize("dtype", FORMATS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_cutlass_takes_what_nm_pack_makes(generator, dtype):
    weight = sparse_weight(64, 256, dtype, generator)
    values, meta = semi_structured_pack(weight)
    tensor = to_semi_structured((values, meta), backend="cutlass")
    assert type(tensor) is SparseSemiStructuredTensorCUTLASS and tensor.shape == weight.shape and tensor.dtype == dtype
    assert tensor.packed is values and tensor.meta is meta
    for other in (
        tensor,
        to_semi_structured(weight, backend="cutlass"),
        to_semi_structured(weight.T.contiguous().T, backend="cutlass"),
    ):
        assert torch.equal(other.to_dense(), weight)


@pytest.mark.parametrize(
    ("shape", "dtype", "backend", "multiple"),
    [
        ((32, 32), torch.bfloat16, "cutlass", r"\(32, 64\) for bfloat16 with backend 'cutlass', got \(32, 32\)"),
        ((16, 64), torch.float16, "cutlass", r"\(32, 64\) for float16 with backend 'cutlass', got \(16, 64\)"),
        ((32, 16), torch.float32, "cutlass", r"\(32, 32\) for float32 .* got \(32, 16\)"),
        ((16, 64), torch.int8, "cutlass", r"\(16, 128\) for int8 .* got \(16, 64\)"),
        ((0, 64), torch.bfloat16, "cutlass", r"\(32, 64\) for bfloat16 .* got \(0, 64\)"),
        ((16, 24), torch.bfloat16, "cusparselt", r"\(16, 16\) for bfloat16 with backend 'cusparselt', got \(16, 24\)"),
        ((16, 64), torch.int8, "cusparselt", r"\(32, 32\) for int8 .* got \(16, 64\)"),
    ],
)
def test_shape_is_refused(monkeypatch, shape, dtype, backend, multiple):
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    with pytest.raises(ValueError, match=f"weight: expected a shape that is a positive multiple of {multiple}"):
        to_semi_structured(torch.zeros(shape, dtype=dtype), backend=backend)


def test_the_shape_of_a_packed_weight_is_that_of_the_weight():
    with pytest.raises(ValueError, match=r"multiple of \(32, 64\) for bfloat16 .* got \(32, 32\)"):
        to_semi_structured(semi_structured_pack(torch.zeros(32, 32, dtype=torch.bfloat16)), backend="cutlass")


def test_other_arguments_are_refused(monkeypatch):
    weight = torch.zeros(32, 64, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="backend: expected 'cusparselt' or 'cutlass', got 'cublas'"):
        to_semi_structured(weight, backend="cublas")
    with pytest.raises(TypeError, match=r"weight: expected a tensor or \(values, meta\), got list"):
        to_semi_structured([weight])
    with pytest.raises(TypeError, match="weight: expected dtype .* got float64"):
        to_semi_structured(weight.double(), backend="cutlass")
    with pytest.raises(ValueError, match=r"weight: expected 2 dimensions, got shape \(1, 32, 64\)"):
        to_semi_structured(weight[None], backend="cutlass")
    with pytest.raises(ValueError, match="weight: expected at most 2 non-zeros in every 4 columns, got 4 in row 0"):
        to_semi_structured(weight + 1, backend="cutlass")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="backend: this PyTorch has no cuSPARSELt; use 'cutlass'"):
        to_semi_structured(weight, backend="cusparselt")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    with pytest.raises(ValueError, match="weight: expected a CUDA tensor with backend 'cusparselt', got one on cpu"):
        to_semi_structured(weight, backend="cusparselt")
    with pytest.raises(TypeError, match="weight: expected dtype .* got float32"):
        to_semi_structured(weight.float(), backend="cusparselt")


class Recorded:
    """Stands in for cuSPARSELt in torch: keeps what it is asked."""

    def __init__(self):
        self.searches, self.products = [], []

    def search(self, compressed, dense, bias, alpha, out_dtype, transpose_result):
        assert transpose_result and alpha is out_dtype is None
        self.searches.append((tuple(dense.shape), bias is not None))
        compressed.zero_()  # it may write to what it is given, the caller's weight must not change
        return 7, 2, 1, 40

    def multiply(self, compressed, dense, *, bias, transpose_result, alg_id, split_k, split_k_mode):
        assert transpose_result and not dense.is_contiguous() and dense.t().is_contiguous()
        self.products.append((tuple(dense.shape), (alg_id, split_k, split_k_mode)))
        return functional.linear(dense.t(), compressed, bias)


@pytest.fixture
def cusparselt(monkeypatch) -> Recorded:
    recorded = Recorded()
    monkeypatch.setattr(torch._C, "_cusparselt", SimpleNamespace(mm_search=recorded.search), raising=False)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", recorded.multiply)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(importlib.import_module("sparsekern.ops.cusparselt_linear"), "_algorithms", {})
    return recorded


@HALVES
def test_an_algorithm_is_searched_once_a_shape(cusparselt, generator, dtype):
    weight = pruned(64, 32, dtype, generator)
    bias = torch.randn(64, generator=generator).to(dtype)
    for tokens in (5, 8, 7, 9, 16, 100, 128):
        x = torch.randn(tokens, 32, generator=generator).to(dtype)
        for given in (x, x.T.contiguous().T):
            assert torch.equal(through_torch(given, weight, 64), functional.linear(x, weight))
    assert cusparselt.searches == [((32, 8), False), ((32, 16), False), ((32, 104), False)]
    assert [shape for shape, _ in cusparselt.products[::2]] == [(32, n) for n in (8, 8, 8, 16, 16, 104, 128)]
    assert {algorithm for _, algorithm in cusparselt.products} == {(7, 2, 1)}
    through_torch(x, weight, 64, bias)
    through_torch(x, weight.repeat(2, 1), 128)
    assert cusparselt.searches[3:] == [((32, 128), True), ((32, 128), False)]


def test_nothing_is_searched_while_a_graph_is_captured(cusparselt, monkeypatch, generator):
    weight, x = pruned(64, 32, torch.bfloat16, generator), torch.randn(8, 32, generator=generator).bfloat16()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    through_torch(x, weight, 64)
    assert not cusparselt.searches and cusparselt.products[0][1] == tuple(Algorithm())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    through_torch(x, weight, 64)
    assert len(cusparselt.searches) == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    through_torch(x, weight, 64)
    assert cusparselt.products[-1][1] == (7, 2, 1)


def test_what_is_on_another_device_is_refused(cusparselt):
    with pytest.raises(ValueError, match="x: expected a tensor on cpu, as the compressed weight, got one on meta"):
        through_torch(torch.zeros(8, 32, device="meta"), torch.zeros(64, 32), 64)
    assert not cusparselt.searches and not cusparselt.products


def test_no_tokens(cusparselt):
    assert through_torch(torch.zeros(0, 32), torch.zeros(64, 32), 64).shape == (0, 64)
    assert not cusparselt.searches and not cusparselt.products


@pytest.fixture
def on_cpu():
    """Lets `cusparselt_linear` run on the CPU, on a weight that is "compressed" by being left as it is."""
    calls = []

    def multiply(x, compressed, out_features, bias=None):
        calls.append(tuple(x.shape))
        return functional.linear(x, compressed, bias)

    library = torch.library.Library("sparsekern", "FRAGMENT")
    torch.library.register_kernel("sparsekern::cusparselt_linear", "cpu", multiply, lib=library)
    yield calls
    library._destroy()


def uncompressed(weight: torch.Tensor) -> SemiStructuredTensor:
    return SemiStructuredTensor(
        weight.shape, packed=weight, meta=None, packed_t=None, meta_t=None, compressed_swizzled_bitmask=None
    )


@HALVES
def test_it_takes_the_place_of_a_weight(on_cpu, generator, dtype):
    weight, bias = pruned(64, 128, dtype, generator), torch.randn(64, generator=generator).to(dtype)
    x = torch.randn(3, 5, 128, generator=generator).to(dtype)
    layer = torch.nn.Linear(128, 64, dtype=dtype)
    layer.weight, layer.bias = torch.nn.Parameter(uncompressed(weight), requires_grad=False), torch.nn.Parameter(bias)
    with torch.no_grad():
        for got in (layer(x), semi_structured_linear(x, layer.weight, bias)):
            assert torch.equal(got, functional.linear(x, weight, bias))
        tensor = uncompressed(weight)
        assert isinstance(tensor, SparseSemiStructuredTensorCUSPARSELT)
        assert torch.equal(functional.linear(x, tensor), functional.linear(x, weight))
        assert torch.equal(tensor @ x[0].t(), weight @ x[0].t())
        assert torch.equal(x[0] @ tensor.t(), x[0] @ weight.t())
    assert on_cpu == [(15, 128)] * 3 + [(5, 128)] * 2


def test_what_it_cannot_multiply(on_cpu):
    tensor = uncompressed(torch.zeros(64, 64, dtype=torch.bfloat16))
    with pytest.raises(NotImplementedError, match="a product with the transpose of a semi-structured tensor"):
        tensor.t() @ torch.zeros(64, 8, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="B: expected a dense tensor, got a semi-structured one"):
        tensor._mm(tensor)


def test_linear_refuses_what_is_not_the_weights():
    weight = to_semi_structured(torch.zeros(32, 64, dtype=torch.bfloat16), backend="cutlass")
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    with pytest.raises(
        ValueError, match=r"x: expected 64 features of torch.bfloat16 on cpu, got shape \(8, 64\) of torch.float32 on cpu"
    ):
        semi_structured_linear(x.float(), weight)
    with pytest.raises(ValueError, match=r"x: expected 64 features .* got shape \(64, 8\)"):
        semi_structured_linear(x.T, weight)
    with pytest.raises(ValueError, match=r"bias: expected 32 features .* got shape \(8, 64\)"):
        semi_structured_linear(x, weight, x)


def test_compiles(on_cpu, generator):
    weight, x = pruned(64, 128, torch.bfloat16, generator), torch.randn(16, 128, generator=generator).bfloat16()
    layer = torch.nn.Linear(128, 64, bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(uncompressed(weight), requires_grad=False)
    expected = functional.linear(x, weight) * 2
    torch._dynamo.reset()
    with torch.no_grad():
        for function in (lambda y: layer(y) * 2, lambda y: semi_structured_linear(y, layer.weight) * 2):
            assert torch.equal(torch.compile(function, fullgraph=True, backend="aot_eager")(x), expected)


# ---- on a GPU


def needs(backend: str) -> None:
    if backend == "cusparselt" and not torch.backends.cusparselt.is_available():
        pytest.skip("this PyTorch has no cuSPARSELt")
    if backend == "cutlass" and torch.cuda.get_device_capability()[0] != 8:
        pytest.skip("PyTorch's CUTLASS products need compute capability 8.x")


def assert_close_to_exact(product: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    """As close to the product in float64 as the dense product of the same dtype, within a factor of two."""
    exact = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    dense = functional.linear(x, weight, bias)
    error, dense_error = ((result.double() - exact).norm() / exact.norm() for result in (product, dense))
    assert product.dtype == x.dtype and product.shape == dense.shape
    assert error <= 2 * dense_error + 1e-6, f"{error:.2e} against {dense_error:.2e}"


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("backend", ["cusparselt", "cutlass"])
@pytest.mark.parametrize(("rows", "columns"), [(32, 64), (256, 512), (1024, 768)])
def test_products_equal_dense_ones(generator, dtype, backend, rows, columns):
    needs(backend)
    weight = pruned(rows, columns, dtype, generator).cuda()
    bias = torch.randn(rows, generator=generator).to(dtype).cuda()
    tensors = to_semi_structured(weight, backend=backend), to_semi_structured(semi_structured_pack(weight), backend=backend)
    for tokens in (1, 8, 13, 300):
        x = torch.randn(tokens, columns, generator=generator).to(dtype).cuda()
        for tensor in tensors:
            for multiply in (functional.linear, semi_structured_linear):
                assert_close_to_exact(multiply(x, tensor), x, weight, None)
                assert_close_to_exact(multiply(x[None], tensor, bias)[0], x, weight, bias)


@pytest.mark.gpu
@HALVES
def test_what_cusparselt_compresses_comes_back(generator, dtype):
    """Its layout is its own: the product with the identity shows that it holds our weight."""
    needs("cusparselt")
    weight = pruned(256, 128, dtype, generator).cuda()
    tensor = to_semi_structured(semi_structured_pack(weight), backend="cusparselt")
    identity = torch.eye(128, dtype=dtype, device="cuda")
    assert torch.equal(semi_structured_linear(identity, tensor).T, weight)
    assert torch.equal(tensor.to_dense(), weight)
    assert torch.equal(tensor.packed, torch._cslt_compress(weight))


@pytest.mark.gpu
@HALVES
@pytest.mark.parametrize("implementation", ["cuda", "reference"])
def test_each_way_to_cusparselt(generator, dtype, implementation):
    """With plans that are kept, past torch, and by `torch._cslt_sparse_mm`."""
    needs("cusparselt")
    if implementation == "cuda" and not library().ok:
        pytest.skip(library().reason)
    weight = pruned(512, 256, dtype, generator).cuda()
    bias = torch.randn(512, generator=generator).to(dtype).cuda()
    tensor = to_semi_structured(weight)
    with backends.use(cusparselt_linear=implementation):
        for tokens in (0, 1, 8, 77, 1024):
            x = torch.randn(256, tokens, generator=generator).to(dtype).cuda().T
            for added in (None, bias, bias.flip(0)):
                product = semi_structured_linear(x, tensor, added)
                assert product.shape == (tokens, 512)
                if tokens:
                    assert_close_to_exact(product, x, weight, added)


@pytest.mark.gpu
def test_plans_are_kept(generator):
    needs("cusparselt")
    if not library().ok:
        pytest.skip(library().reason)
    tensor = to_semi_structured(pruned(288, 224, torch.bfloat16, generator).cuda())  # a shape of this test's own
    x = torch.randn(64, 224, generator=generator).bfloat16().cuda()
    plans, searches = torch.ops.sparsekern_cuda.cusparselt_counts()
    for _ in range(5):
        semi_structured_linear(x, tensor)
        semi_structured_linear(x[:40], tensor)
    # One to search with, one for each number of tokens, whose algorithm is the same.
    assert torch.ops.sparsekern_cuda.cusparselt_counts() == (plans + 3, searches + 1)


@pytest.mark.gpu
def test_int8_multiplies_as_in_pytorch(generator):
    needs("cusparselt")
    weight = sparse_weight(64, 128, torch.int8, generator).cuda()
    tensor = to_semi_structured(weight, backend="cusparselt")
    x = torch.randint(0, 2, (32, 128), generator=generator, dtype=torch.int8)
    x[:, 8:] = 0  # so that no sum leaves the range of an int8
    assert torch.equal(functional.linear(x.cuda(), tensor).cpu(), x @ weight.cpu().T)


@pytest.mark.gpu
def test_products_do_not_change_the_weight(generator):
    """Neither searching nor multiplying may write to the compressed weight."""
    needs("cusparselt")
    weight = pruned(512, 256, torch.bfloat16, generator).cuda()
    tensor = to_semi_structured(weight)
    before = tensor.packed.clone()
    x = torch.randn(64, 256, generator=generator).bfloat16().cuda()
    products = [semi_structured_linear(x, tensor) for _ in range(3)]
    assert torch.equal(tensor.packed, before)
    assert all(torch.equal(product, products[0]) for product in products)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiles_on_a_gpu(generator, mode):
    needs("cusparselt")
    weight = pruned(256, 512, torch.bfloat16, generator).cuda()
    layer = torch.nn.Linear(512, 256, dtype=torch.bfloat16, device="cuda")
    layer.weight = torch.nn.Parameter(to_semi_structured(weight), requires_grad=False)
    torch._dynamo.reset()
    compiled = torch.compile(lambda y: torch.relu(layer(y)), fullgraph=True, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(64, 512, generator=generator).bfloat16().cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), torch.relu(layer(x)), rtol=0, atol=0)


@pytest.mark.gpu
def test_it_runs_on_the_current_stream(generator):
    needs("cusparselt")
    weight = pruned(256, 512, torch.bfloat16, generator).cuda()
    tensor = to_semi_structured(weight)
    x = torch.randn(64, 512, generator=generator).bfloat16().cuda()
    expected = semi_structured_linear(x, tensor)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        moved = x.clone()
        product = semi_structured_linear(moved, tensor)
    stream.synchronize()
    assert torch.equal(product, expected)


@pytest.mark.gpu
def test_a_captured_product_is_replayed_on_new_values(generator):
    needs("cusparselt")
    weight = pruned(256, 512, torch.bfloat16, generator).cuda()
    tensor = to_semi_structured(weight)
    static = torch.randn(64, 512, generator=generator).bfloat16().cuda()
    semi_structured_linear(static, tensor)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        product = semi_structured_linear(static, tensor)
    static.copy_(torch.randn(64, 512, generator=generator))
    graph.replay()
    assert torch.equal(product, semi_structured_linear(static, tensor))
