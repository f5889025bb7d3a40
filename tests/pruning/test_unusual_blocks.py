"""Blocks with rows sorted by position, with caches among their arguments, and with linears that do more than multiply."""

import pytest
import torch
import transformers as tf
from torch import nn

import sparsekern
from tests.models.zoo.family import COMMON, LLAMA, together, words
from tests.pruning.stack_models import Model

pytestmark = pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")
XLNET = dict(**COMMON, d_model=32, n_layer=2, n_head=4, d_inner=48)


def made(kind, config):
    torch.manual_seed(0)
    return kind(config).eval()


def kept(model, calibration, pattern="2:4"):
    sparsekern.prune(model, "wanda", pattern, calibration=calibration, progress=False)
    return {name: value != 0 for name, value in model.named_parameters()}


@pytest.mark.parametrize("lengths", [(12, 9, 10, 7), (2, 2, 12, 10), (12, *[9] * 11)], ids=["two", "one is square", "square"])
def test_padding_of_rows_that_are_sorted_by_position(lengths):
    """XLNet's activations are `[length, samples, features]`, which no shape tells where there are as many samples as tokens."""
    samples, size = words(lengths), 12 if len(lengths) > 4 else 2
    padded = [together(samples[start : start + size]) for start in range(0, len(samples), size)]
    found, expected = (kept(made(tf.XLNetLMHeadModel, tf.XLNetConfig(**XLNET)), batches) for batches in (padded, samples))
    for name, mask in expected.items():
        assert torch.equal(found[name], mask), name


def test_a_sample_is_named_where_rows_are_sorted_by_position():
    model = made(tf.XLNetLMHeadModel, tf.XLNetConfig(**XLNET))
    model.transformer.word_embedding.weight.data[90] = torch.inf
    batch = torch.randint(3, 80, (3, 6))
    batch[1, 4] = 90
    mask = torch.ones_like(batch)
    mask[2, 5:] = 0
    model.transformer.layer[0].rel_attn.forward = lambda h, g, *args, **kwargs: (h, g)  # mixes no tokens
    with pytest.raises(ValueError, match="calibration sample 1 "):
        kept(model, [{"input_ids": batch, "attention_mask": mask}])


def test_a_decoder_whose_head_is_its_embedding_is_pruned_too():
    """FSMT names the decoder's embedding as its head, which the decoder begins with."""
    config = tf.FSMTConfig(
        langs=["en", "de"], src_vocab_size=96, tgt_vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48,
    )  # fmt: skip
    model = made(tf.FSMTForConditionalGeneration, config)
    report = sparsekern.prune(
        model, "wanda", "2:4", calibration=[{**words()[0], "decoder_input_ids": words()[1]["input_ids"]}], progress=False
    )
    names = {layer.name for layer in report.layers}
    assert {"model.encoder.layers.0.fc1", "model.decoder.layers.0.fc1", "model.decoder.layers.0.encoder_attn.k_proj"} <= names


class Grouped(nn.Linear):
    """Half of the outputs from each half of the inputs, as in DeepSeek V4."""

    def forward(self, x):
        first, second = x.chunk(2, -1)
        top, bottom = self.weight.chunk(2)
        return torch.cat((first @ top.T, second @ bottom.T), -1)


class GroupedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.grouped = nn.Linear(8, 16), Grouped(8, 8, bias=False)

    def forward(self, hidden):
        return hidden + self.grouped(self.up(hidden))


@pytest.mark.filterwarnings("default::sparsekern.SparsekernWarning")
def test_a_linear_that_multiplies_by_groups_stays_dense():
    """The inputs of its rows differ, so no statistic of the module's inputs is right for all of them."""
    model = Model("chain", [GroupedBlock(), GroupedBlock()])
    before = [block.grouped.weight.clone() for block in model.layers]
    with pytest.warns(sparsekern.SparsekernWarning, match="grouped: it computes something else than the product"):
        report = sparsekern.prune(model, "wanda", "2:4", calibration=torch.randint(0, 9, (2, 6)), progress=False)
    assert [layer.name for layer in report.layers] == ["layers.0.up", "layers.1.up"]
    assert all(torch.equal(block.grouped.weight, weight) for block, weight in zip(model.layers, before, strict=True))
    sparsekern.prune(model, "magnitude", "2:4", progress=False)  # looks at weights alone
    assert all((block.grouped.weight == 0).float().mean() == 0.5 for block in model.layers)


def test_a_mask_of_four_dimensions_goes_to_the_model():
    """One that is causal changes nothing; one that lets tokens see themselves alone does."""
    causal, alone = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril(), torch.eye(12, dtype=torch.bool)[None, None]
    ids = torch.cat([words()[0]["input_ids"]] * 2)
    found = []
    for mask in (None, causal, alone):
        model = made(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA))
        found.append(kept(model, [{"input_ids": ids, "attention_mask": mask}]))
    assert all(torch.equal(mask, found[1][name]) for name, mask in found[0].items())
    assert any(not torch.equal(mask, found[2][name]) for name, mask in found[0].items())


def test_a_mask_that_is_added_to_scores_marks_no_padding():
    mask = torch.zeros(1, 12)
    mask[0, 9:] = -1e9
    with pytest.raises(ValueError, match="expected attention_mask with 0 at padding and 1 elsewhere, got -1000000000.0"):
        kept(made(tf.LlamaForCausalLM, tf.LlamaConfig(**LLAMA)), [{**words()[0], "attention_mask": mask}])
