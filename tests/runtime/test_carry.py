"""What a folder holds beside the weights of its class is in the saved folder, byte for byte."""

import errno
import io
import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsekern
from sparsekern.cli.main import main
from tests import tiny
from tests.runtime.source_folders import PREDICTION, with_tensors

SIZES = dict(vocab_size=96, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
DEEPSEEK = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8, first_k_dense_replace=1)
ROUTED = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=1, topk_group=1, n_shared_experts=1)


def contents(folder) -> dict[str, tuple[str, list[int], bytes]]:
    """Dtype, shape and bytes of each tensor, by an own reading of the format, so that nothing converts them."""
    found = {}
    for path in Path(folder).glob("*.safetensors"):
        data = path.read_bytes()
        end = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:end])
        header.pop("__metadata__", None)
        for name, entry in header.items():
            assert name not in found
            first, last = entry["data_offsets"]
            found[name] = entry["dtype"], entry["shape"], data[end + first : end + last]
    return found


def replace(path, data):
    """Put another file in the place of one that a model may have mapped, whose pages must stay."""
    path.unlink()
    path.write_bytes(data)


def loaded(folder, count, **options):
    """Load a folder of which so many tensors are not known."""
    with pytest.warns(sparsekern.SparsekernWarning, match=f"holds {count} tensors that .* does not know, .* are saved unchanged"):
        return sparsekern.load(folder, device="cpu", **options)


def assert_carried(source, saved, names):
    before, after = contents(source), contents(saved)
    assert {name: after.get(name) for name in names} == {name: before[name] for name in names}
    index = json.loads((saved / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == after.keys()
    assert index["metadata"]["total_size"] == sum(len(data) for _, _, data in after.values())


@pytest.mark.parametrize("format", ["dense", "packed", "bitmask", "2:4"])
def test_tensors_that_the_class_does_not_know_are_saved_unchanged(source, tmp_path, format):
    model = loaded(source, len(PREDICTION))
    report = sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "out", format=format)
    assert_carried(source, tmp_path / "out", PREDICTION)
    assert report.size["saved"] == sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"{len(PREDICTION)} tensors of the original checkpoint are not part of a LlamaForCausalLM" in card

    again = loaded(tmp_path / "out", len(PREDICTION))
    names = dict(again.named_parameters())
    assert all(torch.equal(value, names[name]) for name, value in model.named_parameters() if name in names)
    assert_carried(source, sparsekern.save(again, tmp_path / "again", "dense"), PREDICTION)
    assert type(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")) is tf.LlamaForCausalLM


def test_the_size_of_a_report_counts_them_on_both_sides(source, tmp_path):
    report = sparsekern.prune(loaded(source, 6), "magnitude", "2:4", progress=False, out=tmp_path)
    plain = sparsekern.prune(tiny.llama(len(tiny.tokenizer())), "magnitude", "2:4", progress=False, out=tmp_path / "plain")
    assert report.size["dense"] - plain.size["dense"] == sum(tensor.nbytes for tensor in PREDICTION.values())


def test_the_command_line_carries_them_too(source, tmp_path, capsys):
    command = ["prune", str(source), "--method", "magnitude", "--pattern", "2:4", "--out", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu"]) == 0
    assert_carried(source, tmp_path / "out", PREDICTION)
    assert "model.mtp.proj.weight among them; they are not pruned, and are saved unchanged" in capsys.readouterr().err


def test_several_texts_carry_them_too(source, tmp_path):
    ids = torch.randint(3, 90, (2, 16))
    model = loaded(source, 6)
    sparsekern.prune_continually(model, {"a": ids}, "wanda", 0.5, progress=False, out=tmp_path / "out", format="packed")
    assert_carried(source, tmp_path / "out", PREDICTION)


def test_shards_are_counted_anew(source, tmp_path, monkeypatch):
    model = loaded(source, 6)
    whole = type(model).save_pretrained
    monkeypatch.setattr(model, "save_pretrained", lambda path: whole(model, path, max_shard_size="50KB"))
    path = sparsekern.save(model, tmp_path / "out")
    assert_carried(source, path, PREDICTION)
    shards = sorted(file.name for file in path.glob("*.safetensors"))
    assert len(shards) > 3 and shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert_carried(source, sparsekern.save(loaded(path, 6), tmp_path / "again"), PREDICTION)


def deepseek(layers):
    torch.manual_seed(0)
    config = tf.DeepseekV3Config(**SIZES | {"num_hidden_layers": layers}, num_key_value_heads=4, **DEEPSEEK, **ROUTED)
    return tf.DeepseekV3ForCausalLM(config)


@pytest.mark.parametrize("layer", [2, 61])
def test_layers_behind_the_last_are_saved_unchanged(tmp_path, layer):
    """Those of 61 and more are what transformers leaves out without a word. Their experts are one matrix each in the files."""
    model = deepseek(2)
    model.save_pretrained(tmp_path / "a")
    weights = load_file(tmp_path / "a" / "model.safetensors")
    more = {name.replace(".layers.1.", f".layers.{layer}."): value + 1 for name, value in weights.items() if ".layers.1." in name}
    assert f"model.layers.{layer}.mlp.experts.3.gate_proj.weight" in more
    again = loaded(with_tensors(tmp_path / "a", more), len(more))
    path = sparsekern.save(again, tmp_path / "b")
    assert contents(path) == contents(tmp_path / "a")


@pytest.mark.parametrize("name", ["bert", "masked words", "mixtral", "tied", "without prefix", "reward model"])
def test_unknown_tensors_are_told_from_renamed_fused_and_tied_ones(tmp_path, name):
    torch.manual_seed(0)
    llama = dict(**SIZES, num_key_value_heads=2)
    model = {
        "bert": lambda: tf.BertModel(tf.BertConfig(**SIZES)),
        "masked words": lambda: tf.BertForMaskedLM(tf.BertConfig(**SIZES)),
        "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**llama, num_local_experts=4)),
        "tied": lambda: tf.LlamaForCausalLM(tf.LlamaConfig(**llama, tie_word_embeddings=True)),
        "without prefix": lambda: tf.LlamaModel(tf.LlamaConfig(**llama)),
        "reward model": lambda: tf.Qwen3ForSequenceClassification(tf.Qwen3Config(**llama, num_labels=1)),
    }[name]()
    model.save_pretrained(tmp_path / "a")
    if name == "without prefix":  # the weights of a base model, loaded as the whole one
        weights = load_file(tmp_path / "a" / "model.safetensors")
        config = tf.LlamaConfig(**llama, tie_word_embeddings=True, architectures=["LlamaForCausalLM"])
        config.save_pretrained(tmp_path / "a")
        assert "layers.0.mlp.up_proj.weight" in weights
    if name == "tied":  # the head is in some checkpoints all the same
        with_tensors(tmp_path / "a", {"lm_head.weight": model.lm_head.weight.detach().clone()})
    if name == "bert":  # the class computes them, and old checkpoints have them
        with_tensors(tmp_path / "a", {"embeddings.position_ids": torch.arange(512)[None]})
    path = sparsekern.save(sparsekern.load(tmp_path / "a", device="cpu"), tmp_path / "b")
    assert (path / "model.safetensors").exists() and not (path / "model.safetensors.index.json").exists()
    extra = {"more.of.it": torch.ones(3)}
    assert_carried(tmp_path / "a", sparsekern.save(loaded(with_tensors(tmp_path / "a", extra), 1), tmp_path / "c"), extra)


def test_scales_of_a_quantisation_that_loading_undoes_are_no_unknown_tensors(tmp_path):
    """Those of layers that the class does not know are, with their weights."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, num_key_value_heads=2, architectures=["LlamaForCausalLM"], dtype="bfloat16")
    model = tf.LlamaForCausalLM(config)
    weights = {}
    for name, value in model.state_dict().items():
        if name.endswith("proj.weight"):
            scale = value.abs().max() / 448
            weights[name], weights[f"{name}_scale_inv"] = (value / scale).to(torch.float8_e4m3fn), scale.reshape(1, 1)
        else:
            weights[name] = value.bfloat16()
    behind = {name.replace("layers.1.", "layers.2."): value.clone() for name, value in weights.items() if ".1.mlp" in name}
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    config.save_pretrained(tmp_path / "a")
    save_file(weights | behind, tmp_path / "a" / "model.safetensors", {"format": "pt"})
    again = loaded(tmp_path / "a", len(behind))
    assert type(again) is tf.LlamaForCausalLM and again.sparsekern_source.tensors == tuple(sorted(behind))
    torch.testing.assert_close(
        again.model.layers[0].mlp.up_proj.weight.float(), model.model.layers[0].mlp.up_proj.weight, atol=3e-3, rtol=0.1
    )
    path = sparsekern.save(again, tmp_path / "b")
    assert_carried(tmp_path / "a", path, behind)
    assert "quantization_config" not in json.loads((path / "config.json").read_text())


def test_the_source_may_be_overwritten(source, tmp_path):
    """Its weight files get other names then, and are looked up again."""
    folder = shutil.copytree(source, tmp_path / "a")
    model = loaded(folder, 6)
    for _ in range(2):
        sparsekern.save(model, folder, overwrite=True)
        assert_carried(source, folder, PREDICTION)


def test_memory_does_not_grow_with_what_is_carried(tmp_path):
    """A single tensor of many chunks is copied a chunk at a time, and no file is read whole."""
    from sparsekern.models import stored_files

    tiny.llama(num_hidden_layers=1).save_pretrained(tmp_path / "a")
    model = loaded(with_tensors(tmp_path / "a", {"large": torch.arange(100_000)}), 1)
    read = []

    class Watched(io.FileIO):
        def read(self, size=-1):
            read.append((Path(self.name).suffix, size))
            return super().read(size)

    opened = Path.open
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_files, "CHUNK", 1 << 12)
        patch.setattr(
            Path, "open", lambda self, mode="r", **options: Watched(self) if mode == "rb" else opened(self, mode, **options)
        )
        path = sparsekern.save(model, tmp_path / "b")
    assert_carried(tmp_path / "a", path, ["large"])
    sizes = [size for suffix, size in read if suffix == ".safetensors"]
    assert sizes.count(1 << 12) == 800_000 >> 12 and 0 < min(sizes) and max(sizes) == 1 << 12  # others are headers


# Other files


# What makes a save fail is found before the work


def untouched(model, folder):
    expected = tf.AutoModel.from_pretrained(folder).state_dict()
    held = {name.removeprefix(f"{model.base_model_prefix}."): value for name, value in model.state_dict().items()}
    return all(torch.equal(value, held[name]) for name, value in expected.items())


@pytest.mark.parametrize("change", ["folder", "weights", "tensor", "shape is another"])
def test_a_source_that_is_gone_is_refused_before_the_work(source, tmp_path, change):
    folder = shutil.copytree(source, tmp_path / "a")
    model = loaded(folder, 6)
    if change == "folder":
        shutil.rmtree(folder)
    elif change == "weights":
        (folder / "model.safetensors").unlink()
    else:
        weights = load_file(folder / "model.safetensors")
        weights["model.mtp.proj.weight"] = torch.ones(2, 2)
        if change == "tensor":
            del weights["model.mtp.proj.weight"]
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    message = r"model: expected .* in '.*a', the folder that the model was loaded from, .*set `model.sparsekern_source = None` to save without"
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "out")
    with pytest.raises(ValueError, match=message):
        sparsekern.save(model, tmp_path / "out")
    assert untouched(model, source) and not (tmp_path / "out").exists()
    model.sparsekern_source = None
    assert contents(sparsekern.save(model, tmp_path / "out")).keys() == contents(source).keys() - PREDICTION.keys()


def test_a_file_that_is_gone_is_refused_before_the_work(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "a")
    model = sparsekern.load(folder, device="cpu")
    (folder / "modules.json").unlink()
    with pytest.raises(ValueError, match=r"model: expected modules.json in '.*a', .*; it is not there; restore the folder"):
        sparsekern.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_space_that_they_take_is_counted(source, tmp_path, monkeypatch):
    model = loaded(with_tensors(shutil.copytree(source, tmp_path / "a"), {"large": torch.zeros(5_000_000)}), 7)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=10_000_000))
    with pytest.raises(OSError, match="out: no space left: expected 20 MB for the weights, got 10 MB") as caught:
        sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "out")
    assert caught.value.errno == errno.ENOSPC and not (tmp_path / "out").exists()


def test_a_weight_file_that_is_cut_off_is_named(source, tmp_path):
    folder = shutil.copytree(source, tmp_path / "a")
    model = loaded(folder, 6)
    replace(folder / "model.safetensors", (folder / "model.safetensors").read_bytes()[:-16])
    with pytest.raises(ValueError, match=r"model.safetensors: .*: the file is damaged \(it ends before the tensor\)"):
        sparsekern.save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_safetensors_file_is_one_that_the_library_reads(source, tmp_path):
    path = sparsekern.save(loaded(source, 6), tmp_path / "out")
    with safe_open(path / "model-00002-of-00002.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == sorted(PREDICTION)
        assert all(torch.equal(file.get_tensor(name).float(), tensor.float()) for name, tensor in PREDICTION.items())


def test_of_a_model_that_another_program_loaded_what_stays_behind_is_said(source, encoder, tmp_path):
    model = tf.AutoModelForCausalLM.from_pretrained(source)
    said = r"model: 6 tensors that LlamaForCausalLM does not know \(model.mtp.proj.weight\) in '.*source' are not saved, since"
    for call in (
        lambda: sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "a"),
        lambda: sparsekern.save(model, tmp_path / "b", "packed"),
    ):
        with pytest.warns(sparsekern.SparsekernWarning, match=said):
            call()
    assert contents(tmp_path / "a").keys() == contents(source).keys() - PREDICTION.keys()
    model = tf.BertForSequenceClassification.from_pretrained(encoder)
    said = r"model: \d+ files \(1_Pooling/config.json, 2_Dense/config.json, .*, …\) in '.*encoder' are not saved, since"
    with pytest.warns(sparsekern.SparsekernWarning, match=said):
        sparsekern.save(model, tmp_path / "c")
    assert not (tmp_path / "c" / "modules.json").exists()


def test_a_folder_with_nothing_more_is_no_reason_to_warn(tmp_path):
    """A warning is an error here."""
    model = tf.AutoModelForCausalLM.from_pretrained(tiny.save_folder(tmp_path / "a"))
    sparsekern.prune(model, "magnitude", "2:4", progress=False, out=tmp_path / "b")
    packed = tf.AutoModelForCausalLM.from_pretrained(sparsekern.save(sparsekern.pack(model), tmp_path / "c"))
    sparsekern.save(packed, tmp_path / "d")
    replace(tmp_path / "a" / "model.safetensors", b"another model, half written")
    sparsekern.save(model, tmp_path / "e")
