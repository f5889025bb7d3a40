"""The examples in the docstrings of the public names run."""

import doctest

import pytest
import torch

import sparsekern
from tests import encoders, tiny

NAMES = sorted(name for name in sparsekern.__all__ if not name.startswith("__"))


@pytest.fixture
def names(tmp_path, monkeypatch):
    """What the examples speak of: a model, its tokenizer, token ids, an encoder, a text, and a dense and a pruned folder."""
    tokenizer = tiny.tokenizer()
    tiny.save_folder(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(tiny.TEXT, encoding="utf-8")
    pruned = tiny.llama(len(tokenizer))
    sparsekern.prune(pruned, "magnitude", 0.5, progress=False)
    sparsekern.save(pruned, tmp_path / "pruned", tokenizer=tokenizer)
    monkeypatch.chdir(tmp_path)
    ids = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    model, encoder = tiny.llama(len(tokenizer)), encoders.tiny("bert_classifier")
    return {"sparsekern": sparsekern, "torch": torch, "model": model, "tokenizer": tokenizer, "ids": ids, "encoder": encoder}


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name, names):
    thing = getattr(sparsekern, name)
    found = doctest.DocTestFinder(recurse=False).find(thing, name, globs=names)
    examples = [example for test in found for example in test.examples]
    assert examples, f"sparsekern.{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in found:
        runner.run(test)
    assert not runner.failures
