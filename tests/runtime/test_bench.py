import copy
import json
from xml.etree import ElementTree

import pytest
import torch

import sparsekern
from sparsekern.cli import main
from sparsekern.runtime import bench
from sparsekern.runtime.bench import compare, saved_bytes
from sparsekern.runtime.packing import packed_copy
from tests import encoders
from tests.runtime import packed


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(sparsekern.save(packed.llama(), tmp_path_factory.mktemp("bench") / "dense"))


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

    again = sparsekern.save(sparsekern.load(folder), tmp_path / "packed", "packed")
    assert main(["bench", str(again), *command[2:], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packed"]["disk"] < found["dense"]["disk"] and found["tokens"] == 4
    assert main(["bench", str(again), *command[2:], "--format", "1:16"]) == 1  # packed anew, in that format
    assert "gets smaller with format='1:16'" in capsys.readouterr().err


def test_two_models_that_are_not_the_same():
    model = packed.llama()
    other = packed_copy(model)
    other.model.norm = copy.deepcopy(other.model.norm)  # what is not packed is shared
    other.model.norm.weight.data.mul_(1.01)
    with pytest.raises(ValueError, match="packed: its logits differ from the dense model's by .* of their norm; rounding explains 0.001"):
        compare(model, other, prompt_length=8, tokens=4)
    other.model.layers[1].mlp.up_proj.values[:8] *= 1.01
    with pytest.raises(ValueError, match="packed: the weight of model.layers.1.mlp.up_proj is not that of the dense model"):
        compare(model, other, prompt_length=8, tokens=4)


def test_a_model_that_does_not_generate():
    encoder = encoders.tiny("bert")
    with pytest.raises(ValueError, match="dense: expected a causal language model .* got BertModel"):
        compare(encoder, encoder)


def test_a_decode_too_short_for_the_clock(monkeypatch):
    model = packed.llama()
    monkeypatch.setattr(bench, "_timed", lambda model, prompt, tokens: 0.5)
    with pytest.raises(ValueError, match="tokens: 4 take no longer than what the clock is unsure of"):
        compare(model, packed_copy(model), prompt_length=8, tokens=4)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--tokens", "0"], 2, "tokens: expected at least 1, got 0"),
        (["--plot", "bench.png"], 2, "plot: expected a file name that ends in .svg, got 'bench.png'"),
        (["--plot", "nowhere/bench.svg"], 2, "plot: there is no folder 'nowhere' to put 'bench.svg' in"),
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
