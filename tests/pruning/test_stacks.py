"""Forwards that are no plain chain of blocks, against statistics from hooks on whole forwards, block after block."""

import copy

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.data import calibration_ids
from sparsekern.models import find_blocks, find_linears
from sparsekern.pruning.checkpoint import Checkpoint
from tests import tiny
from tests.models.zoo import ZOO
from tests.pruning.stack_models import WAYS, Model, Plain, assert_equal, calls, oracle, plain, toy

QUIET = {"progress": False}
NAMES = ("encoder", "layers")


@pytest.mark.parametrize("way", WAYS)
def test_each_way_to_run_blocks(way):
    model = toy(way)
    expected = copy.deepcopy(model)
    order = [f"{name}.{i}" for name in NAMES if hasattr(model, name) for i in range(len(getattr(model, name)))]
    oracle(expected, calls(), list(reversed(order)) if way == "backwards" else order)
    report = sparsekern.prune(model, "wanda", "2:4", calls(), **QUIET)
    assert_equal(model, expected)
    assert {layer.name for layer in report.layers} == {linear.name for linear in find_linears(model)}


def test_tensors_are_kept_only_while_a_block_still_reads_them(monkeypatch):
    from sparsekern.pruning.blockwise.replay import Replay

    most = []
    advance = Replay.advance

    def spy(self, batch, index):
        advance(self, batch, index)
        most.append(sum(len(done.kept) for done in self._done[batch].values()))

    monkeypatch.setattr(Replay, "advance", spy)
    sparsekern.prune(toy("doubled"), "wanda", "2:4", calls(), **QUIET)
    assert set(most) == {0}
    most.clear()
    sparsekern.prune(toy("skipping"), "wanda", "2:4", calls()[:1], **QUIET)
    assert most == [1, 1, 0]  # the first output, until the last block that it is added to has its arguments


BART = dict(
    vocab_size=32,
    d_model=16,
    encoder_layers=2,
    decoder_layers=2,
    encoder_attention_heads=2,
    decoder_attention_heads=2,
    encoder_ffn_dim=24,
    decoder_ffn_dim=24,
    max_position_embeddings=32,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    decoder_start_token_id=1,
)
BART_BLOCKS = [f"model.{stack}.layers.{index}" for stack in ("encoder", "decoder") for index in range(2)]


@pytest.fixture
def bart():
    torch.manual_seed(0)
    return tf.BartForConditionalGeneration(tf.BartConfig(**BART)).eval()


def pair(length=8) -> dict[str, torch.Tensor]:
    """Questions and answers of one length, of which other tokens are padding."""
    generator = torch.Generator().manual_seed(2)
    ids = {name: torch.randint(3, 32, (2, length), generator=generator) for name in ("input_ids", "decoder_input_ids")}
    return {
        **ids,
        "attention_mask": (torch.arange(length) < torch.tensor([[5], [8]])).long(),
        "decoder_attention_mask": (torch.arange(length) < torch.tensor([[8], [3]])).long(),
    }


def bart_mask(name: str, call) -> torch.Tensor | None:
    reads_encoder = ".encoder." in name or name.endswith(("encoder_attn.k_proj", "encoder_attn.v_proj"))
    return call.get("attention_mask" if reads_encoder else "decoder_attention_mask")


@pytest.mark.parametrize("masks", [("attention_mask", "decoder_attention_mask"), ("attention_mask",), ("decoder_attention_mask",)])
def test_padding_belongs_to_the_side_that_it_is_of(bart, masks):
    call = {name: value for name, value in pair().items() if "mask" not in name or name in masks}
    expected = copy.deepcopy(bart)
    oracle(expected, [call], BART_BLOCKS, bart_mask)
    sparsekern.prune(bart, "wanda", "2:4", [call], **QUIET)
    assert_equal(bart, expected)


def test_ids_alone_go_to_both_sides(bart):
    expected = copy.deepcopy(bart)
    ids = pair()["input_ids"]
    sparsekern.prune(bart, "wanda", "2:4", ids, **QUIET)
    sparsekern.prune(expected, "wanda", "2:4", [{"input_ids": ids, "decoder_input_ids": ids}], **QUIET)
    assert_equal(bart, expected)


def test_a_text_goes_to_both_sides(tmp_path):
    words = tiny.tokenizer()
    (tmp_path / "text.txt").write_text(tiny.TEXT)
    torch.manual_seed(0)
    model = tf.BartForConditionalGeneration(tf.BartConfig(**BART | {"vocab_size": len(words)})).eval()
    expected = copy.deepcopy(model)
    text = {"calibration": tmp_path / "text.txt", "tokenizer": words, "samples": 4, "length": 8}
    report = sparsekern.prune(model, "wanda", "2:4", **text, **QUIET)
    assert report.calibration_tokens == 32
    sparsekern.prune(expected, "wanda", "2:4", calibration_ids(tmp_path / "text.txt", words, samples=4, length=8), **QUIET)
    assert_equal(model, expected)


def test_tables_that_blocks_share_are_no_values_of_a_block():
    class Sharing(Plain):
        tables: list = []

        def forward(self, x, positions):
            if not self.tables:
                self.tables.append(positions.cos())
            return super().forward(x + self.tables[0][..., None])

    class Positioned(Model):
        def forward(self, input_ids, use_cache=None):
            positions, x = torch.arange(input_ids.shape[1]), self.embed(input_ids)
            for block in self.layers:
                x = block(x, positions)
            return x

    torch.manual_seed(0)
    model, samples = Positioned("", [Sharing() for _ in range(3)]), calls((8, 8))
    expected = copy.deepcopy(model)
    oracle(expected, samples, [f"layers.{index}" for index in range(3)])
    Sharing.tables.clear()
    sparsekern.prune(model, "wanda", "2:4", samples, **QUIET)
    assert_equal(model, expected)


def test_labels_give_the_decoder_its_ids(bart):
    expected, call = copy.deepcopy(bart), pair()
    labels = call["decoder_input_ids"].masked_fill(call["decoder_attention_mask"] == 0, -100)
    shifted = bart.prepare_decoder_input_ids_from_labels(labels)
    sparsekern.prune(bart, "wanda", "2:4", [{"input_ids": call["input_ids"], "labels": labels}], **QUIET)
    given = {"input_ids": call["input_ids"], "decoder_input_ids": shifted}
    decoded = {"decoder_attention_mask": call["decoder_attention_mask"]}
    oracle(expected, [given], BART_BLOCKS, lambda name, _: bart_mask(name, decoded))
    assert_equal(bart, expected)


def test_what_a_decoder_lacks_is_said():
    ids = torch.arange(3, 27).view(2, 12)
    with pytest.raises(
        ValueError, match="refuses batch 0: ValueError: .*; an encoder-decoder may need decoder_input_ids or labels"
    ):
        sparsekern.prune(ZOO["t5"].model(), "wanda", "2:4", [{"input_ids": ids}], **QUIET)
    model = ZOO["t5"].model()
    model.prepare_decoder_input_ids_from_labels = lambda labels: labels.unknown
    with pytest.raises(ValueError, match="calibration: the model makes no decoder_input_ids of labels .*; give both"):
        sparsekern.prune(model, "wanda", "2:4", [{"input_ids": ids, "labels": ids}], **QUIET)


@pytest.mark.filterwarnings("ignore:.*few|.*tokens for:sparsekern.SparsekernWarning")
@pytest.mark.parametrize("method", ["sparsellm", "copal"])
def test_methods_of_other_kinds_prune_both_sides(bart, method):
    report = sparsekern.prune(bart, method, "2:4", [pair()], **QUIET)
    assert {layer.name.split(".")[1] for layer in report.layers} == {"encoder", "decoder"}
    assert report.sparsity == 0.5


@pytest.mark.parametrize("finished", [1, 3])
def test_a_killed_run_is_resumed_with_the_same_result(bart, finished, tmp_path, monkeypatch):
    unbroken, again = copy.deepcopy(bart), copy.deepcopy(bart)
    sparsekern.prune(unbroken, "wanda", "2:4", [pair(), pair(6)], **QUIET)
    save, saved = Checkpoint.save, []

    def killed(self, index, result):
        if len(saved) == finished:
            raise KeyboardInterrupt
        saved.append(index)
        save(self, index, result)

    monkeypatch.setattr(Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        sparsekern.prune(bart, "wanda", "2:4", [pair(), pair(6)], out=tmp_path / "out", **QUIET)
    monkeypatch.undo()
    report = sparsekern.prune(again, "wanda", "2:4", [pair(), pair(6)], out=tmp_path / "out", resume=True, **QUIET)
    assert report.resumed_blocks == finished
    assert_equal(again, unbroken)


def test_continual_runs_prune_both_sides(bart):
    report = sparsekern.prune_continually(bart, {"a": [pair()], "b": [pair(6)]}, "wanda", "2:4", **QUIET)
    assert [step.sparsity for step in report.steps] == [0.5, 0.5]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda model: sparsekern.prune(model, "gradual", 0.5, pair()["input_ids"], **QUIET),
            "Gradual trains causal language models, but BartForConditionalGeneration is an encoder with a decoder",
        ),
        (
            lambda model: sparsekern.perplexity(model, pair()["input_ids"], 8),
            "expected a causal language model.*got BartForConditionalGeneration",
        ),
    ],
)
def test_what_needs_a_decoder_alone_refuses_by_name(bart, call, message):
    with pytest.raises((ValueError, TypeError), match=f"model: .*{message}|{message}"):
        call(bart)


def test_towers_are_pruned_where_they_are_included():
    family = ZOO["llava"]
    model = family.model()
    blocks = find_blocks(model)
    assert {stack.name: stack.by_default for stack in blocks.stacks} == {
        "model.vision_tower.encoder.layers": False,
        "model.language_model.layers": True,
    }
    expected = copy.deepcopy(model)
    report = sparsekern.prune(model, "wanda", "2:4", family.samples(), include=["*.vision_tower.*", "*.self_attn.q_proj"], **QUIET)
    found = {layer.name.split(".")[1] for layer in report.layers}
    assert found == {"vision_tower", "language_model"}
    with pytest.warns(sparsekern.SparsekernWarning, match=r"model.vision_tower.encoder.layers: stay dense"):
        report = sparsekern.prune(expected, "magnitude", "2:4", **QUIET)
    assert {layer.name.split(".")[1] for layer in report.layers} == {"language_model"}


def test_a_batch_that_the_forward_refuses(bart, tmp_path):
    before = copy.deepcopy(bart)
    bad = {"input_ids": pair()["input_ids"], "inputs_embeds": torch.zeros(2, 8, 16)}
    for batches, number in (([bad], 0), ([pair(), bad], 1)):
        with pytest.raises(
            ValueError, match=f"the forward of BartForConditionalGeneration refuses batch {number}: ValueError: You"
        ):
            sparsekern.prune(bart, "wanda", "2:4", batches, out=tmp_path / "out", **QUIET)
    long = dict(pair(), decoder_attention_mask=torch.ones(2, 8, 8, 8, 8))
    with pytest.raises(ValueError, match="calibration: expected decoder_attention_mask of shape"):
        sparsekern.prune(bart, "wanda", "2:4", [long], **QUIET)
    assert_equal(bart, before)
    sparsekern.prune(bart, "wanda", "2:4", [pair()], out=tmp_path / "out", **QUIET)


def test_a_later_batch_of_the_same_inputs_that_the_forward_refuses(tmp_path):
    model = toy("crossing")
    model.forward = refusing(model.forward)
    with pytest.raises(ValueError, match="calibration: the forward of Model refuses batch 2: RuntimeError: no sevens"):
        sparsekern.prune(model, "wanda", "2:4", [*calls((8, 6)), *calls((7,))], **QUIET)
    model = toy("chain")
    model.forward = refusing(model.forward)
    with pytest.raises(ValueError, match="calibration: the forward of Model refuses batch 1: RuntimeError: no sevens"):
        sparsekern.prune(model, "wanda", "2:4", calls(), **QUIET)


class ByLength(Model):
    """Seven tokens run other blocks than eight; a flag turns the order round."""

    def forward(self, input_ids, flag=None, use_cache=None):
        x, blocks = self.embed(input_ids), list(self.layers)
        if flag is not None or (self.way == "backwards" and input_ids.shape[1] == 7):
            blocks.reverse()
        if self.way == "shorter" and input_ids.shape[1] == 7:
            blocks.pop()
        for block in blocks:
            x = block(x) if self.way == "shorter" else block(x) * 2
        return x


@pytest.mark.parametrize(
    ("way", "batches", "message"),
    [
        ("shorter", calls(), "calibration: batch 1 runs other blocks than earlier batches with the same inputs"),
        ("backwards", calls(), "calibration: batch 1 runs the blocks in another order than earlier batches"),
        ("plain", [calls()[0], calls()[0] | {"flag": True}], "model: calibration batches run the blocks in different orders"),
    ],
)
def test_batches_that_run_the_blocks_otherwise(way, batches, message):
    torch.manual_seed(0)
    model = ByLength(way, plain())
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, "wanda", "2:4", batches, **QUIET)
    assert_equal(model, before)


def test_batches_of_two_kinds():
    """Text alone leaves out the cross attention. What one kind of batch runs is enough, but not for a dataset of its own."""
    images, text = ZOO["mllama"].samples()[:2], [{"input_ids": torch.arange(3, 15)[None]}]
    cross = {"include": "model.language_model.layers.1.*"}
    report = sparsekern.prune(ZOO["mllama"].model(), "wanda", "2:4", [*text, *images], **cross, **QUIET)
    assert len(report.layers) == 7
    with (
        pytest.warns(sparsekern.SparsekernWarning, match="language_model.layers.1: the calibration batches do not run this block"),
        pytest.raises(ValueError, match="calibration: expected batches that run the linears to prune; they run none of them"),
    ):
        sparsekern.prune(ZOO["mllama"].model(), "wanda", "2:4", text, **cross, **QUIET)
    with pytest.raises(
        ValueError, match=r"calibrations\['b'\]: calibration: expected batches that run model.language_model.layers.1"
    ):
        sparsekern.prune_continually(ZOO["mllama"].model(), {"a": images, "b": text}, "wanda", "2:4", **cross, **QUIET)


def refusing(forward):
    def checked(input_ids, use_cache=None):
        if input_ids.shape[1] == 7:
            raise RuntimeError("no sevens")
        return forward(input_ids)

    return checked


def test_padding_that_the_rows_do_not_tell_is_refused_before_any_work():
    class Sorting(Plain):
        def forward(self, x):
            rows = x.flatten(0, 1)
            rows = rows[rows[:, 0] > 0]
            return x + self.down(torch.tanh(self.up(rows))).mean()

    class Masked(Model):
        def forward(self, input_ids, attention_mask):
            return self.chain(self.embed(input_ids))

    torch.manual_seed(0)
    model, (call, *_) = Masked("chain", [Plain(), Sorting()]), calls()
    before, mask = copy.deepcopy(model), torch.ones_like(call["input_ids"])
    sparsekern.prune(copy.deepcopy(model), "wanda", "2:4", [call | {"attention_mask": mask}], **QUIET)
    mask[0, 5:] = 0
    with pytest.raises(ValueError, match=r"layers.1.up: an input of shape .* does not tell which rows are padding"):
        sparsekern.prune(model, "wanda", "2:4", [call | {"attention_mask": mask}], **QUIET)
    assert_equal(model, before)


def test_none_is_an_input_like_any_other():
    llama = {"attention_mask": None, "position_ids": None}
    model, ids = ZOO["llama"].model(), torch.arange(3, 19).view(2, 8)
    expected = copy.deepcopy(model)
    sparsekern.prune(model, "wanda", "2:4", [{"input_ids": ids, **llama}], **QUIET)
    sparsekern.prune(expected, "wanda", "2:4", ids, **QUIET)
    assert_equal(model, expected)


def test_images_are_given_as_they_are():
    family = ZOO["vit"]
    model, pixels = family.model(), torch.cat([sample["pixel_values"] for sample in family.samples()])
    expected = copy.deepcopy(model)
    sparsekern.prune(model, "wanda", "2:4", pixels, **QUIET)
    sparsekern.prune(expected, "wanda", "2:4", [{"pixel_values": pixels}], **QUIET)
    assert_equal(model, expected)
    with pytest.raises(ValueError, match="calibration: ViTForImageClassification takes pixel_values, not text"):
        sparsekern.prune(family.model(), "wanda", "2:4", "builtin:python-docs", tokenizer=str, **QUIET)


@pytest.mark.filterwarnings("ignore:.*conv1d:sparsekern.SparsekernWarning")
def test_a_weight_that_is_read_and_never_called_stays_dense():
    model = ZOO["mamba"].model()
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.warns(sparsekern.SparsekernWarning, match=r"mixer.dt_proj.*reads this weight without calling the layer"):
        report = sparsekern.prune(model, "wanda", "2:4", ZOO["mamba"].samples(), **QUIET)
    assert not any("dt_proj" in layer.name for layer in report.layers)
    for name, value in model.state_dict().items():
        assert torch.equal(value, dense[name]) == ("_proj" not in name or "dt_proj" in name)
