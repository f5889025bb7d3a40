"""A model with adapters is refused by name before any work: peft's, and one of its structure."""

import copy
import json

import pytest
import torch
from torch import nn

import sparsekern
from tests import tiny


class LoraLinear(nn.Module):
    """As peft's LoRA layer: the linear inside, and two matrices for each adapter beside it."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 4, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(4, base_layer.out_features, bias=False)})

    def forward(self, x):
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class OtherLayer(LoraLinear):
    """As peft's layers of other kinds, which list the names of their adapters' parts."""

    adapter_layer_names = ("down",)

    def __init__(self, base_layer):
        nn.Module.__init__(self)
        self.base_layer, self.down = base_layer, nn.Linear(2, 2)


class PeftModel(nn.Module):
    """As peft's wrapper."""

    def __init__(self, model):
        super().__init__()
        self.base_model = nn.Module()
        self.base_model.model = model
        self.peft_config = {"default": object()}

    def save_pretrained(self, path):
        raise AssertionError("only the adapter would be saved")


def with_layer(kind):
    model = tiny.llama()
    attention = model.model.layers[1].self_attn
    attention.q_proj = kind(attention.q_proj)
    return model


def loaded_by_transformers():
    model = with_layer(LoraLinear)
    model._hf_peft_config_loaded = True
    return model


def marked_only():
    model = tiny.llama()
    model._hf_peft_config_loaded = True
    return model


def peft_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))


def prompt_model():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    return peft.get_peft_model(tiny.llama(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


ADAPTED = {
    "wrapped": lambda: PeftModel(with_layer(LoraLinear)),
    "injected": lambda: with_layer(LoraLinear),
    "of another kind": lambda: with_layer(OtherLayer),
    "by transformers": loaded_by_transformers,
    "marked": marked_only,
    "peft": peft_model,
    "peft's prompt": prompt_model,
}


@pytest.mark.parametrize("name", ADAPTED)
def test_a_model_with_an_adapter_is_refused(tmp_path, name):
    model = ADAPTED[name]()
    before = copy.deepcopy(model.state_dict())
    ids = torch.randint(3, 90, (2, 8))
    message = "model: expected one without adapters, got a .* with an adapter.*; merge the adapter into its base model first"
    for call in (
        lambda: sparsekern.prune(model, "magnitude", "2:4", progress=False),
        lambda: sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "out"),
        lambda: sparsekern.prune_continually(model, {"a": ids}, "wanda", progress=False),
        lambda: sparsekern.save(model, tmp_path / "out"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not (tmp_path / "out").exists()


def test_what_was_merged_is_an_ordinary_model(tmp_path):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(tiny.llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    report = sparsekern.prune(model.merge_and_unload(), "magnitude", "2:4", progress=False, out=tmp_path / "out")
    assert report.sparsity == 0.5 and sparsekern.load(tmp_path / "out", device="cpu")


@pytest.mark.parametrize("whole", [False, True])
def test_a_folder_with_an_adapter_is_refused(tmp_path, whole):
    if whole:
        tiny.save_folder(tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "x"}))
    with pytest.raises(ValueError, match="holds an adapter .*, expected a whole model; merge the adapter into its base model"):
        sparsekern.load(tmp_path, device="cpu")
