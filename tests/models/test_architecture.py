"""The class that a folder is loaded as: the one that its config names, and a warning where it names none."""

import json
import shutil

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import sparsekern
from tests import tiny

SIZES = dict(vocab_size=96, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64)
HIDDEN = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
LLAMA = dict(**SIZES, **HIDDEN, num_key_value_heads=2, head_dim=8)
BART = dict(d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4)
FFN = dict(encoder_ffn_dim=48, decoder_ffn_dim=48)
PIXELS = dict(image_size=16, patch_size=4)


def gemma3():
    images = dict(mm_tokens_per_image=4, image_token_index=95, boi_token_index=94, eoi_token_index=93)
    vision = dict(**HIDDEN | {"num_hidden_layers": 1}, **PIXELS)
    return tf.Gemma3ForConditionalGeneration(tf.Gemma3Config(text_config=LLAMA, vision_config=vision, **images))


def whisper():
    audio = dict(num_mel_bins=8, max_source_positions=16, max_target_positions=64, decoder_start_token_id=1)
    tokens = {key: SIZES[key] for key in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    return tf.WhisperForConditionalGeneration(
        tf.WhisperConfig(**tokens, **BART, **FFN, **audio, suppress_tokens=None, begin_suppress_tokens=None)
    )


def clip():
    text = dict(**HIDDEN, vocab_size=96, max_position_embeddings=16, projection_dim=16)
    return tf.CLIPModel(
        tf.CLIPConfig(text_config=text, vision_config=dict(**HIDDEN, **PIXELS, projection_dim=16), projection_dim=16)
    )


MODELS = {
    "vision and language": gemma3,
    "speech": whisper,
    "translation": lambda: tf.BartForConditionalGeneration(tf.BartConfig(vocab_size=96, max_position_embeddings=64, **BART, **FFN)),
    "T5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4, decoder_start_token_id=0)
    ),
    "encoder of T5": lambda: tf.T5EncoderModel(tf.T5Config(vocab_size=96, d_model=32, d_ff=48, d_kv=8, num_layers=1, num_heads=4)),
    "reward model, tied": lambda: tf.Qwen3ForSequenceClassification(
        tf.Qwen3Config(**LLAMA, num_labels=1, tie_word_embeddings=True)
    ),
    "reranker": lambda: tf.LlamaForSequenceClassification(tf.LlamaConfig(**LLAMA, num_labels=1)),
    "token scores": lambda: tf.MistralForTokenClassification(tf.MistralConfig(**LLAMA, num_labels=3)),
    "embeddings of a decoder": lambda: tf.LlamaModel(tf.LlamaConfig(**LLAMA)),
    "masked words": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES, **HIDDEN)),
    "images": lambda: tf.ViTForImageClassification(tf.ViTConfig(**HIDDEN, **PIXELS, num_labels=3)),
    "images and text": clip,
}


@pytest.mark.parametrize("name", MODELS)
def test_a_folder_is_loaded_as_the_class_that_it_names(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "source")
    again = sparsekern.load(tmp_path / "source", device="cpu")
    assert type(again) is type(model)
    path = sparsekern.save(again, tmp_path / "saved")
    saved = type(model).from_pretrained(path).state_dict()
    assert saved.keys() == model.state_dict().keys()
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert json.loads((path / "config.json").read_text())["architectures"] == [type(model).__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.save_folder(tmp_path_factory.mktemp("architecture") / "tiny")


def named(folder, target, *names, **changes):
    """A copy of a folder whose config names these architectures."""
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text()) | {"architectures": list(names)} | changes
    (target / "config.json").write_text(json.dumps(config if names else config | {"architectures": None}))
    return target


def test_of_several_names_the_first_that_fits_the_weights_is_taken(folder, tmp_path):
    """And the list is saved as it was."""
    names = ["LlamaForSequenceClassification", "Unheard", "LlamaForCausalLM", "LlamaModel"]
    model = sparsekern.load(named(folder, tmp_path / "a", *names), device="cpu")
    assert type(model) is tf.LlamaForCausalLM
    assert json.loads((sparsekern.save(model, tmp_path / "b") / "config.json").read_text())["architectures"] == names
    model = sparsekern.load(named(folder, tmp_path / "c", "Unheard", "LlamaForCausalLM"), device="cpu")
    assert type(model) is tf.LlamaForCausalLM


@pytest.mark.parametrize(
    "name", ["FooForCausalLM", "BertModel", "LlamaConfig", "AutoTokenizer", "PreTrainedModel", "LlamaPreTrainedModel"]
)
def test_a_name_that_is_no_class_for_the_model_type_is_said_and_saved(folder, tmp_path, name):
    said = f"its config.json names {name}, which transformers does not know for 'llama'; it is loaded as LlamaForCausalLM"
    with pytest.warns(sparsekern.SparsekernWarning, match=said):
        model = sparsekern.load(named(folder, tmp_path / "a", name), device="cpu")
    assert type(model) is tf.LlamaForCausalLM
    assert json.loads((sparsekern.save(model, tmp_path / "b") / "config.json").read_text())["architectures"] == [name]


@pytest.mark.parametrize("name", ["speech", "translation", "reranker", "embeddings of a decoder", "masked words", "images"])
def test_without_a_name_the_weights_decide(tmp_path, name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.save_pretrained(tmp_path / "a")
    with pytest.warns(sparsekern.SparsekernWarning, match=f"names no architecture; it is loaded as {type(model).__name__}"):
        assert type(sparsekern.load(named(tmp_path / "a", tmp_path / "b"), device="cpu")) is type(model)


@pytest.mark.parametrize("names", ["LlamaForCausalLM", [None], [""], {"LlamaForCausalLM": 1}, 5])
def test_names_that_are_none_are_refused(folder, tmp_path, names):
    with pytest.raises(
        ValueError, match="architectures in config.json: expected a list of class names, got|no model can be loaded"
    ):
        sparsekern.load(named(folder, tmp_path / "a", "LlamaForCausalLM", architectures=names), device="cpu")


@pytest.mark.parametrize("auto_map", ["own.Own", 3, ["own.Own"], {"AutoModelForCausalLM": ["own.Own", None]}, {"AutoConfig": 3}])
def test_an_odd_map_of_code_is_not_followed(folder, tmp_path, auto_map):
    odd = named(folder, tmp_path / "a", "LlamaForCausalLM", auto_map=auto_map)
    try:
        path = sparsekern.save(sparsekern.load(odd, device="cpu"), tmp_path / "b")
    except ValueError as error:
        assert "no model can be loaded from" in str(error)
    else:
        assert type(sparsekern.load(path, device="cpu")) is tf.LlamaForCausalLM


def test_weights_of_another_class_are_refused_by_name(folder, tmp_path):
    with pytest.raises(ValueError, match="lacks 1 weights of a LlamaForSequenceClassification, score.weight among them"):
        sparsekern.load(named(folder, tmp_path / "a", "LlamaForSequenceClassification", num_labels=2), device="cpu")


def test_weights_of_another_shape_are_refused_by_name(folder, tmp_path):
    wider = named(folder, tmp_path / "a", "LlamaForCausalLM", intermediate_size=64)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.down_proj.weight: expected \[32, 64\], .*, got \[32, 48\]"):
        sparsekern.load(wider, device="cpu")


def test_experts_of_another_number_or_shape_are_refused_by_name(tmp_path):
    torch.manual_seed(0)
    config = tf.MixtralConfig(**LLAMA, num_local_experts=4)
    tf.MixtralForCausalLM(config).save_pretrained(tmp_path / "a")
    for name, changes in (
        ("fewer", {"num_local_experts": 2}),
        ("more", {"num_local_experts": 6}),
        ("wider", {"intermediate_size": 96}),
    ):
        other = named(tmp_path / "a", tmp_path / name, "MixtralForCausalLM", **changes)
        with pytest.raises(ValueError, match=r"layers.0.mlp.(experts|gate).*: expected \[.*\], .*, got \["):
            sparsekern.load(other, device="cpu")


def test_whole_numbers_in_the_place_of_weights_are_refused_by_name(folder, tmp_path):
    """As of a quantisation whose description is gone: their scales would be left out."""
    copy = named(folder, tmp_path / "a", "LlamaForCausalLM")
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = (weights[name] * 100).to(torch.int8)
    save_file(weights | {f"{name}_scale": torch.ones(1)}, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"model: no model .*a': {name}: expected weights in floating point, got I8"):
        sparsekern.load(copy, device="cpu")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "model.safetensors.index.json: the file is damaged"),
        ("[", "model.safetensors.index.json: the file is damaged"),
        ('{"weight_map": {"a": 3}}', "model.safetensors.index.json: the file is damaged"),
        ('{"weight_map": {"a": "b.safetensors"}}', "model.safetensors.index.json names b.safetensors, which is missing"),
    ],
)
def test_an_index_that_is_none_is_refused(folder, tmp_path, text, message):
    copy = named(folder, tmp_path / "a", "LlamaForCausalLM")
    (copy / "model.safetensors").unlink()
    (copy / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=f"model: no model can be loaded from '.*a': {message}"):
        sparsekern.load(copy, device="cpu")


def test_a_config_that_builds_no_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "encodec", "sampling_rate": -1}))
    with pytest.raises(ValueError, match="transformers builds no model from its config, of type 'encodec'"):
        sparsekern.load(tmp_path, device="cpu")


CODE = """
import transformers


class Own(transformers.LlamaForCausalLM):
    pass
"""


def test_code_of_the_folder_is_run_only_if_asked_for(folder, tmp_path):
    """Then it is saved too; without it, a class of transformers is loaded and the code stays behind."""
    own = named(folder, tmp_path / "own", "Own", auto_map={"AutoModelForCausalLM": "modeling_own.Own"})
    (own / "modeling_own.py").write_text(CODE)
    with pytest.raises(ValueError, match="Own is code that comes with the model, .*trust_remote_code=True"):
        sparsekern.load(own, device="cpu")
    model = sparsekern.load(own, device="cpu", trust_remote_code=True)
    assert type(model).__name__ == "Own"
    path = sparsekern.save(model, tmp_path / "saved")
    assert (path / "modeling_own.py").read_text() == CODE
    assert type(sparsekern.load(path, device="cpu", trust_remote_code=True)).__name__ == "Own"

    plain = named(own, tmp_path / "plain", "LlamaForCausalLM")
    path = sparsekern.save(sparsekern.load(plain, device="cpu"), tmp_path / "without")
    assert not (path / "modeling_own.py").exists() and "auto_map" not in json.loads((path / "config.json").read_text())


def test_a_registered_class_is_found_by_its_name(folder, tmp_path):
    class MineConfig(tf.LlamaConfig):
        model_type = "sparsekern_mine"

    class MineForCausalLM(tf.LlamaForCausalLM):
        config_class = MineConfig

    tf.AutoConfig.register("sparsekern_mine", MineConfig)
    tf.AutoModelForCausalLM.register(MineConfig, MineForCausalLM)
    mine = named(folder, tmp_path / "a", "MineForCausalLM", model_type="sparsekern_mine")
    assert type(sparsekern.load(mine, device="cpu")) is MineForCausalLM
