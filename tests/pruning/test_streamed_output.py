"""What streamed runs write: packed folders, models with fewer experts, continual runs, and models that are saved again."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file

import sparsekern
from tests.models.families import tiny_ids
from tests.models.test_streaming import KINDS, folder_of, in_blocks
from tests.pruning.test_streamed import equal, tensors_of


def pruned(folder, out, *, stream, method="wanda", pattern="2:4", **options):
    model = sparsekern.load(folder, device="cpu", stream=stream)
    return model, sparsekern.prune(model, method, pattern, tiny_ids(), out=out, progress=False, **options)


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def check_same_folder(found, expected):
    """Check that two folders hold the same tensors and configs."""
    assert equal(tensors_of(found), tensors_of(expected))
    assert config_of(found) == config_of(expected)
    assert {path.name for path in found.iterdir()} >= {"config.json", "report.json", "README.md"}
    index = json.loads((found / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors_of(expected).keys()


@pytest.mark.parametrize(
    ("kind", "pattern", "format"),
    [(kind, "2:4", "packed") for kind in KINDS] + [("llama", 0.6, "bitmask"), ("qwen3_moe", 0.6, "packed"), ("gpt2", "1:4", "1:4")],
)
def test_packed_output_is_that_of_a_model_in_memory(kind, pattern, format, tmp_path):
    folder = folder_of(kind, tmp_path / "model", "20KB")
    whole, first = pruned(folder, tmp_path / "whole", stream=False, pattern=pattern, format=format)
    model, second = pruned(folder, tmp_path / "streamed", stream=True, pattern=pattern, format=format)
    check_same_folder(tmp_path / "streamed", tmp_path / "whole")
    assert config_of(tmp_path / "streamed")["quantization_config"]["layers"]
    assert first.sparsity == second.sparsity
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert all(parameter.is_meta for parameter in in_blocks(model)) and not hasattr(model.config, "quantization_config")


class Killed(BaseException):
    pass


def kill_at(monkeypatch, method, number):
    """Make the solution number `number` of a method end the process, as far as the run can tell."""
    solve, calls = method.solve, []

    def killed(self, *arguments):
        calls.append(1)
        if len(calls) == number:
            raise Killed
        return solve(self, *arguments)

    monkeypatch.setattr(method, "solve", killed)


@pytest.mark.parametrize(("kind", "solved"), [("gpt2", 6), ("qwen3_moe", 20)])
def test_a_killed_packed_run_goes_on_to_the_same_folder(kind, solved, tmp_path, monkeypatch):
    folder = folder_of(kind, tmp_path / "model")
    options = {"stream": True, "format": "packed"}
    pruned(folder, tmp_path / "whole", **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, sparsekern.Wanda, solved)
        pruned(folder, tmp_path / "out", **options)
    assert list((tmp_path / "out" / "checkpoint").glob("*.safetensors"))
    _, report = pruned(folder, tmp_path / "out", resume=True, **options)
    assert report.resumed_blocks
    check_same_folder(tmp_path / "out", tmp_path / "whole")


@pytest.mark.parametrize(("first", "second"), [("dense", "packed"), ("packed", "dense"), ("packed", "bitmask")])
def test_a_run_may_go_on_in_another_format(first, second, tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model")
    options = {"include": ["*", "lm_head"]}
    pruned(folder, tmp_path / "whole", stream=False, format=second, **options)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr("sparsekern.pruning.saving.RunFolder.write", lambda *_, **__: (_ for _ in ()).throw(Killed))
        pruned(folder, tmp_path / "out", stream=True, format=first, **options)
    pruned(folder, tmp_path / "out", stream=True, format=second, resume=True, **options)
    check_same_folder(tmp_path / "out", tmp_path / "whole")


def test_weights_that_were_zero_before_are_packed_too(tmp_path):
    model = KINDS["llama"]()
    sparsekern.prune(model, "magnitude", "1:4", include=["*.0.*", "lm_head"], progress=False)
    model.save_pretrained(tmp_path / "model")
    options = {"include": "*.1.*", "format": "packed"}
    pruned(tmp_path / "model", tmp_path / "whole", stream=False, **options)
    pruned(tmp_path / "model", tmp_path / "streamed", stream=True, **options)
    check_same_folder(tmp_path / "streamed", tmp_path / "whole")
    layers = config_of(tmp_path / "streamed")["quantization_config"]["layers"]
    assert {"lm_head", "model.layers.0.mlp.up_proj"} <= layers.keys()


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_another_dtype_than_the_checkpoints_is_written(format, tmp_path):
    folder = folder_of("gpt2", tmp_path / "model")
    for stream, out in ((False, "whole"), (True, "streamed")):
        model = sparsekern.load(folder, device="cpu", dtype="bfloat16", stream=stream)
        options = {"out": tmp_path / out, "format": format, "include": "*.1.mlp.*", "progress": False}
        sparsekern.prune(model, "magnitude", "2:4", **options)
    assert equal(tensors_of(tmp_path / "streamed"), tensors_of(tmp_path / "whole"))
    assert config_of(tmp_path / "streamed") == config_of(tmp_path / "whole")


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_streamed_model_is_saved_again(format, tmp_path):
    folder = folder_of("mixtral", tmp_path / "model")
    whole, _ = pruned(folder, None, stream=False)
    model, _ = pruned(folder, tmp_path / "out", stream=True, format="packed")
    sparsekern.save(whole, tmp_path / "expected", format)
    sparsekern.save(model, tmp_path / "again", format)
    assert equal(tensors_of(tmp_path / "again"), tensors_of(tmp_path / "expected"))
    assert config_of(tmp_path / "again") == config_of(tmp_path / "expected")
    again = sparsekern.load(tmp_path / "again", device="cpu", stream=True)  # dense or packed
    again.save_pretrained(tmp_path / "once more")
    assert equal(tensors_of(tmp_path / "once more"), tensors_of(tmp_path / "again"))
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "once more")
    with torch.no_grad():
        assert torch.equal(loaded(tiny_ids()).logits, again(tiny_ids()).logits)
    value = sparsekern.perplexity(again, tiny_ids().flatten(), length=8)
    assert value == sparsekern.perplexity(loaded, tiny_ids().flatten(), length=8)
    with pytest.raises(ValueError, match="save_pretrained: expected only a folder for a streamed model, got max_shard_size"):
        again.save_pretrained(tmp_path / "shards", max_shard_size="1GB")
    with pytest.raises(ValueError, match="path: expected another folder than .*, from which the streamed model is read"):
        again.save_pretrained(tmp_path / "again")
    if format == "packed":
        with pytest.raises(ValueError, match="format: expected 'packed' for a streamed model that is packed, got 'dense'"):
            sparsekern.save(again, tmp_path / "other", "dense")


TEXTS = {"a": tiny_ids(), "b": tiny_ids(3, 7)}


def continued(folder, place, *, stream, texts=TEXTS, model=None, **options):
    model = model or sparsekern.load(folder, device="cpu", stream=stream)
    options = {"evaluate": {name: ids.flatten() for name, ids in texts.items()}, "length": 8, "state": place / "state"} | options
    report = sparsekern.prune_continually(model, texts, options.pop("method", "wanda"), "2:4", progress=False, **options)
    return model, report


def told(report):
    return [(step.name, step.sparsity, step.changed, step.perplexity) for step in report.steps]


@pytest.mark.parametrize(
    ("kind", "method", "strategy", "format"),
    [
        ("llama", "copal", "accumulate", "dense"),
        ("gpt2", "wanda", "accumulate", "packed"),
        ("qwen3_moe", "wanda", "accumulate", "dense"),
        ("llama_tied", "wanda", "carry", "dense"),
        ("llama", "magnitude", "dense", "packed"),
    ],
)
def test_a_continual_run_is_streamed(kind, method, strategy, format, tmp_path):
    folder = folder_of(kind, tmp_path / "model")
    options = {"method": method, "strategy": strategy, "format": format}
    if kind == "llama":
        options["include"] = ["*", "lm_head"]
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    whole, first = continued(folder, tmp_path / "a", stream=False, out=tmp_path / "a" / "out", **options)
    model, second = continued(folder, tmp_path / "b", stream=True, out=tmp_path / "b" / "out", **options)
    assert told(first) == told(second) and first.dense == second.dense
    check_same_folder(tmp_path / "b" / "out", tmp_path / "a" / "out")
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, whole(tiny_ids()).logits)
    assert all(parameter.is_meta for parameter in in_blocks(model))


@pytest.mark.parametrize("format", ["dense", "packed"])
def test_a_continual_run_of_a_streamed_model_goes_on_later(format, tmp_path, monkeypatch):
    folder = folder_of("llama", tmp_path / "model")
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    _, expected = continued(folder, tmp_path / "a", stream=True, out=tmp_path / "a" / "out", evaluate=None, length=None)
    model, _ = continued(folder, tmp_path / "b", stream=True, texts={"a": TEXTS["a"]}, evaluate=None, length=None)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, sparsekern.Wanda, 10)
        continued(folder, tmp_path / "b", stream=True, model=model, texts={"b": TEXTS["b"]}, evaluate=None, length=None)
    out = {"out": tmp_path / "b" / "out", "evaluate": None, "length": None, "resume": True}
    model, report = continued(folder, tmp_path / "b", stream=True, texts={"b": TEXTS["b"]}, format=format, **out)
    assert told(report) == told(expected)
    if format == "dense":
        check_same_folder(tmp_path / "b" / "out", tmp_path / "a" / "out")
    report = continued(folder, tmp_path / "b", stream=True, model=model, texts={"c": tiny_ids(1)}, evaluate=None, length=None)[1]
    assert report.names == ["a", "b", "c"]


def test_a_continual_run_of_a_streamed_model_takes_a_state(tmp_path):
    model = sparsekern.load(folder_of("llama", tmp_path / "model"), device="cpu", stream=True)
    with pytest.raises(ValueError, match="state: expected a folder .* of a streamed model between datasets; got None"):
        sparsekern.prune_continually(model, TEXTS, "wanda", "2:4", progress=False)


def removed(folder, out, *, stream, resume=False, **options):
    model = sparsekern.load(folder, device="cpu", stream=stream)
    options = {"calibration": tiny_ids(), "progress": False} | options
    return model, sparsekern.prune(model, sparsekern.ExpertPruning(remove=0.5), out=out, resume=resume, **options)


THEN = {"then": "wanda", "pattern": "2:4"}


@pytest.mark.parametrize(
    ("kind", "options"), [("mixtral", {}), ("qwen3_moe", THEN), ("mixtral", {**THEN, "format": "packed", "include": "*.1.*"})]
)
def test_experts_of_a_streamed_model_are_removed(kind, options, tmp_path):
    folder = folder_of(kind, tmp_path / "model", "20KB")
    whole, first = removed(folder, tmp_path / "whole", stream=False, **options)
    model, second = removed(folder, tmp_path / "streamed", stream=True, **options)
    assert [(layer.scores, layer.removed) for layer in first.layers] == [(layer.scores, layer.removed) for layer in second.layers]
    assert first.model_parameters == second.model_parameters and first.experts == second.experts
    check_same_folder(tmp_path / "streamed", tmp_path / "whole")
    with torch.no_grad():
        assert torch.equal(model(tiny_ids()).logits, whole(tiny_ids()).logits)


@pytest.mark.parametrize("solved", [3, 20])
def test_a_killed_removal_of_experts_goes_on(solved, tmp_path, monkeypatch):
    folder = folder_of("qwen3_moe", tmp_path / "model")
    removed(folder, tmp_path / "whole", stream=True, **THEN)
    with monkeypatch.context() as patched, pytest.raises(Killed):
        kill_at(patched, sparsekern.Wanda, solved)
        removed(folder, tmp_path / "out", stream=True, **THEN)
    removed(folder, tmp_path / "out", stream=True, resume=True, **THEN)
    check_same_folder(tmp_path / "out", tmp_path / "whole")


def old_gpt2(tensors):
    """As GPT-2 is on the hub: without a prefix, and with masks that no class reads any more."""
    masks = {f"h.{index}.attn.bias": torch.ones(1, 1, 8, 8) for index in range(3)}
    return {name.removeprefix("transformer."): tensor for name, tensor in tensors.items() if name != "lm_head.weight"} | masks


def old_bert(tensors):
    """As BERT is on the hub: gamma and beta are the weights of its norms."""
    return {
        name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): tensor
        for name, tensor in tensors.items()
    }


def bert():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
    return tf.BertForMaskedLM(tf.BertConfig(vocab_size=96, max_position_embeddings=64, **sizes))


@pytest.mark.filterwarnings("ignore:model. .* holds 3 tensors")
@pytest.mark.parametrize("format", ["dense", "packed"])
@pytest.mark.parametrize(("make", "old"), [(KINDS["gpt2"], old_gpt2), (bert, old_bert)], ids=["gpt2", "bert"])
def test_weights_under_old_names(make, old, format, tmp_path):
    make().save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    save_file(old(load_file(path)), path, {"format": "pt"})
    options = {"include": ["*.1.*", "cls.predictions.transform.dense"] if make is bert else "*.1.*", "format": format}
    pruned(tmp_path / "model", tmp_path / "whole", stream=False, **options)
    pruned(tmp_path / "model", tmp_path / "streamed", stream=True, **options)
    check_same_folder(tmp_path / "streamed", tmp_path / "whole")
