"""A packed folder: what plain transformers makes of it, and what becomes of damaged ones."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModel, AutoModelForCausalLM

import sparsekern
from sparsekern import SparseLinear
from tests.runtime import packed

ROOT = Path(__file__).resolve().parents[2]
UP = "model.layers.0.mlp.up_proj"


def layers(model: nn.Module) -> list[SparseLinear]:
    return [module for module in model.modules() if isinstance(module, SparseLinear)]


@torch.no_grad()
def test_plain_transformers_loads_generates_and_saves_it(folder, tmp_path):
    dense = sparsekern.load(sparsekern.save(packed.llama(torch.bfloat16, tie_word_embeddings=True), tmp_path / "dense"))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert len(layers(model)) == 14 and model.lm_head.weight is model.model.embed_tokens.weight
    # Equal to the bit are the weights; what torch multiplies may differ with the addresses of mapped files.
    expected = sparsekern.pack(dense)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(model(packed.ids()).logits, expected(packed.ids()).logits)
    dense = sparsekern.unpack(dense).float()
    model = model.to(torch.float32)
    prompt = packed.ids(1)
    found = model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=True)
    assert torch.equal(found, dense.generate(prompt, max_new_tokens=8, do_sample=False))
    assert torch.equal(found, model.generate(prompt, max_new_tokens=8, do_sample=False, use_cache=False))

    model.to(torch.bfloat16).save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(path / "model.safetensors") for path in (folder, tmp_path / "again"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    entries = [json.loads((path / "config.json").read_text())["quantization_config"] for path in (folder, tmp_path / "again")]
    assert entries[0] == entries[1] and entries[0]["quant_method"] == "sparsekern" and len(entries[0]["layers"]) == 14
    assert entries[0]["layers"][UP]["format"] == "bitmask" and entries[0]["layers"][UP]["shape"] == [96, 64]


def test_it_is_smaller(folder, tmp_path):
    dense = sparsekern.save(packed.llama(torch.bfloat16, tie_word_embeddings=True), tmp_path / "dense")
    assert (folder / "model.safetensors").stat().st_size < (dense / "model.safetensors").stat().st_size
    assert (
        "import sparsekern" in (folder / "README.md").read_text() and "import sparsekern" not in (dense / "README.md").read_text()
    )


def test_conv1d_of_gpt2(tmp_path):
    model = packed.gpt2()
    again = AutoModelForCausalLM.from_pretrained(sparsekern.save(model, tmp_path / "packed", "packed"))
    assert len(layers(again)) == 8
    with torch.no_grad():
        assert torch.allclose(again(packed.ids()).logits, model(packed.ids()).logits, atol=1e-5)
    dense = AutoModelForCausalLM.from_pretrained(sparsekern.save(again, tmp_path / "dense"))
    assert all(torch.equal(a, b) for a, b in zip(dense.state_dict().values(), model.state_dict().values(), strict=True))


def test_another_dtype_is_asked_for(folder):
    model = sparsekern.load(folder, dtype="float32")
    assert {layer.dtype for layer in layers(model)} == {torch.float32}
    expected = sparsekern.load(folder)
    assert torch.equal(layers(model)[3].dense_weight(), layers(expected)[3].dense_weight().float())
    assert not any(parameter.requires_grad for layer in layers(model) for parameter in layer.parameters())


def test_the_base_model_and_sharded_files(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    again = sparsekern.load(tmp_path / "shards")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values(), strict=True))
    base = AutoModel.from_pretrained(folder)
    assert len(layers(base)) == 14 and torch.equal(base.layers[1].mlp.up_proj.values, model.model.layers[1].mlp.up_proj.values)


def test_memory_never_holds_the_dense_model(folder, monkeypatch):
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a dispatch mode sees one thread

    class Largest(TorchDispatchMode):
        seen: set = set()

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (list, tuple)) else [result]:
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point() and not tensor.is_meta:
                    self.seen.add(tuple(tensor.shape))
            return result

    with Largest() as largest:
        model = AutoModelForCausalLM.from_pretrained(folder)
    assert tuple(model.model.embed_tokens.weight.shape) in largest.seen  # it does see what is loaded
    assert not {layer.shape for layer in layers(model)} & largest.seen


def test_dequantize(folder):
    model = sparsekern.load(folder).dequantize()
    assert not layers(model) and type(model.model.layers[0].mlp.up_proj) is nn.Linear and not model.is_quantized


def test_a_model_that_is_packed_can_be_saved_dense(folder, tmp_path):
    model = sparsekern.load(folder)
    dense = AutoModelForCausalLM.from_pretrained(sparsekern.save(model, tmp_path / "dense"))
    assert len(layers(model)) == 14 and not layers(dense)
    assert torch.equal(dense.model.layers[0].mlp.up_proj.weight, model.model.layers[0].mlp.up_proj.dense_weight())


def test_a_format_that_is_named_is_the_only_one_saved(folder, tmp_path):
    model = packed.llama()
    packed.two_of_four(model.get_submodule(UP))
    sparsekern.pack(model)

    def saved(format: str) -> dict[str, str]:
        path = sparsekern.save(model, tmp_path / format.replace(":", "-"), format)
        entries = json.loads((path / "config.json").read_text())["quantization_config"]["layers"]
        return {name: entry["format"] for name, entry in entries.items()}

    assert set(saved("packed").values()) == {"2:4", "bitmask"} and set(saved("bitmask").values()) == {"bitmask"}
    assert saved("2:4") == {UP: "2:4"} and model.model.layers[1].mlp.up_proj.format == "bitmask"
    with pytest.raises(ValueError, match="none of its 15 linear layers gets smaller with format='1:4'"):
        saved("1:4")


@pytest.mark.parametrize("inner", [True, False])
def test_the_base_is_packed_and_the_whole_is_saved_or_the_other_way_round(tmp_path, inner):
    model = packed.llama()
    sparsekern.pack(model.model if inner else model)
    (model if inner else model.model).save_pretrained(tmp_path)
    for kind in (AutoModelForCausalLM, AutoModel)[0 if inner else 1 :]:
        again = kind.from_pretrained(tmp_path)
        assert len(layers(again)) == 14
        with torch.no_grad():
            expected = model(packed.ids()).logits if kind is AutoModelForCausalLM else model.model(packed.ids())[0]
            assert torch.equal(again(packed.ids())[0], expected)


def test_dtypes_and_devices_that_cannot_be(folder, tmp_path):
    with pytest.raises(
        ValueError, match="dtype: expected float32, bfloat16 or float16 for a packed model, got float64; unpack the model"
    ):
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with pytest.raises(
        ValueError, match="device_map: expected one without offloading, .* got one that offloads model.layers.0.self_attn.q_proj"
    ):
        AutoModelForCausalLM.from_pretrained(folder, device_map={"": "disk"}, offload_folder=tmp_path)


@pytest.mark.parametrize("first, second", [("sparsekern", "transformers"), ("transformers", "sparsekern")])
def test_registration_in_either_order(first, second):
    code = (
        f"import sys, {first}, {second}\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "print(table['sparsekern'].__name__, any('sparsekern' in type(finder).__module__ for finder in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "SparsekernQuantizer False"


def test_registration_survives_an_import_that_failed():
    code = (
        "import sys, sparsekern\n"
        "class Interrupting:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'transformers.quantizers.base':\n"
        "            sys.meta_path.remove(self)\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Interrupting())\n"
        "try:\n"
        "    import transformers.quantizers.auto\n"
        "except KeyboardInterrupt:\n"
        "    assert 'transformers.quantizers.auto' not in sys.modules\n"
        "else:\n"
        "    raise AssertionError('not interrupted')\n"
        "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as table\n"
        "print(table['sparsekern'].__name__, any('sparsekern' in type(finder).__module__ for finder in sys.meta_path))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "SparsekernQuantizer False"


def test_what_packing_while_loading_gets(tmp_path):
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    dense = sparsekern.save(packed.llama(), tmp_path / "dense")
    with pytest.raises(
        ValueError, match="quantization_config: expected that of a packed folder; to pack a model, load and prune it"
    ):
        AutoModelForCausalLM.from_pretrained(dense, quantization_config=AUTO_QUANTIZATION_CONFIG_MAPPING["sparsekern"](layers={}))


def test_a_model_that_is_not_pruned_is_not_saved_packed(tmp_path):
    from tests import tiny

    with pytest.raises(ValueError, match="none of its 22 linear layers gets smaller"):
        sparsekern.save(tiny.llama(), tmp_path / "out", "packed")
    assert not list(tmp_path.iterdir())


def test_an_encoder_that_lost_heads_and_neurons_can_be_packed_too(tmp_path):
    from sparsekern.models.encoder import Encoder
    from sparsekern.models.units import keep_units, record_units
    from tests import encoders

    model, batch = encoders.tiny("bert"), encoders.padded_ids()
    encoder = Encoder(model)
    with torch.no_grad():
        for sublayer in encoder.sublayers:
            keep_units(sublayer, torch.arange(3 if sublayer.kind == "heads" else 30))
        record_units(encoder)
        packed.prune_linears(model, 0.8)
        path = sparsekern.save(model, tmp_path / "packed", "packed")
        again = sparsekern.load(path)
        assert layers(again) and type(again) is type(model)
        card = (path / "README.md").read_text()
        assert "sparsekern.load(" in card and "the linear layers are packed" in card
        plain = type(model).from_pretrained(path)
        assert torch.equal(plain(**batch)[0], again(**batch)[0]) and len(layers(plain)) == len(layers(again))
        torch.testing.assert_close(again(**batch)[0], model(**batch)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("part", ["values", "bitmask", "starts", "order"])
def test_a_tensor_missing_from_a_mixture_is_refused(tmp_path, part):
    """transformers renames a mixture's tensors while it loads them, and fills what is missing with uninitialised memory."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=64, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    model = MixtralForCausalLM(MixtralConfig(vocab_size=96, num_local_experts=2, bos_token_id=None, eos_token_id=None, **sizes))
    path = sparsekern.save(packed.prune_linears(model.eval()), tmp_path / "it", "packed")
    again = AutoModelForCausalLM.from_pretrained(path)
    assert layers(again) and torch.allclose(again(packed.ids()).logits, model(packed.ids()).logits, atol=1e-5)
    state = load_file(path / "model.safetensors")
    name = f"model.layers.1.self_attn.o_proj.{part}"
    del state[name]
    save_file(state, path / "model.safetensors", {"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, sparsekern.load):
        with pytest.raises(ValueError, match=f"model.safetensors: {name}: is missing"):
            load(path)
