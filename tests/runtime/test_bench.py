import json
from xml.etree import ElementTree

import pytest
import torch

import sparsekern
from sparsekern.cli import main
from sparsekern.runtime.bench import compare, saved_bytes
from sparsekern.runtime.packing import packed_copy
from tests import tiny
from tests.runtime import packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    words = tiny.tokenizer()
    return str(sparsekern.save(packed.llama(), tmp_path_factory.mktemp("bench") / "dense", tokenizer=words))


def test_it_measures_both(tmp_path):
    model = packed.llama(torch.bfloat16, tie_word_embeddings=True)
    other = packed_copy(model)
    found = compare(model, other, prompt_length=8, tokens=4, rounds=1)
    sizes = [(sparsekern.save(model, tmp_path / format, format) / "model.safetensors").stat().st_size for format in ("dense", "packed")]
    for size, of in zip(sizes, (found.dense, found.packed), strict=True):
        assert 0 < size - of.disk < 16_000 and of.memory >= of.disk and of.prefill > 0 and of.decode > 0
    assert saved_bytes(other) == found.packed.disk < found.dense.disk
    assert found.logits < 0.02 and 0 <= found.same_tokens <= found.tokens == 4


def test_the_command(folder, tmp_path, capsys):
    command = ["bench", folder, "--prompt-length", "8", "--tokens", "4", "--rounds", "1"]
    assert main([*command, "--plot", str(tmp_path / "bench.svg")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["dense", "packed", "packed", "/", "dense"]
    assert [line.split(",")[0] for line in table[1:5]] == ["weights on disk", "weights in memory", "prefill", "decode"]
    assert float(table[1].split()[-1]) < 1 and "the first 4 tokens generated are the same" in table[5]
    assert len(list(ElementTree.parse(tmp_path / "bench.svg").iter("{http://www.w3.org/2000/svg}rect"))) == 5

    again = sparsekern.save(sparsekern.load(folder), tmp_path / "packed", "packed", tokenizer=tiny.tokenizer())
    assert main(["bench", str(again), *command[2:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packed"]["disk"] < found["dense"]["disk"] and found["tokens"] == 4


def test_two_models_that_are_not_the_same():
    model = packed.llama()
    other = packed_copy(model)
    other.model.layers[0].mlp.up_proj.values.mul_(-1)
    with pytest.raises(ValueError, match="packed: its logits differ from the dense model's by .* of their norm; rounding explains 0.001"):
        compare(model, other, prompt_length=8, tokens=4)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--tokens", "0"], 2, "tokens: expected at least 1, got 0"),
        (["--format", "onnx"], 2, "format: expected 'bitmask' or 'N:M', got 'onnx'"),
        (["--prompt-length", "60"], 1, "prompt_length, tokens: expected at most 63 together"),
        (["--format", "1:4"], 1, "none of its 15 linear layers gets smaller with format='1:4'"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, code, message):
    assert main(["bench", folder, *arguments]) == code
    assert message in capsys.readouterr().err


def test_bad_counts():
    model = packed.llama()
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        compare(model, model, rounds=0)
