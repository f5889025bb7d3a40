"""Weights that a model divides in place while it is evaluated: RWKV's, after every so many blocks."""

import pytest
import torch
import transformers as tf

import sparsekern
from tests.models.zoo import ZOO

FAMILY = ZOO["rwkv"]
pytestmark = pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")


def dividing_model(every: int = 1) -> tf.PreTrainedModel:
    model = FAMILY.model()
    model.config.rescale_every = every
    return model


def logits(model: tf.PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(**FAMILY.samples()[0]).logits


def test_a_model_that_ran_is_saved_with_the_weights_of_its_checkpoint(tmp_path):
    model = dividing_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    assert any(not torch.equal(value, before[name]) for name, value in model.state_dict().items())  # the model has divided some
    saved = sparsekern.load(sparsekern.save(model, tmp_path / "saved"), device="cpu")
    assert saved.config.rescale_every == 1
    for name, value in saved.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert torch.equal(logits(saved), expected)


def test_pruning_decides_as_for_a_model_that_divides_nothing(tmp_path):
    divided, plain = dividing_model(), dividing_model(every=0)
    logits(divided)
    for model, name in ((divided, "divided"), (plain, "plain")):
        sparsekern.prune(model, "sparsegpt", "2:4", calibration=FAMILY.calibration(), out=tmp_path / name, progress=False)
    folders = [sparsekern.load(tmp_path / name, device="cpu") for name in ("divided", "plain")]
    assert [folder.config.rescale_every for folder in folders] == [1, 0]
    for name, value in folders[0].state_dict().items():
        assert torch.equal(value, folders[1].state_dict()[name]), name
    torch.testing.assert_close(logits(divided), logits(plain), rtol=1e-3, atol=1e-4)


def test_packing_is_refused_before_any_work(tmp_path):
    model = dividing_model()
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    with pytest.raises(ValueError, match=r"divides weights in place while it runs.*rescale_every = 0"):
        sparsekern.pack(model)
    with pytest.raises(ValueError, match="divides weights in place"):
        sparsekern.prune(model, "magnitude", "2:4", out=tmp_path / "out", format="packed", progress=False)
    assert not (tmp_path / "out").exists()
    model.config.rescale_every = 0
    expected = logits(model)
    torch.testing.assert_close(logits(sparsekern.pack(model)), expected)
