"""The head in 8 bits: packed alone or with the embeddings that are tied to it, saved, loaded, unpacked, exported, refused."""

from __future__ import annotations

import copy
import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, BertConfig, BertForMaskedLM, PhiConfig, PhiForCausalLM

import sparsekern
from sparsekern.export.gguf_tensors import named_weights
from sparsekern.layouts.int8_rows import quantize_rows, restore_rows
from sparsekern.runtime import SparseLinear, count_zeros, weight_bytes
from sparsekern.runtime.int8_embedding import Int8Embedding, TiedHead
from sparsekern.serving.served import layers_of
from tests.runtime import packed

GOLDEN = Path(__file__).parent / "golden_packed" / "int8"
EMBEDDINGS = "model.embed_tokens"
BOTH = pytest.mark.parametrize("tied", [True, False])


def llama(tied: bool = True, dtype: torch.dtype = torch.float32):
    return packed.llama(dtype, tie_word_embeddings=tied)


def rounded(weight: torch.Tensor) -> torch.Tensor:
    """What 8 bits hold of a weight, in float64: rows on a grid of 127 steps whose size float16 holds."""
    scales = (weight.float().abs().amax(1) / 127).half().double()[:, None]
    return (weight.double() / scales).round().clamp(-127, 127) * scales


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def folder(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("int8") / "it"
    return sparsekern.save(llama(request.param), path, "packed", head="int8")


@torch.no_grad()
@BOTH
def test_the_head_is_rounded_and_nothing_else(tied):
    model = llama(tied)
    before = copy.deepcopy(model)
    found = sparsekern.pack(model, head="int8")
    assert found is model and isinstance(model.lm_head, SparseLinear) and model.lm_head.format == "int8"
    expected = rounded(before.lm_head.weight)
    assert torch.equal(model.lm_head.dense_weight().double(), expected)
    hidden = torch.randn(3, 64)
    torch.testing.assert_close(model.lm_head(hidden).double(), hidden.double() @ expected.T, rtol=1e-5, atol=1e-6)
    ids = packed.ids()
    if tied:
        assert torch.equal(model.model.embed_tokens(ids).double(), expected[ids])
        assert model.lm_head.tensors["values"] is model.model.embed_tokens.values
    else:
        assert type(model.model.embed_tokens) is torch.nn.Embedding
        assert torch.equal(model.model.embed_tokens.weight, before.model.embed_tokens.weight)
    dense = sparsekern.unpack(model)
    assert torch.equal(dense.lm_head.weight.double(), expected)
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == tied
    before.lm_head.weight.copy_(expected)
    assert torch.equal(dense(input_ids=ids).logits, before(input_ids=ids).logits)
    assert dense.all_tied_weights_keys == before.all_tied_weights_keys and dense._tied_weights_keys == before._tied_weights_keys


@torch.no_grad()
def test_a_folder_loads_as_it_was_saved(folder):
    ids = packed.ids()
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    state = load_file(folder / "model.safetensors")
    held = {name for name in state if "embed" in name or "head" in name}
    values = {f"{EMBEDDINGS if tied else 'lm_head'}.{part}" for part in ("values", "scales")}
    assert held == values | (set() if tied else {f"{EMBEDDINGS}.weight"})
    expected = sparsekern.pack(llama(tied), head="int8")(input_ids=ids).logits
    for load in (sparsekern.load, AutoModelForCausalLM.from_pretrained):
        model = load(folder)
        assert torch.equal(model(input_ids=ids).logits, expected)
        assert type(model.lm_head) is (TiedHead if tied else SparseLinear)
        model.tie_weights()
        assert torch.equal(copy.deepcopy(model)(input_ids=ids).logits, expected)
    half = sparsekern.load(folder, dtype="bfloat16")
    assert half(input_ids=ids).logits.dtype == torch.bfloat16 and half.lm_head.tensors["scales"].dtype == torch.float32
    base = AutoModel.from_pretrained(folder)
    assert type(base.embed_tokens) is (Int8Embedding if tied else torch.nn.Embedding)


def test_a_folder_is_saved_again_as_it_is_or_dense(folder, tmp_path):
    model = sparsekern.load(folder)
    before = load_file(folder / "model.safetensors")
    again = load_file(sparsekern.save(model, tmp_path / "again", "packed") / "model.safetensors")
    assert before.keys() == again.keys() and all(torch.equal(again[name], tensor) for name, tensor in before.items())
    model.save_pretrained(tmp_path / "by transformers")
    assert load_file(tmp_path / "by transformers" / "model.safetensors").keys() == before.keys()
    dense = AutoModelForCausalLM.from_pretrained(sparsekern.save(model, tmp_path / "dense"))
    assert torch.equal(dense.lm_head.weight, model.lm_head.dense_weight())
    assert (dense.lm_head.weight is dense.model.embed_tokens.weight) == isinstance(model.lm_head, TiedHead)


def test_a_streamed_folder_reads_it_too(folder, tmp_path):
    ids = packed.ids()
    expected = sparsekern.load(folder)(input_ids=ids).logits
    streamed = sparsekern.load(folder, stream=True)
    assert sparsekern.perplexity(streamed, ids, length=9) == sparsekern.perplexity(sparsekern.load(folder), ids, length=9)
    with pytest.raises(ValueError, match="^head: expected None for a streamed model, got 'int8'; load it without stream=True$"):
        sparsekern.save(streamed, tmp_path / "out", "packed", head="int8")
    again = sparsekern.load(sparsekern.save(streamed, tmp_path / "out", "packed"))
    assert torch.equal(again(input_ids=ids).logits, expected)


def test_a_folder_has_the_version_of_what_it_holds(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    entries = [entry for name, entry in config["layers"].items() if name in ("lm_head", EMBEDDINGS)]
    assert config["version"] == 3 and entries == [{"format": "int8", "shape": [320, 64], "dtype": "float32"}]
    assert "The head is rounded to 8 bits" in (folder / "README.md").read_text()
    other = sparsekern.save(llama(), tmp_path / "out", "packed")
    assert "8 bits" not in (other / "README.md").read_text()
    assert json.loads((other / "config.json").read_text())["quantization_config"]["version"] == 1


@torch.no_grad()
def test_a_folder_of_an_earlier_version_loads():
    """Saved when the layout was new: a tied head, and the logits of one batch."""
    expected = load_file(GOLDEN.with_name("int8_expected.safetensors"))
    model = sparsekern.load(GOLDEN, device="cpu")
    torch.testing.assert_close(model(input_ids=expected["ids"]).logits, expected["logits"], rtol=0, atol=1e-4)
    stored = load_file(GOLDEN / "model.safetensors")
    values, scales = quantize_rows(model.lm_head.dense_weight())
    assert torch.equal(values, stored[f"{EMBEDDINGS}.values"]) and torch.equal(scales, stored[f"{EMBEDDINGS}.scales"])


def test_packing_again_leaves_the_head_and_other_calls_too():
    model = sparsekern.pack(llama(), head="int8")
    head = model.lm_head
    for again in ({}, {"head": "int8"}, {"format": "bitmask"}):
        assert sparsekern.pack(model, **again).lm_head is head
    dense = packed.llama()
    for parameter in dense.parameters():
        parameter.data.add_(1)  # no zeros: only the head gets smaller
    assert sparsekern.pack(dense, head="int8").lm_head.format == "int8"


def test_a_pruned_head_that_is_packed_is_rounded():
    model = packed.llama(tie_word_embeddings=False)
    packed.prune_linears(model.lm_head)
    packed.two_of_four(model.lm_head)
    sparsekern.pack(model)
    assert model.lm_head.format == "2:4"
    assert sparsekern.pack(model, head="int8").lm_head.format == "int8"


def test_zeros_and_bytes_count_every_weight_once():
    for tied in (True, False):
        model = llama(tied)
        with torch.no_grad():
            model.lm_head.weight[:, ::2] = 0
        zeros, bytes = count_zeros(model), weight_bytes(model)
        sparsekern.pack(model, head="int8")
        assert count_zeros(model) == (
            zeros[0] + int((quantize_rows(model.lm_head.dense_weight())[0][:, 1::2] == 0).sum()),
            zeros[1],
        )
        assert weight_bytes(model) < bytes - 320 * 64 * 2


def test_gradients_flow_through_the_head():
    model = sparsekern.pack(llama(), head="int8")
    hidden = torch.randn(2, 64, requires_grad=True)
    model.lm_head(hidden).sum().backward()
    torch.testing.assert_close(hidden.grad, model.lm_head.dense_weight().sum(0).expand(2, -1))


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("scales", math.nan, "scales: expected finite values of at least 0, got nan in row 7"),
        ("scales", -1.0, "scales: expected finite values of at least 0, got -1.0 in row 7"),
        ("values", -128, "values: expected -127 to 127, got -128 in row 7"),
    ],
)
def test_damaged_tensors_are_named(folder, tmp_path, part, value, message):
    copied = shutil.copytree(folder, tmp_path / "copy")
    state = load_file(copied / "model.safetensors")
    (name,) = [name for name in state if name.endswith(f".{part}") and state[name].shape[0] == 320]
    state[name].view(320, -1)[7, 0] = value
    save_file(state, copied / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=f"model.safetensors: {name.rpartition('.')[0]}.{message}$"):
        sparsekern.load(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"shape": [319, 64]}, r"scales: expected F32 \[319\] by config.json, got F32 \[320\]"),
        ({"dtype": "int8"}, r"\.dtype: expected one of float32, bfloat16, float16, got 'int8'"),
        ({"format": "2:4"}, "expected I32|is missing|expected F32"),
        (None, "belongs to a packed layer, but quantization_config.layers has no"),
    ],
)
def test_entries_that_contradict_the_folder_are_refused(folder, tmp_path, change, message):
    copied = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copied / "config.json").read_text())
    layers = config["quantization_config"]["layers"]
    (name,) = [name for name in layers if name in ("lm_head", EMBEDDINGS)]
    layers[name] = {**layers[name], **(change or {})}
    if change is None:
        del layers[name]
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        sparsekern.load(copied)


class Scaled(torch.nn.Embedding):
    """Embeddings that do more than look up."""


def test_what_has_no_head_of_8_bits_is_refused_before_any_change(tmp_path):
    def with_hook(model):
        model.lm_head.register_forward_hook(lambda *_: None)
        return model

    def not_finite(model):
        with torch.no_grad():
            model.lm_head.weight[5, 5] = math.inf
        return model

    def with_scaled_embeddings(model):
        embeddings = Scaled(320, 64)
        embeddings.weight = model.lm_head.weight
        model.model.embed_tokens = embeddings
        return model

    def twice(model):
        model.model.more = torch.nn.Embedding(320, 64)
        model.model.more.weight = model.lm_head.weight
        return model

    for model, message in (
        (llama().model, "head: expected a model with a head, which makes logits of hidden states, got LlamaModel"),
        (with_hook(llama()), "lm_head: expected no hooks, since packing would lose them; remove them first"),
        (not_finite(llama()), "model.embed_tokens: weight: expected finite values, got inf in row 5"),
        (not_finite(llama(False)), "lm_head: weight: expected finite values, got inf in row 5"),
        (
            with_scaled_embeddings(llama()),
            "head: expected to be tied to plain embeddings, got lm_head, which is tied to model.embed_tokens, a Scaled",
        ),
        (twice(llama()), "head: expected to be tied to embeddings in one place, got lm_head, which is tied to those in several"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            sparsekern.pack(model, head="int8")
        assert not sparsekern.runtime.is_packed(model)
    model = llama()
    for head in ("int4", True, 8):
        with pytest.raises(ValueError, match=f"^head: expected 'int8' or None, got {head!r}$"):
            sparsekern.pack(model, head=head)
    with pytest.raises(ValueError, match="^format: expected .* got 'int8', which is for the head: head='int8'$"):
        sparsekern.pack(model, "int8")
    with pytest.raises(ValueError, match="^format: expected 'dense', .* got 'int8', which is for the head: head='int8'$"):
        sparsekern.save(model, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="^head: expected None for format='dense', got 'int8'; format='packed' takes it$"):
        sparsekern.save(model, tmp_path / "out", head="int8")
    assert not sparsekern.runtime.is_packed(model) and not (tmp_path / "out").exists()


def test_unpacking_keeps_hooks_by_refusal():
    model = sparsekern.pack(llama(), head="int8")
    model.model.embed_tokens.register_forward_hook(lambda *_: None)
    with pytest.raises(
        ValueError, match="^model.embed_tokens: expected no hooks, since unpacking would lose them; remove them first$"
    ):
        sparsekern.unpack(model)
    assert isinstance(model.lm_head, TiedHead) and isinstance(model.model.layers[0].mlp.up_proj, SparseLinear)


@pytest.mark.parametrize("head", [None, "int8"])
def test_ties_that_a_model_declares_itself_are_kept(head):
    model = llama()
    model._tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight", "a": "b"}
    dense = sparsekern.unpack(sparsekern.pack(model, head=head))
    assert vars(dense)["_tied_weights_keys"] == {"lm_head.weight": "model.embed_tokens.weight", "a": "b"}
    assert dense.lm_head.weight is dense.model.embed_tokens.weight


SIZES = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=320)


@torch.no_grad()
def test_a_tied_head_with_a_bias(tmp_path):
    model = PhiForCausalLM(PhiConfig(**SIZES, tie_word_embeddings=True)).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    ids, plain = packed.ids(), copy.deepcopy(model)
    plain.lm_head.weight.copy_(rounded(plain.lm_head.weight))
    expected = sparsekern.pack(plain)(input_ids=ids).logits
    held = sparsekern.pack(model, head="int8")
    assert isinstance(held.lm_head, TiedHead)
    torch.testing.assert_close(held(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    sparsekern.save(held, tmp_path / "packed", "packed")
    assert torch.equal(sparsekern.load(tmp_path / "packed")(input_ids=ids).logits, held(input_ids=ids).logits)
    names = {name for name, _, _ in named_weights(held)}
    assert "lm_head.bias" in names and "lm_head.weight" not in names


def test_a_head_whose_bias_is_shared_is_refused():
    model = BertForMaskedLM(BertConfig(**SIZES))
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    message = "^head: expected a bias that is not shared, got that of cls.predictions.decoder, which cls.predictions shares$"
    with pytest.raises(ValueError, match=message):
        sparsekern.pack(model, head="int8")
    assert not sparsekern.runtime.is_packed(model)


def test_values_at_the_end_of_float16_stay_finite():
    weight = torch.tensor([[65504.0, 1.0], [-65504.0, 65000.0]], dtype=torch.float16)
    values, scales = quantize_rows(weight)
    restored = restore_rows(values, scales, torch.float16)
    assert restored.isfinite().all() and values[0, 0] == 127
    torch.testing.assert_close(restored.float(), weight.float(), rtol=0, atol=258)  # half a step


def test_a_server_refuses_it_by_name(folder):
    entries = json.loads((folder / "config.json").read_text())["quantization_config"]
    message = (
        r"expected packed linears, got 8-bit values of a head \((lm_head|model.embed_tokens)\), which sparsekern does not serve"
    )
    with pytest.raises(ValueError, match=message):
        layers_of(entries)
