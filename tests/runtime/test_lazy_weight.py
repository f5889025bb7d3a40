"""Models that read the weight of a packed layer: it is unpacked by operations, and not by questions about its shape and dtype."""

from __future__ import annotations

import pytest
import torch
import transformers as tf
from transformers.pytorch_utils import Conv1D

import sparsekern
from sparsekern.runtime.lazy_weight import LazyWeight

SMALL = dict(vocab_size=64, num_hidden_layers=2)
READERS = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=64, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    ),
    "mamba": lambda: tf.MambaForCausalLM(tf.MambaConfig(**SMALL, hidden_size=64, state_size=8, time_step_rank=16)),
}


def sparse(linear: torch.nn.Module) -> torch.nn.Module:
    linear.weight.data.mul_(torch.rand_like(linear.weight) < 0.4)
    return linear


@pytest.mark.parametrize("kind", READERS)
def test_models_that_read_it(kind):
    torch.manual_seed(0)
    model = READERS[kind]().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            sparse(module)
    given = {"input_ids": torch.tensor([[5, 6, 7, 8]])} | ({"decoder_input_ids": torch.tensor([[0, 3]])} if kind == "t5" else {})
    with torch.no_grad():
        expected = model(**given).logits
        packed = sparsekern.pack(model)(**given).logits
    assert any(isinstance(module, sparsekern.SparseLinear) for module in model.modules())
    torch.testing.assert_close(packed, expected, rtol=1e-4, atol=1e-5)


def test_only_operations_unpack_it(monkeypatch):
    linear = sparse(torch.nn.Linear(64, 32))
    layer, unpacked = sparsekern.SparseLinear.from_linear(linear, "bitmask"), []
    whole = layer.dense_weight
    monkeypatch.setattr(layer, "dense_weight", lambda: unpacked.append(0) or whole())
    weight = layer.weight
    assert isinstance(weight, LazyWeight) and not unpacked
    assert (weight.shape, weight.dtype, weight.device) == (linear.weight.shape, torch.float32, linear.weight.device)
    assert "LazyWeight" in repr(weight) and not unpacked
    assert torch.equal(weight.T[3], linear.weight.T[3]) and unpacked
    x = torch.randn(2, 64)
    assert torch.equal(torch.nn.functional.linear(x, weight), torch.nn.functional.linear(x, linear.weight))
    assert "weight" not in layer.state_dict()


def test_that_of_a_conv1d_is_stored_as_its_own():
    conv = sparse(Conv1D(48, 64))
    weight = sparsekern.SparseLinear.from_linear(conv, "bitmask").weight
    assert weight.shape == conv.weight.shape and torch.equal(weight + 0, conv.weight)


@pytest.mark.parametrize("write", [lambda w: w.mul_(2), lambda w: w.zero_(), lambda w: torch.add(w, w, out=w)])
def test_it_is_not_written_to(write):
    layer = sparsekern.SparseLinear.from_linear(sparse(torch.nn.Linear(64, 32)), "bitmask")
    with pytest.raises(ValueError, match="weight: expected to be read only, since it is packed"):
        write(layer.weight)
