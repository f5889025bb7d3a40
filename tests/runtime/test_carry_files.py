"""Files that are no weights: what a saved model takes over from the folder that it was loaded from, and what stays behind."""

import os
import shutil

import pytest
import transformers as tf

import sparsekern
from sparsekern.models.load import load_tokenizer
from tests import tiny
from tests.runtime.source_folders import KEPT


def files_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


OWN = {"config.json", "model.safetensors", "README.md", "tokenizer.json", "tokenizer_config.json"}


def test_files_that_are_no_weights_are_saved_along(encoder, tmp_path):
    path = sparsekern.save(sparsekern.load(encoder, device="cpu"), tmp_path / "out")
    assert files_in(path) == KEPT.keys() | OWN
    assert all((path / name).read_text(encoding="utf-8") == text for name, text in KEPT.items())
    assert all((path / name).read_bytes() == (encoder / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json"))
    assert "the old card" not in (path / "README.md").read_text()


def test_a_tokenizer_that_is_given_replaces_that_of_the_source(encoder, tmp_path):
    """A part of another one is not mixed with it; what the source's own writes no more is kept."""
    model = sparsekern.load(encoder, device="cpu")
    path = sparsekern.save(model, tmp_path / "own", tokenizer=load_tokenizer(encoder))
    assert files_in(path) == KEPT.keys() | OWN
    other = tiny.tokenizer()
    other.add_tokens(["another"])
    path = sparsekern.save(model, tmp_path / "other", tokenizer=other)
    assert files_in(path) == KEPT.keys() - {"vocab.txt"} | OWN
    assert (path / "tokenizer.json").read_bytes() != (encoder / "tokenizer.json").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_links_that_lead_out_of_the_folder_are_not_followed(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "a", symlinks=True)
    (tmp_path / "secret.json").write_text("key")
    (tmp_path / "secrets").mkdir()
    (tmp_path / "secrets" / "more.json").write_text("key")
    (folder / "within.json").symlink_to(folder / "vocab.txt")
    (folder / "leak.json").symlink_to(tmp_path / "secret.json")
    (folder / "leaks").symlink_to(tmp_path / "secrets")
    (folder / "broken.json").symlink_to(tmp_path / "nothing")
    with pytest.warns(
        sparsekern.SparsekernWarning, match=r"leak.json, leaks will not be saved with the model \(.*, links out of its folder, or "
    ):
        model = sparsekern.load(folder, device="cpu")
    path = sparsekern.save(model, tmp_path / "out")
    assert files_in(path) == KEPT.keys() | OWN | {"within.json"}
    assert (path / "within.json").read_text() == "a" and not (path / "within.json").is_symlink()


@pytest.mark.skipif(os.name != "posix", reason="links need rights elsewhere")
def test_the_links_of_the_hubs_cache_are_followed(encoder, tmp_path):
    cache = tmp_path / "models--x--y"
    blobs, snapshot = cache / "blobs", cache / "snapshots" / "abc"
    shutil.copytree(encoder, blobs)
    for name in files_in(blobs):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(blobs / name)
    path = sparsekern.save(sparsekern.load(snapshot, device="cpu"), tmp_path / "out")
    assert files_in(path) == KEPT.keys() | OWN


def test_weights_that_nobody_reads_are_named(encoder, tmp_path):
    folder = shutil.copytree(encoder, tmp_path / "a")
    (folder / "mtp.safetensors").write_text("x")
    with pytest.warns(
        sparsekern.SparsekernWarning, match="mtp.safetensors will not be saved with the model .weights that it does not read"
    ):
        sparsekern.load(folder, device="cpu")


def test_a_hub_id_takes_the_files_of_its_repository(encoder, tmp_path, monkeypatch):
    """All but its weights are fetched, and those of the modules behind the model."""
    import huggingface_hub

    asked = []

    def snapshot_download(name, **patterns):
        asked.append(patterns)
        return str(encoder)

    local = tf.BertForSequenceClassification.from_pretrained
    kind = type("Hub", (), {"from_pretrained": staticmethod(lambda name, **options: local(encoder, **options))})
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(tf.AutoConfig, "from_pretrained", lambda name, **options: tf.BertConfig.from_pretrained(encoder))
    monkeypatch.setattr(tf.BertForSequenceClassification, "from_pretrained", kind.from_pretrained)
    model = sparsekern.load("some/model", device="cpu")
    assert "*.safetensors" in asked[0]["ignore_patterns"] and asked[1] == {"allow_patterns": ["1_Pooling/*", "2_Dense/*"]}
    assert files_in(sparsekern.save(model, tmp_path / "out")) == KEPT.keys() | OWN
