import copy
import re

import pytest
import torch
from torch import nn

from sparsekern import SparseLinear
from tests.runtime.packed import prune_linears

FORMATS = ("bitmask", "2:4", "3:8")


def sparse_linear(format: str = "bitmask", dtype: torch.dtype = torch.float32, *, bias: bool = True, shape=(40, 64)) -> nn.Linear:
    """A dense linear whose weight fits the format."""
    linear = nn.Linear(shape[1], shape[0], bias=bias, dtype=dtype)
    if format == "bitmask":
        return prune_linears(linear)
    n, m = map(int, format.split(":"))
    with torch.no_grad():
        linear.weight.mul_((torch.rand(shape[0], shape[1] // m, m).argsort(-1) < n).view(shape))
    return linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("format", FORMATS)
def test_it_is_the_dense_layer(format, dtype):
    linear = sparse_linear(format, dtype, bias=format != "2:4")
    layer = SparseLinear.from_linear(linear, format)
    assert torch.equal(layer.dense_weight(), linear.weight)
    for shape in ((64,), (1, 64), (2, 3, 64), (0, 64)):
        x = torch.randn(shape, dtype=dtype)
        bias = None if linear.bias is None else linear.bias.detach().double()
        expected = nn.functional.linear(x.double(), linear.weight.detach().double(), bias)
        scale = expected.abs().max() if expected.numel() else 1
        assert layer(x).shape == expected.shape and layer(x).dtype == dtype
        assert torch.allclose(layer(x).detach().double(), expected, rtol=0, atol=2 * torch.finfo(dtype).eps * float(scale))
    again = layer.to_linear()
    assert type(again) is nn.Linear and again.bias is linear.bias and torch.equal(again.weight, linear.weight)
    assert again.weight.requires_grad


def test_gradients_flow_to_input_and_bias_only():
    linear = sparse_linear()
    layer = SparseLinear.from_linear(linear, "bitmask")
    x = torch.randn(2, 3, 64, requires_grad=True)
    upstream = torch.randn(2, 3, 40)
    layer(x).backward(upstream)
    found = x.grad, linear.bias.grad
    x.grad = linear.bias.grad = None
    linear(x).backward(upstream)
    assert torch.allclose(found[0], x.grad, atol=1e-5) and torch.allclose(found[1], linear.bias.grad, atol=1e-5)
    assert all(not tensor.requires_grad for tensor in layer.tensors.values())
    with torch.no_grad():
        assert not layer(x).requires_grad


@pytest.mark.parametrize("format", FORMATS)
def test_state_dict_round_trip(format):
    layer = SparseLinear.from_linear(sparse_linear(format), format)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert set(state) == {*layer.tensors, "bias"}
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.bias.zero_()
    other.load_state_dict(state)
    assert torch.equal(other.bias, layer.bias) and torch.equal(other.dense_weight(), layer.dense_weight())


@pytest.mark.parametrize(
    "name, damage, message",
    [
        ("bitmask", lambda t: t.fill_(-1), "values: expected 5248 values for the bits set in bitmask"),
        ("starts", lambda t: t.add_(1 << 40), "starts: expected the first slot after the values of earlier tiles"),
        ("order", lambda t: t.fill_(7), "order: expected each row from 0 to 39 once"),
    ],
)
def test_a_damaged_state_dict_is_refused_and_changes_nothing(name, damage, message):
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask")
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    damage(state[name])
    with pytest.raises(RuntimeError, match=re.escape(message.split(" 5248")[0])):
        layer.load_state_dict(state)
    layer.check()


def test_a_state_dict_of_another_size_is_refused():
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask")
    state = layer.state_dict()
    state["values"] = state["values"][:-64]
    with pytest.raises(RuntimeError, match="size mismatch for values"):
        layer.load_state_dict(state)
    del state["values"]
    with pytest.raises(RuntimeError, match='Missing key.*"values"'):
        layer.load_state_dict(state)


def test_deepcopy_shares_nothing():
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask")
    other = copy.deepcopy(layer)
    other.tensors["values"].zero_()
    assert torch.equal(layer.dense_weight(), layer.to_linear().weight) and layer.dense_weight().any()
    assert not other.dense_weight().any()


@pytest.mark.parametrize("format", FORMATS)
def test_dtype_moves(format):
    layer = SparseLinear.from_linear(sparse_linear(format), format)
    dense = layer.dense_weight()
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float16):
        dense = dense.to(dtype)
        assert layer.to(dtype) is layer and layer.dtype == layer.bias.dtype == dtype
        layer.check()
        assert torch.equal(layer.dense_weight(), dense)
        assert layer(torch.randn(3, 64, dtype=dtype)).dtype == dtype
    assert not any(parameter.requires_grad for name, parameter in layer.named_parameters() if name != "bias")


@pytest.mark.parametrize("move, dtype", [(lambda m: m.double(), "float64"), (lambda m: m.to(torch.float8_e5m2), "float8_e5m2")])
def test_dtypes_that_no_kernel_takes(move, dtype):
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask")
    with pytest.raises(
        TypeError, match=f"SparseLinear: expected float32, bfloat16 or float16, got {dtype}; sparsekern.unpack makes"
    ):
        move(layer)
    assert layer.dtype == torch.float32
    layer.check()


def test_device_moves():
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask").to("meta")
    assert layer.device.type == "meta" and all(tensor.is_meta for tensor in layer.state_dict().values())
    assert layer(torch.empty(3, 64, device="meta")).shape == (3, 40)
    with pytest.raises(NotImplementedError, match="SparseLinear: a layer without data cannot be converted to float16"):
        layer.half()


def test_repr():
    layer = SparseLinear.from_linear(sparse_linear("2:4", torch.bfloat16, bias=False), "2:4")
    assert repr(layer) == "SparseLinear(in_features=64, out_features=40, bias=False, format=2:4, density=50.0%)"


def test_autocast():
    layer = SparseLinear.from_linear(sparse_linear("bitmask", torch.bfloat16), "bitmask")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(2, 64)).dtype == torch.bfloat16
    with pytest.raises(TypeError, match="float32"):
        layer(torch.randn(2, 64))


def test_compile_without_a_break_in_the_graph():
    layer = SparseLinear.from_linear(sparse_linear(), "bitmask")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
    x.requires_grad_()
    compiled(x).sum().backward()
    assert torch.allclose(x.grad, layer.dense_weight().sum(0).expand(3, -1), atol=1e-5)


@pytest.mark.parametrize(
    "linear, format, kind, message",
    [
        (nn.Embedding(4, 4), "bitmask", TypeError, "linear: expected an nn.Linear or a Conv1D, got Embedding"),
        (nn.Linear(8, 8), "2:4", ValueError, "weight: expected at most 2 non-zeros in every 4 inputs"),
        (nn.Linear(8, 8, dtype=torch.float64), "bitmask", TypeError, "weight: expected .*float64"),
        (nn.Linear(8, 8), "csr", ValueError, "format: expected 'bitmask', 'N:M', 'N:M-q4' or 'int8', got 'csr'"),
    ],
)
def test_bad_input(linear, format, kind, message):
    with pytest.raises(kind, match=message):
        SparseLinear.from_linear(linear, format)


def test_tensors_that_are_not_the_format_s():
    with pytest.raises(ValueError, match="tensors: expected values, bitmask, starts, order, got none"):
        SparseLinear("bitmask", (2, 3), {})
    tensors = SparseLinear.from_linear(sparse_linear(), "bitmask").tensors
    with pytest.raises(ValueError, match="tensors: expected values, codes, got bitmask, order, starts, values"):
        SparseLinear("2:4", (40, 64), tensors)
    with pytest.raises(ValueError, match=r"shape: expected \(out_features, in_features\), got \(40,\)"):
        SparseLinear("bitmask", (40,), tensors)


@pytest.mark.parametrize(
    "x, kind, message",
    [
        (None, TypeError, "x: expected a tensor, got NoneType"),
        ([1.0] * 64, TypeError, "x: expected a tensor, got list"),
        (torch.tensor(1.0), ValueError, "x: expected 64 input features, got a scalar"),
        (torch.ones(2, 63), ValueError, "x: expected 64 input features, got 63"),
    ],
)
def test_inputs_that_are_none(x, kind, message):
    with pytest.raises(kind, match=message):
        SparseLinear.from_linear(sparse_linear(), "bitmask")(x)
