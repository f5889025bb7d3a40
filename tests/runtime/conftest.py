"""Folders that several files of tests load, made once a file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsekern
from tests import encoders, tiny
from tests.runtime import packed
from tests.runtime.source_folders import PREDICTION, with_files, with_tensors


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A tiny Llama with a tokenizer and tensors that a Llama does not have."""
    return with_tensors(tiny.save_folder(tmp_path_factory.mktemp("carry") / "source"), PREDICTION)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny encoder with files other than weights."""
    return with_files(encoders.save_folder(tmp_path_factory.mktemp("carry") / "encoder"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny packed Llama in bfloat16 with a tied head."""
    return sparsekern.save(
        packed.llama(torch.bfloat16, tie_word_embeddings=True), tmp_path_factory.mktemp("packed") / "it", "packed"
    )


@pytest.fixture
def damaged(folder, tmp_path):
    """A copy to damage, with a way to rewrite its weights and one to rewrite its config."""

    class Damaged:
        path = Path(shutil.copytree(folder, tmp_path / "damaged"))
        weights = path / "model.safetensors"

        def tensors(self, change) -> None:
            state = load_file(self.weights)
            change(state)
            save_file(state, self.weights, {"format": "pt"})

        def config(self, change) -> None:
            config = json.loads((self.path / "config.json").read_text())
            change(config["quantization_config"])
            (self.path / "config.json").write_text(json.dumps(config))

    return Damaged()
