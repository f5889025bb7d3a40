import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import sparsekern
from sparsekern import SparseLinear
from sparsekern.runtime import weight_bytes
from sparsekern.runtime.packing import packed_copy, smallest, unpacked_copy
from tests import tiny
from tests.runtime import packed


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


@pytest.mark.parametrize("make", [packed.llama, packed.gpt2])
def test_pack_and_unpack(make):
    model = make()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        expected = model(packed.ids()).logits
        assert sparsekern.pack(model) is model
        assert len(packed_names(model)) == (14 if make is packed.llama else 8)
        assert torch.allclose(model(packed.ids()).logits, expected, atol=1e-5)
    assert sparsekern.unpack(model) is model and not packed_names(model)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model.config, "quantization_config") and not model.is_quantized


def test_what_gets_no_smaller_stays_dense():
    model = tiny.llama()
    with pytest.raises(ValueError, match="model: none of its 22 linear layers gets smaller with format='auto'; is it pruned?"):
        sparsekern.pack(model)
    packed.prune_linears(model.model.layers[1])
    sparsekern.pack(model)
    assert {name.split(".")[2] for name in packed_names(model)} == {"1"}
    sparsekern.pack(model)  # once more does no harm


def test_tied_weights_stay_tied():
    model = packed.prune_linears(packed.llama(tie_word_embeddings=True), skip="")
    sparsekern.pack(model)
    assert isinstance(model.lm_head, nn.Linear) and model.lm_head.weight is model.model.embed_tokens.weight
    untied = packed.prune_linears(packed.llama(), skip="")
    assert "lm_head" in packed_names(sparsekern.pack(untied))


def test_globs():
    names = packed_names(sparsekern.pack(packed.llama(), include="*.mlp.*", exclude=["*.0.*"]))
    assert names == [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    with pytest.raises(ValueError, match=r"include: '\*.nothing' matches no linear of the model"):
        sparsekern.pack(packed.llama(), include="*.nothing")
    with pytest.raises(TypeError, match="exclude: expected names or globs, got 3"):
        sparsekern.pack(packed.llama(), exclude=[3])


def test_the_format_that_is_smallest():
    def weight(keep: int, of: int) -> torch.Tensor:
        kept = torch.rand(64, 512 // of, of).argsort(-1) < keep
        return (torch.rand(64, 512) + 1) * kept.view(64, 512)

    assert [smallest(weight(*pattern).bfloat16()) for pattern in ((2, 4), (1, 4), (1, 8), (4, 8))] == ["2:4", "1:4", "1:8", "bitmask"]
    assert smallest(torch.rand(64, 64) + 1) is None
    assert smallest(weight(2, 4), "bitmask") == "bitmask" and smallest(weight(3, 4), "2:4") is None
    assert smallest(torch.zeros(64, 64)) is not None and smallest(torch.zeros(0, 64)) is None


def test_half_the_weights_take_0_57_of_the_bytes():
    linear = packed.prune_linears(nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16), 0.5)
    dense = weight_bytes(linear)
    assert weight_bytes(sparsekern.pack(nn.Sequential(linear), "bitmask")) <= 0.5775 * dense


def test_a_module_in_two_places_is_one_layer():
    linear = packed.prune_linears(nn.Linear(64, 64))
    model = sparsekern.pack(nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)}))
    assert isinstance(model["a"], SparseLinear) and model["b"][0] is model["a"]
    assert sparsekern.unpack(model)["b"][0] is model["a"] and isinstance(model["a"], nn.Linear)


def test_what_is_no_plain_linear_stays():
    weird = parametrizations.weight_norm(packed.prune_linears(nn.Linear(64, 64)))
    tied = nn.Linear(64, 64), nn.Linear(64, 64)
    tied[1].weight = tied[0].weight
    double = packed.prune_linears(nn.Linear(64, 64).double())
    model = nn.ModuleList([packed.prune_linears(nn.Linear(64, 64)), weird, double, *tied])
    packed.prune_linears(model)
    assert packed_names(sparsekern.pack(model)) == ["0"]


def test_copies_share_what_is_dense_and_leave_the_model_alone():
    model = packed.llama()
    copy = packed_copy(model)
    assert packed_names(copy) and not packed_names(model) and not hasattr(model.config, "quantization_config")
    assert copy.model.embed_tokens.weight is model.model.embed_tokens.weight
    again = unpacked_copy(copy)
    assert packed_names(copy) and not packed_names(again)
    assert torch.equal(again.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.weight)


def test_bad_input():
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        sparsekern.pack("gpt2")
    with pytest.raises(ValueError, match="format: expected 'bitmask' or 'N:M', got 'csr'"):
        sparsekern.pack(packed.llama(), "csr")
    model = packed.llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj: has hooks, which packing would lose; remove them first"):
        sparsekern.pack(model)
    assert not packed_names(model)
    assert packed_names(sparsekern.pack(model, exclude="*.0.mlp.up_proj"))


def test_a_packed_model_is_not_pruned():
    with pytest.raises(ValueError, match=r"model: its linears are packed; sparsekern.unpack\(model\) makes them dense again"):
        sparsekern.prune(sparsekern.pack(packed.llama()), "magnitude")


def test_a_model_that_another_program_quantised():
    class Quantizer:
        class quantization_config:
            quant_method = "gptq"

    model = packed.llama()
    model.hf_quantizer = Quantizer()
    with pytest.raises(ValueError, match="model: expected one in floating point, got one quantised by gptq"):
        sparsekern.pack(model)
