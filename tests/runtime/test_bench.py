import copy
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import sparsekern
from sparsekern._files import locked
from sparsekern.cli import main
from sparsekern.measure import compare as comparing
from sparsekern.measure import resident
from sparsekern.measure.compare import compare, saved_bytes
from sparsekern.runtime.packing import packed_copy
from tests import encoders
from tests.cli.conftest import exit_code
from tests.runtime import packed

REAL_TIMED = comparing._timed


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    """A quarter of a second for the prompt, an eighth for each token: a real clock says nothing of models this small."""
    monkeypatch.setattr(comparing, "_timed", lambda model, prompt, tokens: 0.25 + 0.125 * tokens)


def test_what_is_timed_is_the_generation_of_so_many_tokens(monkeypatch):
    asked = []
    monkeypatch.setattr(comparing, "generate", lambda model, prompt, tokens: asked.append((model, tokens)))
    assert REAL_TIMED("model", torch.zeros(1, 4), 7) >= 0
    assert asked == [("model", 7)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    return str(sparsekern.save(packed.llama(), tmp_path_factory.mktemp("bench") / "dense"))


TOLD = """test -f "$3/model.safetensors" && echo loading && echo '{"before": 10000000, "after": 20000000, "peak": 1030000000}'"""


def stand_in(tmp_path, monkeypatch, script: str) -> None:
    """A process that does something else instead of loading the model, whose folder is its third argument."""
    (tmp_path / "python").write_text(f"#!/bin/sh\n{script}\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(resident.sys, "executable", str(tmp_path / "python"))


def test_it_measures_both(tmp_path):
    model = packed.llama(torch.bfloat16, tie_word_embeddings=True)
    other = packed_copy(model)
    found = compare(model, other, prompt_length=8, tokens=4, rounds=1)
    sizes = [
        (sparsekern.save(model, tmp_path / format, format) / "model.safetensors").stat().st_size for format in ("dense", "packed")
    ]
    for size, of in zip(sizes, (found.dense, found.packed), strict=True):
        assert 0 < size - of.disk < 16_000 and of.memory >= of.disk
        assert of.prefill == 8 / 0.375 and of.decode == 1 / 0.125  # the prompt makes the first token
    assert saved_bytes(other) == found.packed.disk < found.dense.disk
    assert found.logits < 0.02 and 0 <= found.same_tokens <= found.tokens == 4


def test_equal_tokens_are_counted_up_to_the_first_that_differs(monkeypatch):
    told = iter([torch.tensor([5, 6, 7, 8, 9]), torch.tensor([5, 6, 1, 8, 9])])
    monkeypatch.setattr(comparing, "generate", lambda model, prompt, tokens: next(told))
    model = packed.llama()
    assert compare(model, packed_copy(model), prompt_length=8, tokens=4, rounds=1).same_tokens == 2


def test_the_difference_of_logits_is_relative_to_their_size(monkeypatch):
    told = iter([torch.full((1, 9, 4), 1000.0), torch.full((1, 9, 4), 1001.0)])
    monkeypatch.setattr(comparing, "_logits", lambda model, prompt: next(told))
    model = packed.llama(torch.bfloat16)
    assert compare(model, packed_copy(model), prompt_length=8, tokens=4, rounds=1).logits == pytest.approx(1e-3)


def test_the_command(folder, tmp_path, capsys, monkeypatch):
    stand_in(tmp_path, monkeypatch, TOLD)
    command = ["bench", folder, "--prompt-length", "8", "--tokens", "4", "--rounds", "1"]
    assert main([*command, "--plot", str(tmp_path / "bench.svg")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["dense", "packed", "packed", "/", "dense"]
    names = ["weights on disk", "weights in memory", "resident memory", "peak resident memory", "prefill", "decode"]
    assert [line.split(",")[0] for line in table[1:7]] == names
    assert float(table[1].split()[-1]) < 1 and "the first 4 tokens generated are the same" in table[7]
    assert [line.split()[-3:] for line in table[3:5]] == [["20.0", "20.0", "1.00"], ["1,030.0", "1,030.0", "1.00"]]
    assert table[8] == "resident memory is that of one process for each model, 10.0 and 10.0 MB of it before the model was loaded"
    assert len(list(ElementTree.parse(tmp_path / "bench.svg").iter("{http://www.w3.org/2000/svg}rect"))) == 7

    again = sparsekern.save(sparsekern.load(folder, device="cpu"), tmp_path / "packed", "packed")
    assert main(["bench", str(again), *command[2:], "--json", "--no-rss"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["packed"]["disk"] < found["dense"]["disk"] and found["tokens"] == 4
    assert found["packed"]["resident"] is None and found["resident_unknown"] == "not asked for"
    assert main(["bench", str(again), *command[2:], "--format", "1:16"]) == 1  # packed anew, in that format
    assert "gets smaller with format='1:16'" in capsys.readouterr().err


def test_resident_memory_is_told_by_a_process_that_loads_the_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [str(Path(place).absolute()) for place in sys.path])
    monkeypatch.chdir(tmp_path)
    Path("random.py").write_text("raise ImportError('from the current folder')")  # which is no place to import from
    found = resident.resident_of(packed_copy(packed.llama()), prompt_length=8, tokens=4)
    assert 2**26 < found.before < found.after <= found.peak  # a Python with torch in it has more than 64 MB


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (
            "echo >&2; echo 'ValueError: the folder is empty' >&2; exit 3",
            "ended with 3: ValueError: the folder is empty; --no-rss skips it",
        ),
        ("echo '{}'; exit 1", "ended with 1; --no-rss skips it"),
        ("kill -KILL $$", "was ended by SIGKILL, which the system sends when memory runs out; --no-rss skips it"),
        ("echo lost >&2; kill -TERM $$", "was ended by SIGTERM: lost; --no-rss skips it"),
    ],
)
def test_a_process_that_dies_says_why(tmp_path, monkeypatch, script, message):
    stand_in(tmp_path, monkeypatch, script)
    with pytest.raises(RuntimeError, match=re.escape(f"resident memory: the process that loaded the model {message}")):
        resident.resident_of(packed.llama(), prompt_length=8, tokens=4)


DRIVER = """
import sys
from pathlib import Path
from torch import nn
from sparsekern.measure import resident

class Model(nn.Linear):
    device = "cpu"
    def save_pretrained(self, folder):
        (Path(folder) / "weights").touch()

resident.sys.executable = sys.argv[1]
resident.resident_of(Model(2, 2), prompt_length=8, tokens=4)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_leaves_no_process_and_no_copy_of_the_model(tmp_path, name):
    (tmp_path / "python").write_text(
        f"#!/bin/sh\necho $$ > {tmp_path}/started && mv {tmp_path}/started {tmp_path}/pid\nexec sleep 600\n"
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "temporary").mkdir()
    environment = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    number = getattr(signal, name)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, str(tmp_path / "python")],
        env=environment,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup has it ignored, which a program must leave so
    )
    try:
        while not (tmp_path / "pid").exists():
            assert process.poll() is None, "it has ended by itself"
            time.sleep(0.02)
        assert list((tmp_path / "temporary").iterdir())
        process.send_signal(number)
        assert process.wait() == 128 + number
    finally:
        process.kill()
    assert not list((tmp_path / "temporary").iterdir())
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_copies_of_killed_measurements_are_removed_by_the_next(tmp_path, monkeypatch):
    """Only those whose lock nobody holds."""
    monkeypatch.setattr(resident.tempfile, "tempdir", str(tmp_path))
    for name in ("killed", "running", "unlocked"):
        (tmp_path / f"{resident.PREFIX}{name}").mkdir()
    (tmp_path / "another").mkdir()
    for name in ("killed", "running"):
        (tmp_path / f"{resident.PREFIX}{name}" / resident.LOCK).touch()
    with locked(tmp_path / f"{resident.PREFIX}running" / resident.LOCK, "it"):
        resident._remove_leftovers()
        left = {path.name.removeprefix(resident.PREFIX) for path in tmp_path.iterdir()}
    assert left == {"running", "unlocked", "another"}


def test_signals_that_are_ignored_or_handled_stay_so():
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGHUP, signal.SIGTERM)}
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with resident._signals_as_exit():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert callable(signal.getsignal(signal.SIGTERM))
            seen = []
            thread = threading.Thread(target=lambda: seen.append(resident._signals_as_exit().__enter__()))
            thread.start()
            thread.join()
            assert seen == [None]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_platform_that_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(resident, "STATUS", tmp_path / "status")
    model = packed.llama()
    found = compare(model, packed_copy(model), prompt_length=8, tokens=4, rounds=1, resident=True)
    assert found.packed.resident is found.packed.peak is None and "resident" not in found.ratios
    assert str(found).endswith(f"\nresident memory is unknown: {sys.platform} has no {tmp_path / 'status'} to read it from")


def test_a_python_that_does_not_know_its_executable(monkeypatch):
    monkeypatch.setattr(resident.sys, "executable", "")
    assert resident.why_unknown() == "this Python does not know its own executable"


def test_what_linux_says_of_a_process():
    status = "Name:\tpython\nVmPeak:\t  900 kB\nVmHWM:\t    30 kB\nVmRSS:\t   20 kB\nno colon\n"
    assert resident.current_and_peak(status) == (20 * 1024, 30 * 1024)


def test_two_models_that_are_not_the_same():
    model = packed.llama()
    other = packed_copy(model)
    other.model.norm = copy.deepcopy(other.model.norm)  # what is not packed is shared
    other.model.norm.weight.data.mul_(1.01)
    with pytest.raises(
        ValueError, match="packed: its logits differ from the dense model's by .* of their norm; rounding explains 0.001"
    ):
        compare(model, other, prompt_length=8, tokens=4)
    other.model.layers[1].mlp.up_proj.values[:8] *= 1.01
    with pytest.raises(ValueError, match="packed: the weight of model.layers.1.mlp.up_proj differs from that of the dense model"):
        compare(model, other, prompt_length=8, tokens=4)


def test_a_model_that_does_not_generate():
    encoder = encoders.tiny("bert")
    with pytest.raises(ValueError, match="dense: expected a causal language model .* got BertModel"):
        compare(encoder, encoder)


def test_a_decode_too_short_for_the_clock(monkeypatch):
    model = packed.llama()
    monkeypatch.setattr(comparing, "_timed", lambda model, prompt, tokens: 0.5)
    with pytest.raises(
        ValueError,
        match="tokens: expected more than 4: decoding them is below the resolution of the timing; increase tokens or rounds",
    ):
        compare(model, packed_copy(model), prompt_length=8, tokens=4)


@pytest.mark.parametrize(
    "arguments, code, message",
    [
        (["--tokens", "0"], 2, "--tokens: expected at least 1, got 0"),
        (["--plot", "bench.png"], 2, "--plot: expected a file name that ends in .svg, got 'bench.png'"),
        (["--plot", "nowhere/bench.svg"], 2, "--plot: expected an existing folder for 'bench.svg', got 'nowhere'"),
        (["--format", "onnx"], 2, "--format: expected 'packed', 'bitmask', 'N:M' or 'N:M-q4', got 'onnx'"),
        (["--format", "auto"], 2, "--format: expected 'packed', 'bitmask', 'N:M' or 'N:M-q4', got 'auto'"),
        (["--prompt-length", "60"], 1, "prompt_length, tokens: expected at most 63 together"),
        (["--format", "1:4"], 1, "none of its 15 linear layers gets smaller with format='1:4'"),
    ],
)
def test_wrong_arguments(folder, capsys, arguments, code, message):
    assert exit_code(main, ["bench", folder, *arguments]) == code
    assert message in capsys.readouterr().err


def test_bad_counts():
    model = packed.llama()
    with pytest.raises(ValueError, match="rounds: expected at least 1, got 0"):
        compare(model, model, rounds=0)
