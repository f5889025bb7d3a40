"""Bad input: each message names what was expected and what came, and nothing is changed."""

import copy
import warnings

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import SparseGPT, SparsekernWarning
from sparsekern.backends.libraries import LIBRARIES
from sparsekern.methods import METHODS
from tests.models.families import tiny_ids, tiny_model

QUIET = {"progress": False}


@pytest.fixture
def model():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    yield model
    # Not a weight may have moved where a call was refused; the tests that prune change `model.pruned`.
    if not getattr(model, "pruned", False):
        for name, value in model.state_dict().items():
            assert torch.equal(value.nan_to_num(9), before[name].nan_to_num(9)) or name in getattr(model, "spoilt", ()), name


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"method": "optimal"}, ValueError, f"method: expected one of {', '.join(sorted(METHODS))}"),
        ({"method": 3}, TypeError, "method: expected a name or a config"),
        ({"pattern": "4:2"}, ValueError, "pattern: expected N:M with 1 <= N < M.*, got '4:2'"),
        ({"pattern": "0:4"}, ValueError, "pattern: .* got '0:4'"),
        ({"pattern": 1.5}, ValueError, "pattern: expected a sparsity of at least 0 and below 1, got 1.5"),
        ({"pattern": -0.1}, ValueError, "pattern: .* got -0.1"),
        ({"pattern": [2, 4]}, TypeError, r"pattern: expected 'N:M', a sparsity or a pattern object, got \[2, 4\]"),
        ({"pattern": "3:7"}, ValueError, "model.layers.0.self_attn.q_proj: expected input features divisible by M=7 .* got 32"),
        ({"patterns": {"*.down_proj": "1:5"}}, ValueError, "model.layers.0.mlp.down_proj: .* divisible by M=5 .* got 48"),
        ({"include": "*.fc1"}, ValueError, r"include: '\*.fc1' matches no linear .* like 'model.layers.0.self_attn.q_proj'"),
        ({"exclude": ["nothing"]}, ValueError, "exclude: 'nothing' matches no linear"),
        ({"patterns": {"nothing": None}}, ValueError, "patterns: 'nothing' matches no linear"),
        ({"exclude": "*"}, ValueError, "together they leave no linear to prune"),
        ({"include": [3]}, TypeError, "include: expected names or globs, got 3"),
        ({"include": "model.embed_tokens"}, ValueError, "include: 'model.embed_tokens' matches no linear"),
        ({"calibration": None}, ValueError, "calibration: expected token ids, which SparseGPT needs .* got None"),
        ({"calibration": []}, ValueError, "calibration: expected at least one token, got none"),
        ({"calibration": torch.zeros(0, 8, dtype=torch.long)}, ValueError, r"expected at least one token, got shape \(0, 8\)"),
        ({"calibration": torch.zeros(8, 0, dtype=torch.long)}, ValueError, r"expected at least one token, got shape \(8, 0\)"),
        ({"calibration": torch.zeros(8, dtype=torch.long)}, ValueError, r"of shape \[samples, length\], got \(8,\)"),
        ({"calibration": torch.zeros(2, 8)}, TypeError, "calibration: expected token ids of dtype int64, got float32"),
        (
            {"calibration": [{"labels": tiny_ids(2, 8)}]},
            TypeError,
            "expected token tensors or mappings of the model's inputs with tensors, got dict",
        ),
        ({"calibration": ["text"]}, TypeError, "expected token tensors or mappings of the model's inputs with tensors, got str"),
        ({"calibration": torch.full((2, 8), 96)}, ValueError, "token ids from 0 to 95, got 96; is this the model's own tokenizer"),
        ({"calibration": torch.full((2, 8), -1)}, ValueError, "token ids from 0 to 95, got -1"),
        ({"calibration": 5}, TypeError, "calibration: expected token ids or an iterable of batches, got 5"),
        (
            {"calibration": torch.zeros(2, 65).long()},
            ValueError,
            "samples of at most 64 tokens, the positions of this model, got 65",
        ),
        ({"batch_size": 0}, ValueError, "batch_size: expected a whole number of at least 1, got 0"),
        ({"resume": True}, ValueError, "resume: expected out"),
        ({"seed": -1}, ValueError, r"seed: expected a whole number from 0 to 2\*\*63 - 1, got -1"),
        ({"seed": "now"}, ValueError, "seed: expected a whole number .* got 'now'"),
    ],
)
def test_refused_before_any_work(model, arguments, error, message):
    with pytest.raises(error, match=message):
        sparsekern.prune(model, **{"calibration": tiny_ids(), **QUIET, **arguments})


def test_other_arguments_of_the_model_may_be_of_any_type():
    def run(**more):
        batch = {"input_ids": tiny_ids(2, 8), "output_attentions": False, "logits_to_keep": torch.tensor(3), **more}
        return sparsekern.prune(tiny_model("llama"), "wanda", calibration=[batch], **QUIET).settings["calibration"]

    assert run() == run() and len({run(), run(output_attentions=None), run(logits_to_keep=torch.tensor(4))}) == 3


def test_a_name_is_no_model():
    with pytest.raises(TypeError, match="model: expected a transformers model, got str; sparsekern.load returns one"):
        sparsekern.prune("gpt2", "magnitude")


def test_only_padding(model):
    batch = {"input_ids": tiny_ids(2, 8), "attention_mask": torch.zeros(2, 8, dtype=torch.long)}
    with pytest.raises(ValueError, match="calibration: expected at least one token, got none"):
        sparsekern.prune(model, calibration=[batch], **QUIET)


def test_attention_mask_of_another_shape(model):
    batch = {"input_ids": tiny_ids(2, 8), "attention_mask": torch.ones(2, 9)}
    with pytest.raises(ValueError, match=r"expected attention_mask of shape \(2, 8\), got \(2, 9\)"):
        sparsekern.prune(model, calibration=[batch], **QUIET)
    batch["attention_mask"] = [[1] * 8] * 2
    with pytest.raises(TypeError, match=r"calibration: expected attention_mask as a tensor of shape \(2, 8\), got list"):
        sparsekern.prune(model, calibration=[batch], **QUIET)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_a_weight_that_is_not_finite(model, method, value):
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = value
    model.spoilt = ["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=rf"model.layers.1.mlp.up_proj: expected finite weights, got {value} at \[3, 5\]"):
        sparsekern.prune(model, method, calibration=tiny_ids(), **QUIET)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "alps"])
def test_an_activation_that_is_not_finite_names_layer_and_sample(model, method):
    """Sample 5 alone has the token whose embedding is spoilt."""
    ids = tiny_ids(8, 16).clamp_(min=4)
    ids[5, 9] = 3
    model.model.embed_tokens.weight.data[3] = float("nan")
    model.spoilt = ["model.embed_tokens.weight"]
    with pytest.raises(
        ValueError, match="model.layers.0.self_attn.q_proj: its input is nan in calibration sample 5 .* no damping can help"
    ):
        sparsekern.prune(model, method, calibration=ids, batch_size=3, **QUIET)


def test_overflow_in_a_later_block_names_it_and_keeps_what_is_done():
    model = tiny_model("llama")
    before = copy.deepcopy(model.state_dict())
    model.model.layers[1].post_attention_layernorm.weight.data.fill_(float("inf"))
    with pytest.raises(ValueError, match="model.layers.1.mlp.gate_proj: its input is .* in calibration sample 0"):
        sparsekern.prune(model, "sparsegpt", calibration=tiny_ids(), **QUIET)
    assert (model.model.layers[0].mlp.up_proj.weight == 0).float().mean() == 0.5
    for name in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj"):
        weight = model.get_submodule(f"model.layers.1.{name}").weight
        assert torch.equal(weight, before[f"model.layers.1.{name}.weight"])


def test_values_behind_the_padding_may_be_anything():
    model, ids = tiny_model("llama"), tiny_ids(4, 16)
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    clean = copy.deepcopy(model)
    sparsekern.prune(clean, "wanda", calibration=[{"input_ids": ids[:, :12]}], **QUIET)
    ids[:, 12:] = 0
    model.model.embed_tokens.weight.data[0] = 1e30  # overflows to inf in the first norm
    sparsekern.prune(model, "wanda", calibration=[{"input_ids": ids, "attention_mask": mask}], **QUIET)
    for name in ("self_attn.q_proj", "mlp.up_proj"):
        one, other = (m.model.layers[0].get_submodule(name).weight for m in (clean, model))
        assert torch.equal(one != 0, other != 0)


def test_dead_feature_and_few_tokens_are_said_once(model):
    model.pruned = True
    for block in model.model.layers:
        block.input_layernorm.weight.data[4] = 0
    with pytest.warns(SparsekernWarning) as said:
        report = sparsekern.prune(model, "sparsegpt", calibration=tiny_ids(1, 12), **QUIET)
    messages = [str(warning.message) for warning in said]
    assert len(messages) == 2
    assert "self_attn.q_proj: 12 calibration tokens for 32 input features" in messages[0]
    assert "self_attn.q_proj: 1 of 32 input features were never active" in messages[1]
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize("tokens", [31, 32])
def test_as_many_tokens_as_features_are_not_few(tokens):
    """Attention and the first two linears of the FFN have 32 input features; its last one, which has 48, is left out."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", SparsekernWarning)
        sparsekern.prune(
            tiny_model("llama"), "sparsegpt", calibration=tiny_ids(1, tokens), exclude=["*down_proj"], report_error=True, **QUIET
        )
    few = [str(warning.message) for warning in said if "calibration tokens for 32 input features" in str(warning.message)]
    assert len(few) == (tokens < 32)


def test_few_tokens_are_no_matter_for_a_method_without_damping(model):
    model.pruned = True
    sparsekern.prune(model, "wanda", calibration=tiny_ids(1, 12), report_error=True, **QUIET)  # a warning would be an error


def test_a_model_without_linears(model):
    with pytest.raises(ValueError, match="model: found no linear layers in Sequential"):
        sparsekern.prune(nn.Sequential(nn.LayerNorm(4)), "magnitude", **QUIET)


def test_a_model_without_blocks(model):
    with pytest.raises(ValueError, match="model: found no repeated blocks in Sequential"):
        sparsekern.prune(nn.Sequential(nn.Linear(4, 4)), "magnitude", **QUIET)


def test_a_model_that_cannot_be_saved(model, tmp_path):
    blocks = nn.Module()
    blocks.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
    with pytest.raises(TypeError, match="out: expected a model with save_pretrained, got Module"):
        sparsekern.prune(blocks, "magnitude", out=tmp_path / "out", **QUIET)


def test_a_model_that_transformers_will_not_save(model, tmp_path):
    class Quantizer:
        class quantization_config:
            quant_method = "gguf"

        def is_serializable(self):
            return False

    model.hf_quantizer = Quantizer()
    with pytest.raises(ValueError, match="out: expected a model that transformers can save, got one that it loaded as gguf"):
        sparsekern.prune(model, "magnitude", out=tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_damping_that_had_to_grow_is_reported_with_the_layer(model):
    model.pruned = True
    with pytest.warns(SparsekernWarning) as caught:
        sparsekern.prune(model, SparseGPT(damping=0.0), calibration=tiny_ids(1, 12), **QUIET)
    grown = [str(w.message) for w in caught if "not positive definite" in str(w.message)]
    assert grown and all(message.startswith("model.layers.") and ": gram: not positive definite" in message for message in grown)


@pytest.mark.skipif(not LIBRARIES["_C"].loaded, reason="no compiled library, so no instruction set to choose")
def test_an_instruction_set_that_is_none_is_refused_before_any_work(model, tmp_path, monkeypatch):
    monkeypatch.setenv("SPARSEKERN_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="^SPARSEKERN_CPU_ISA: expected scalar, avx2, .* got 'mmx'"):
        sparsekern.prune(model, calibration=tiny_ids(), out=tmp_path / "out", **QUIET)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "pattern, format",
    [
        ("2:4", "1:4"),
        ("3:4", "2:8"),
        (0.5, "2:4"),
        (0.01, "packed"),
        (0.01, "bitmask"),
        ("4:8", "2:4"),
        ("15:16", "15:16"),
        ("2:4", "2:5"),
    ],
)
def test_a_format_that_nothing_is_sure_to_fit(model, tmp_path, pattern, format):
    message = f"format: by pattern {pattern}, none of 22 linear layers is sure to get smaller with '{format}'"
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, "magnitude", pattern, out=tmp_path / "out", format=format, **QUIET)
    assert not (tmp_path / "out").exists()


def test_a_format_that_something_fits(model, tmp_path):
    model.pruned = True
    for number, (pattern, format) in enumerate(
        [("1:4", "2:4"), ("2:8", "2:4"), ("1:4", "2:8"), ("2:4", "bitmask"), (0.6, "packed")]
    ):
        pruned = copy.deepcopy(model)
        sparsekern.prune(pruned, "magnitude", pattern, out=tmp_path / str(number), format=format, include="*.0.*", **QUIET)
        assert sparsekern.runtime.is_packed(sparsekern.load(tmp_path / str(number)))
    layer = model.model.layers[1].mlp.up_proj  # is left as it is, and fits already
    with torch.no_grad():
        layer.weight[:, ::2] = 0
    sparsekern.prune(model, "magnitude", 0.5, out=tmp_path / "more", format="2:4", include="*.0.*", **QUIET)
    assert sparsekern.load(tmp_path / "more").model.layers[1].mlp.up_proj.format == "2:4"
