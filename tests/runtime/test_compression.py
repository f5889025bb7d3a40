"""2:4 layers that hold their weight a second time for cuSPARSELt.

Without a GPU "cuSPARSELt" is a stand-in, as in `test_semi_structured`; the tests of what is refused and left alone go without one.
"""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
from torch.nn import functional

from sparsekern import SparseLinear
from sparsekern.runtime import compress, drop_compressed, sparse_linear, weight_bytes
from sparsekern.runtime.cusparselt import FEWEST_TOKENS, supports
from tests.ops.test_nm_linear import nm_weight

from .test_semi_structured import HALVES, assert_close_to_exact, needs, on_cpu  # noqa: F401  (a fixture)

BF16 = torch.bfloat16


def layer(generator: torch.Generator, dtype: torch.dtype = BF16, format: str = "2:4", shape=(64, 128)) -> SparseLinear:
    n, m = map(int, format.split(":"))
    linear = torch.nn.Linear(*shape[::-1], dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(nm_weight(shape[0], shape[1] // m, n, m, dtype, generator))
        linear.bias.copy_(torch.randn(shape[0], generator=generator))
    linear.requires_grad_(False)
    return SparseLinear.from_linear(linear, format)


def tokens(generator: torch.Generator, *shape: int, features: int = 128, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(*shape, features, generator=generator).to(dtype)


def dense(kept: SparseLinear, x: torch.Tensor) -> torch.Tensor:
    product = functional.linear(x.reshape(-1, x.shape[-1]), kept.dense_weight(), kept.bias)
    return product.view(*x.shape[:-1], -1)


@pytest.fixture
def stand_in(monkeypatch, on_cpu):  # noqa: F811
    """Lets a layer on the CPU hold its dense weight for the compressed one; the shapes of what is multiplied by that."""
    monkeypatch.setattr(torch, "_cslt_compress", torch.clone)
    monkeypatch.setattr(sparse_linear, "supports_on", lambda device, *weight: supports(*weight, (9, 0), True))
    return on_cpu


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({}, ""),
        ({"dtype": torch.float16, "capability": (8, 0)}, ""),
        ({"shape": (16, 4096)}, ""),
        ({"format": "bitmask"}, "its format is 'bitmask', and cuSPARSELt multiplies by '2:4'"),
        ({"format": "1:4"}, "its format is '1:4', and cuSPARSELt multiplies by '2:4'"),
        ({"dtype": torch.float32}, "its values are float32, expected bfloat16 or float16"),
        ({"shape": (40, 64)}, "its shape is (40, 64), expected a positive multiple of (16, 16)"),
        ({"shape": (64, 40)}, "its shape is (64, 40), expected a positive multiple of (16, 16)"),
        ({"shape": (0, 64)}, "its shape is (0, 64), expected a positive multiple of (16, 16)"),
        ({"capability": None}, "it is not on a CUDA device"),
        ({"capability": (7, 5)}, "its device has compute capability 7.5, expected at least 8.0"),
        ({"has_library": False}, "this PyTorch has no cuSPARSELt"),
    ],
)
def test_what_cusparselt_can_hold(changed, reason):
    asked = {"format": "2:4", "shape": (64, 128), "dtype": BF16, "capability": (9, 0), "has_library": True} | changed
    assert supports(**asked) == (not reason, reason)


def test_where_it_cannot_be_had_it_is_refused_and_changes_nothing(generator):
    kept = layer(generator)
    x = tokens(generator, FEWEST_TOKENS)
    before, bytes_before = kept(x), weight_bytes(kept)
    with pytest.raises(ValueError, match="SparseLinear: cuSPARSELt cannot hold this weight, it is not on a CUDA device"):
        kept.compress()
    assert not kept.keeps_compressed and kept.compressed is None and weight_bytes(kept) == bytes_before
    assert torch.equal(kept(x), before)
    kept.drop_compressed()


def test_a_model_of_which_no_layer_can_is_refused(generator):
    model = torch.nn.Sequential(layer(generator), layer(generator, format="1:4"))
    message = "model: cuSPARSELt can hold none of its 2 packed layers; 0: it is not on a CUDA device"
    with pytest.raises(ValueError, match=re.escape(message)):
        compress(model)
    assert drop_compressed(model) is model
    with pytest.raises(ValueError, match="model: expected packed layers, got a Linear without any; sparsekern.pack makes them"):
        compress(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match="model: expected a module, got Tensor"):
        compress(torch.zeros(3))


def test_of_a_model_the_layers_that_can_hold_it(generator, stand_in):
    model = torch.nn.Sequential(layer(generator), layer(generator, format="1:4"), layer(generator, torch.float32))
    packed = weight_bytes(model)
    assert compress(model) is model
    assert [part.compressed is not None for part in model] == [part.keeps_compressed for part in model] == [True, False, False]
    assert weight_bytes(model) == packed + model[0].compressed.nbytes and ", compressed)" in repr(model[0])
    drop_compressed(model)
    assert weight_bytes(model) == packed and model[0].compressed is None
    model[0].values[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"0: weight: expected no NaN, got nan at \[0, "):
        compress(model)
    assert not model[0].keeps_compressed and model.half()[0].compressed is None


@HALVES
def test_it_multiplies_many_tokens(generator, stand_in, dtype):
    kept = layer(generator, dtype)
    x = tokens(generator, 2, FEWEST_TOKENS, dtype=dtype)
    packed = kept(x[0]), kept(x[0, 1:])
    kept.compress()
    for given in (x, x[0], x.transpose(0, 1), x.transpose(1, 2).contiguous().transpose(1, 2)):
        assert torch.equal(kept(given), dense(kept, given))
    assert stand_in == [(2 * FEWEST_TOKENS, 128), (FEWEST_TOKENS, 128), *[(2 * FEWEST_TOKENS, 128)] * 2]
    torch.testing.assert_close(kept(x[0]), packed[0])
    del stand_in[:]
    assert torch.equal(kept(x[0, 1:]), packed[1]) and kept(x[0, 0]).shape == (64,) and not stand_in
    x.requires_grad_()
    kept(x).sum().backward()
    assert stand_in and torch.allclose(x.grad, kept.dense_weight().sum(0).expand_as(x), rtol=1e-2, atol=1e-2)
    with pytest.raises(ValueError, match="x: expected 128 input features, got 64"):
        kept(x[..., :64])
    with pytest.raises(TypeError, match="x: expected torch.*, the dtype of the packed values, got torch.float32"):
        kept(x.float())


def test_it_is_not_saved(generator, stand_in):
    kept = layer(generator)
    names = set(kept.state_dict())
    kept.compress()
    assert set(kept.state_dict()) == names and kept.check() is None and set(kept.tensors) == {"values", "codes"}


@pytest.mark.parametrize(
    "write",
    [
        lambda kept: kept.values.mul_(2),
        lambda kept: setattr(kept.values, "data", 2 * kept.values.data),
        lambda kept: setattr(kept, "values", torch.nn.Parameter(2 * kept.values, requires_grad=False)),
        lambda kept: kept.load_state_dict({**kept.state_dict(), "values": 2 * kept.values}),
        lambda kept: kept.load_state_dict({**kept.state_dict(), "values": 2 * kept.values}, assign=True),
    ],
)
def test_it_follows_the_packed_weight(generator, stand_in, write):
    kept = layer(generator)
    kept.compress()
    x = tokens(generator, FEWEST_TOKENS)
    before = kept.compressed.clone()
    assert torch.equal(kept(x), dense(kept, x))
    write(kept)
    assert torch.equal(kept(x), dense(kept, x)) and torch.equal(kept.compressed, 2 * before) and len(stand_in) == 2
    current = kept.compressed
    kept(x)
    assert kept.compressed is current


def test_tensors_that_lie_where_others_lay_are_not_taken_for_them(generator, stand_in):
    kept = layer(generator)
    kept.compress()
    x, values = tokens(generator, FEWEST_TOKENS), kept.values.clone()
    for factor in range(2, 8):  # memory that is freed by the first is what the second gets, as a rule
        kept.values = torch.nn.Parameter(-values, requires_grad=False)
        kept.values = torch.nn.Parameter(factor * values, requires_grad=False)
        assert torch.equal(kept(x), dense(kept, x))


def test_a_state_dict_with_a_nan_is_refused_by_the_name_of_the_layer(generator, stand_in):
    model = torch.nn.Sequential(layer(generator), layer(generator))
    compress(model)
    given = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    given["0.values"][0, 0], given["1.bias"][0] = float("nan"), 7
    with pytest.raises(RuntimeError, match=r"0: weight: expected no NaN, got nan at \[0, "):
        model.load_state_dict(given)
    assert model[0].compressed is None and model[1].bias[0] == 7


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda kept: pickle.loads(pickle.dumps(kept))])
def test_a_copy_has_its_own(generator, stand_in, duplicate):
    kept = layer(generator)
    kept.compress()
    kept.values.mul_(2)  # seen by the copy, whose own tensors were never written to
    other, x = duplicate(kept), tokens(generator, FEWEST_TOKENS)
    other.values.neg_()
    assert torch.equal(other(x), dense(other, x)) and torch.equal(kept(x), dense(kept, x))
    assert torch.equal(other.compressed, -kept.compressed) and len(stand_in) == 2


def test_it_follows_moves(generator, stand_in):
    kept = layer(generator)
    kept.compress()
    for dtype in (torch.float16, torch.float32, BF16):
        kept.to(dtype)
        x = tokens(generator, FEWEST_TOKENS, dtype=dtype)
        del stand_in[:]
        torch.testing.assert_close(kept(x), dense(kept, x))
        if dtype == torch.float32:
            assert kept.compressed is None and not stand_in
        else:
            assert kept.compressed.dtype == dtype and torch.equal(kept.compressed, kept.dense_weight()) and len(stand_in) == 1
    with pytest.raises(TypeError, match="expected float32, bfloat16 or float16, got float64"):
        kept.double()
    assert torch.equal(kept.compressed, kept.dense_weight())


def test_without_a_device_that_can_the_layer_goes_on_packed(generator, stand_in, monkeypatch):
    kept = layer(generator)
    kept.compress()
    monkeypatch.undo()  # from here on it is what it is: a layer on a CPU
    kept.to("cpu")
    x = tokens(generator, FEWEST_TOKENS)
    assert kept.compressed is None and kept(x).shape == (FEWEST_TOKENS, 64)
    assert kept.to("meta").compressed is None and kept.keeps_compressed


def test_weights_made_in_inference_mode(generator, stand_in):
    with torch.inference_mode():
        kept = layer(generator)
        kept.compress()
        x = tokens(generator, FEWEST_TOKENS)
        assert torch.equal(kept(x), dense(kept, x)) and torch.equal(kept(x), dense(kept, x)) and len(stand_in) == 2


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles(generator, stand_in, dynamic):
    kept = layer(generator)
    kept.compress()
    called = []

    def record(graph, example_inputs):
        called.append(
            [str(node.target) for node in graph.graph.nodes if node.op == "call_function" and "sparsekern" in str(node.target)]
        )
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(kept, fullgraph=True, backend=record, dynamic=dynamic)
    with torch.no_grad():
        for count in (FEWEST_TOKENS, 4, FEWEST_TOKENS + 40, 5):
            x = tokens(generator, 2, count)
            assert torch.equal(compiled(x), kept(x))
    many, few = ["sparsekern.cusparselt_linear.default"], ["sparsekern.nm_linear.default"]
    assert called[:2] == [many, few] and all(one in (many, few) for one in called)


# ---- on a GPU


def on_gpu(generator: torch.Generator, dtype: torch.dtype = BF16, shape=(256, 512)) -> SparseLinear:
    needs("cusparselt")
    kept = layer(generator, dtype, shape=shape).cuda()
    kept.compress()
    return kept


@pytest.mark.gpu
@HALVES
def test_products_on_a_gpu_are_as_exact_as_dense_ones(generator, dtype):
    kept = on_gpu(generator, dtype)
    weight, bias = kept.dense_weight(), kept.bias.clone()
    kept.bias.zero_()
    assert torch.equal(kept(torch.eye(512, dtype=dtype, device="cuda")).T, weight)
    kept.bias.copy_(bias)
    for shape in ((FEWEST_TOKENS,), (3, 111), (1, 4096), (4,), (1,)):
        x = tokens(generator, *shape, features=512, dtype=dtype).cuda()
        flat = x.flatten(0, -2)
        assert_close_to_exact(kept(x).flatten(0, -2), flat, weight, kept.bias)


@pytest.mark.gpu
def test_it_follows_writes_and_moves_on_a_gpu(generator):
    kept, other = on_gpu(generator), layer(generator, shape=(256, 512))
    x = tokens(generator, 300, features=512).cuda()
    kept.load_state_dict(other.state_dict())
    assert_close_to_exact(kept(x), x, other.dense_weight().cuda(), other.bias.cuda())
    kept.values.mul_(2)
    assert_close_to_exact(kept(x), x, kept.dense_weight(), kept.bias)
    again = copy.deepcopy(kept).cpu().cuda().half()
    assert again.compressed.dtype == torch.float16
    assert_close_to_exact(again(x.half()), x.half(), again.dense_weight(), again.bias)


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_it_compiles_on_a_gpu(generator, mode):
    kept = on_gpu(generator)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: torch.relu(kept(x)), fullgraph=True, mode=mode)
    with torch.no_grad():
        for count in (300, 300, 8, 8, 300):
            x = tokens(generator, count, features=512).cuda()
            torch.compiler.cudagraph_mark_step_begin()
            torch.testing.assert_close(compiled(x), torch.relu(kept(x)))


@pytest.mark.gpu
def test_a_captured_product_is_replayed(generator):
    kept = on_gpu(generator)
    static = tokens(generator, 300, features=512).cuda()
    kept(static)  # searches
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        product = kept(static)
    static.copy_(tokens(generator, 300, features=512))
    graph.replay()
    assert torch.equal(product, kept(static))


@pytest.mark.gpu
def test_it_costs_as_much_memory_as_it_says(generator):
    kept = on_gpu(generator, shape=(4096, 4096))
    packed = sum(tensor.nbytes for tensor in kept.tensors.values())
    assert packed <= 0.57 * 2 * 4096**2 and kept.compressed.nbytes <= 1.01 * packed
    before = torch.cuda.memory_allocated()
    kept.drop_compressed()
    assert before - torch.cuda.memory_allocated() >= 0.99 * packed
