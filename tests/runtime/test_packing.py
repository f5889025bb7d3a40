import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

import sparsekern
from sparsekern import SparseLinear
from sparsekern.runtime import weight_bytes
from sparsekern.runtime.packing import packed_copy, smallest, unpacked_copy
from tests import tiny
from tests.models.families import tiny_model
from tests.runtime import packed


def packed_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def packed_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: model.get_submodule(name).dense_weight() for name in packed_names(model)}


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
    with pytest.raises(
        ValueError, match="model: none of its 22 linear layers gets smaller with format='packed'; 0.0% of their weights are zero"
    ):
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

    assert [smallest(weight(*pattern).bfloat16()) for pattern in ((2, 4), (1, 4), (1, 8), (4, 8))] == [
        "2:4",
        "1:4",
        "1:8",
        "bitmask",
    ]
    assert smallest(torch.rand(64, 64) + 1) is None
    assert smallest(weight(2, 4), "bitmask") == "bitmask" and smallest(weight(3, 4), "2:4") is None
    assert smallest(torch.zeros(64, 64)) is not None and smallest(torch.zeros(0, 64)) is None


def test_bytes_of_shared_weights_count_once():
    tied, untied = packed.llama(tie_word_embeddings=True), packed.llama()
    assert weight_bytes(untied) - weight_bytes(tied) == untied.lm_head.weight.nbytes
    views = nn.Module()
    for name, rows in (("whole", 10), ("part", 4)):
        views.register_buffer(name, untied.lm_head.weight.detach()[:rows])
    assert weight_bytes(views) == untied.lm_head.weight.nbytes


def test_half_the_weights_take_0_57_of_the_bytes():
    linear = packed.prune_linears(nn.Linear(1024, 512, bias=False, dtype=torch.bfloat16), 0.5)
    dense = weight_bytes(linear)
    assert weight_bytes(sparsekern.pack(nn.Sequential(linear), "bitmask")) <= 0.5775 * dense


def test_a_module_in_two_places_is_one_layer():
    linear = packed.prune_linears(nn.Linear(64, 64))
    model = sparsekern.pack(nn.ModuleDict({"a": linear, "b": nn.Sequential(linear)}))
    assert isinstance(model["a"], SparseLinear) and model["b"][0] is model["a"]
    assert sparsekern.unpack(model)["b"][0] is model["a"] and isinstance(model["a"], nn.Linear)


def test_a_format_that_is_named_is_the_only_one_afterwards(monkeypatch):
    model = packed.llama()
    packed.two_of_four(model.model.layers[0].mlp.gate_proj)
    expected = packed_weights(sparsekern.pack(model))
    formats = {name: model.get_submodule(name).format for name in expected}
    assert set(formats.values()) == {"2:4", "bitmask"}

    alive, unpack_one = [], SparseLinear.dense_weight

    def one_at_a_time(layer):
        assert not [weight for weight in alive if weight() is not None]
        alive.append(weakref.ref(found := unpack_one(layer)))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(SparseLinear, "dense_weight", one_at_a_time)
        sparsekern.pack(model, "bitmask")
    assert len(alive) == 2 and {model.get_submodule(name).format for name in expected} == {"bitmask"}
    with pytest.raises(
        ValueError, match="none of its 15 linear layers gets smaller with format='1:4'; 44.*% of their weights are zero"
    ):
        sparsekern.pack(model, "1:4")
    found = packed_weights(model)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    sparsekern.pack(model, "2:4")
    assert packed_names(model) == [name for name, format in formats.items() if format == "2:4"]
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, expected["model.layers.1.mlp.up_proj"])


def test_falcon_has_linears_of_its_own_class(tmp_path):
    model = tiny_model("falcon")
    sparsekern.prune(model, "magnitude", 0.6, out=tmp_path / "out", format="packed", progress=False)
    again = sparsekern.load(tmp_path / "out", device="cpu")
    assert len(packed_names(again)) == 12
    with torch.no_grad():
        torch.testing.assert_close(again(packed.ids()).logits, model(packed.ids()).logits, rtol=1e-4, atol=1e-5)


def test_weights_that_were_frozen_stay_so():
    model = packed.llama()
    model.model.layers[0].requires_grad_(False)
    sparsekern.unpack(sparsekern.pack(sparsekern.pack(model), "bitmask"))
    assert not any(parameter.requires_grad for parameter in model.model.layers[0].parameters())
    assert all(parameter.requires_grad for parameter in model.model.layers[1].parameters())


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
    with pytest.raises(ValueError, match="format: expected 'packed', 'bitmask', 'N:M' or 'N:M-q4', got 'csr'"):
        sparsekern.pack(packed.llama(), "csr")
    model = packed.llama()
    model.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match="model.layers.0.mlp.up_proj: expected no hooks, since packing would lose them; remove them first"
    ):
        sparsekern.pack(model)
    assert not packed_names(model)
    assert packed_names(sparsekern.pack(model, exclude="*.0.mlp.up_proj"))
    with pytest.raises(TypeError, match="model: expected a module, got str"):
        sparsekern.unpack("gpt2")


@pytest.mark.parametrize("spoil", [
    lambda layer: layer.register_forward_pre_hook(lambda *_: None),
    lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    lambda layer: setattr(layer, "forward", layer.forward),
])  # fmt: skip
def test_hooks_are_not_lost(spoil, tmp_path):
    model = packed.llama()
    spoil(model.model.layers[0].mlp.up_proj)
    with pytest.raises(
        ValueError, match="layers.0.mlp.up_proj: expected no hooks, since packing would lose them; .*, or leave it out with exclude"
    ):
        sparsekern.pack(model)
    assert packed_names(packed_copy(model)) and not packed_names(model)  # to be saved, they are not needed
    model = sparsekern.pack(packed.llama())
    names = packed_names(model)
    spoil(model.model.layers[0].mlp.up_proj)
    with pytest.raises(
        ValueError, match="model.layers.0.mlp.up_proj: expected no hooks, since unpacking would lose them; remove them first$"
    ):
        sparsekern.unpack(model)
    assert packed_names(model) == names and not packed_names(unpacked_copy(model))


def _masked() -> nn.Module:
    linear = nn.Linear(64, 64)
    prune.l1_unstructured(linear, "weight", 0.5)
    return nn.Sequential(linear)


@pytest.mark.parametrize(
    "make, options, message",
    [
        (
            lambda: nn.Linear(64, 64),
            {},
            "model: expected linear layers, got a Linear without any; SparseLinear.from_linear packs one layer",
        ),
        (lambda: nn.ReLU(), {}, "model: expected linear layers, got a ReLU without any$"),
        (
            lambda: packed.llama().double(),
            {},
            r"none of its 15 linear layers can be packed \(15: the weight is float64, expected float32",
        ),
        (_masked, {}, r"none of its 1 linear layers can be packed \(1: the weight is computed from other tensors\)"),
        (lambda: nn.MultiheadAttention(64, 4), {}, "NonDynamicallyQuantizableLinear may do more than multiply"),
        (packed.llama, {"include": []}, "include, exclude: together they leave none of the 15 linear layers to pack"),
        (
            lambda: packed.llama().to("meta"),
            {},
            "lm_head: expected a weight in memory, got an offloaded one, which is not supported",
        ),
    ],
)
def test_nothing_to_pack(make, options, message):
    with pytest.raises(ValueError, match=message):
        sparsekern.pack(make(), **options)


def test_an_offloaded_model_is_not_unpacked():
    model = sparsekern.pack(packed.llama()).to("meta")
    with pytest.raises(ValueError, match="expected a weight in memory, got an offloaded one, which is not supported"):
        sparsekern.unpack(model)
    assert packed_names(model)


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
