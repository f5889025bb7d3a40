"""Heads and neurons found by looking, chosen by brute force, and gone for good."""

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern import Gradual, Structured, Unstructured
from sparsekern.models import find_blocks, find_linears
from sparsekern.models.decoder_units import find_units
from tests import encoders
from tests.models.families import tiny_ids, tiny_model

HEAD = 8


def prune(model, pattern=0.5, **arguments):
    return sparsekern.prune(model, arguments.pop("method", "structured"), pattern, progress=False, **arguments)


def units_of(model, index: int = 0):
    blocks = find_blocks(model)
    return find_units(model, find_linears(blocks.modules[index], blocks.block_name(index)))


@pytest.mark.parametrize(
    "family, expected",
    [
        ("llama", [("heads", 4, 1, 2), ("neurons", 48, 2, 0)]),  # kind, units, whole producers, shared ones
        ("opt", [("heads", 4, 3, 0), ("neurons", 48, 1, 0)]),
        ("gpt2", [("heads", 4, 0, 0), ("neurons", 128, 1, 0)]),
        ("phi3", [("heads", 4, 0, 0), ("neurons", 48, 0, 0)]),
        ("gpt_neox", [("heads", 4, 0, 0), ("neurons", 48, 1, 0)]),
    ],
)
def test_units_are_found(family, expected):
    found = units_of(tiny_model(family))
    assert [(u.kind, u.count, len(u.producers), len(u.shared)) for u in found] == expected


@torch.no_grad()
def test_norms_of_units_count_each_weight_once():
    """Keys and values that two heads share count half for each."""
    block = tiny_model("llama").model.layers[0]
    heads, neurons = units_of(tiny_model("llama"))
    for units, module in ((heads, block.self_attn), (neurons, block.mlp)):
        weights = [linear.weight.double() for linear in module.children() if isinstance(linear, torch.nn.Linear)]
        assert float(units.square_norms().sum()) == pytest.approx(float(sum(weight.square().sum() for weight in weights)))
    first, second = heads.square_norms()[:2]
    query, output = block.self_attn.q_proj.weight.double().square(), block.self_attn.o_proj.weight.double().square()
    own = [query[rows].sum() + output[:, rows].sum() for rows in (slice(0, HEAD), slice(HEAD, 2 * HEAD))]
    torch.testing.assert_close(first - second, own[0] - own[1])


@torch.no_grad()
def test_equals_brute_force():
    dense, model = tiny_model("llama"), tiny_model("llama")
    prune(model)
    for before, after in zip(dense.model.layers, model.model.layers, strict=True):
        attention, mlp = before.self_attn, before.mlp
        norms = [
            attention.q_proj.weight[rows].square().sum()
            + attention.o_proj.weight[:, rows].square().sum()
            + (attention.k_proj.weight[shared].square().sum() + attention.v_proj.weight[shared].square().sum()) / 2
            for rows, shared in ((slice(h * HEAD, (h + 1) * HEAD), slice(h // 2 * HEAD, (h // 2 + 1) * HEAD)) for h in range(4))
        ]
        heads = torch.tensor(norms).sort().indices[:2].tolist()
        for head in range(4):
            rows = slice(head * HEAD, (head + 1) * HEAD)
            for slab, dense_slab in (
                (after.self_attn.q_proj.weight[rows], attention.q_proj.weight[rows]),
                (after.self_attn.o_proj.weight[:, rows], attention.o_proj.weight[:, rows]),
            ):
                assert torch.equal(slab, dense_slab * (head not in heads))
        for group in range(2):
            rows = slice(group * HEAD, (group + 1) * HEAD)
            gone = {2 * group, 2 * group + 1} <= set(heads)
            assert torch.equal(after.self_attn.k_proj.weight[rows], attention.k_proj.weight[rows] * (not gone))
        score = mlp.gate_proj.weight.square().sum(1) + mlp.up_proj.weight.square().sum(1) + mlp.down_proj.weight.square().sum(0)
        kept = score > score.sort().values[23]
        assert torch.equal(after.mlp.gate_proj.weight, mlp.gate_proj.weight * kept[:, None])
        assert torch.equal(after.mlp.up_proj.weight, mlp.up_proj.weight * kept[:, None])
        assert torch.equal(after.mlp.down_proj.weight, mlp.down_proj.weight * kept)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2", "phi3"])
def test_what_is_pruned_has_no_effect_any_more(family):
    """Whatever is written into the rows that were pruned, the output stays: no column reads them."""
    model = tiny_model(family)
    report = prune(model)
    assert 0 < report.sparsity <= 0.5
    before = model(input_ids=tiny_ids()).logits
    with torch.no_grad():
        for index in range(3):
            for units in units_of(model, index):
                for linear in units.producers + units.shared:
                    zero = ~linear.weight.any(1)
                    linear.weight[zero] = torch.randn(int(zero.sum()), linear.features)
    torch.testing.assert_close(model(input_ids=tiny_ids()).logits, before, rtol=0, atol=1e-6)


def test_only_heads_and_layers_of_their_own():
    model = tiny_model("llama")
    report = prune(model, 0.25, method=Structured(units="heads"), patterns={"*.1.self_attn.o_proj": 0.75})
    zeros = {layer.name: layer.zeros for layer in report.layers}
    assert zeros["model.layers.0.mlp.up_proj"] == 0
    assert [zeros[f"model.layers.{i}.self_attn.o_proj"] for i in range(3)] == [HEAD * 32, 3 * HEAD * 32, HEAD * 32]
    assert report.layers[0].pattern == "-8,-0"


def test_zeros_go_first():
    model, twice = tiny_model("llama"), tiny_model("llama")
    prune(model, 0.75)
    prune(twice, 0.25)
    prune(twice, 0.75)
    for a, b in zip(model.parameters(), twice.parameters(), strict=True):
        assert torch.equal(a, b)


def test_resumes_and_reports(tmp_path):
    report = prune(tiny_model("llama"), out=tmp_path / "out")
    assert report.settings["method"] == {"name": "structured", "units": "both"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"pattern": "2:4"}, "pattern: expected a sparsity for Structured, which prunes whole units, got '2:4'"),
        (
            {"include": "*.q_proj"},
            "expected model.layers.0.self_attn.o_proj, without which .* heads, got only model.*.q_proj of its module",
        ),
        (
            {"method": Structured("heads"), "include": "*.mlp.*"},
            "Structured.units: found no heads in the block of model.layers.0.mlp",
        ),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        prune(tiny_model("llama"), **arguments)


@pytest.mark.parametrize(
    ("family", "arguments", "expected"),
    [
        ("opt", {"exclude": "*out_proj"}, "model.decoder.layers.0.self_attn.out_proj"),
        (
            "opt",
            {"patterns": {"*out_proj": None}, "method": Gradual(criterion="structured", epochs=0)},
            "layers.0.self_attn.out_proj",
        ),
        ("phi", {"exclude": "*dense"}, "model.layers.0.self_attn.dense"),
        ("gpt2", {"exclude": "*.mlp.c_proj"}, "transformer.h.0.mlp.c_proj"),
    ],
)
def test_no_other_linear_passes_for_an_output_projection_that_is_left_out(family, arguments, expected):
    model = tiny_model(family)
    with pytest.raises(
        ValueError, match=f"include, exclude, patterns: expected .*{expected}, without which Structured cannot prune"
    ):
        prune(model, **arguments)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), tiny_model(family).parameters(), strict=True))


def test_what_is_left_out_stays_dense_and_counts():
    whole, model, dense = (tiny_model("llama") for _ in range(3))
    prune(whole)
    prune(model, exclude=["*.k_proj", "*.1.mlp.*"])
    weights, before = dict(model.named_parameters()), dict(dense.named_parameters())
    for name, weight in whole.named_parameters():
        left_out = "k_proj" in name or "layers.1.mlp" in name
        assert torch.equal(weights[name], before[name] if left_out else weight)


@pytest.mark.parametrize("method", ["structured", Gradual(criterion="structured", epochs=0)])
@pytest.mark.parametrize("name", ["bert", "roberta_tokens", "distilbert"])
def test_encoders_are_refused_by_name(name, method):
    model = encoders.tiny(name)
    with pytest.raises(
        ValueError,
        match=f"expected a decoder, whose heads and neurons can become zero, got the encoder {type(model).__name__}; KPrune",
    ):
        prune(model, method=method)


def test_an_attention_without_its_output_projection_is_refused():
    model = tf.BertLMHeadModel(tf.BertConfig(**encoders.SIZES, is_decoder=True))
    message = (
        "model: expected query, key, value and output projection in bert.encoder.layer.0.attention.self of BertLMHeadModel, "
        "got query 32 to 32, key 32 to 32, value 32 to 32"
    )
    with pytest.raises(ValueError, match=message):
        prune(model)


def test_refuses_unknown_units_and_a_single_linear():
    with pytest.raises(ValueError, match="Structured.units: expected one of 'both', 'heads', 'neurons', got 'layers'"):
        Structured(units="layers")
    with pytest.raises(
        ValueError, match="Structured: expected the rows and columns that allocate has chosen; call sparsekern.prune"
    ):
        Structured().solve(torch.ones(4, 4), None, Unstructured(0.5))
