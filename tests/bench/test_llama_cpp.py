"""What is read of llama.cpp's programs, with files and programs that stand in for them."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from bench import check_gguf
from bench.check_gguf import fidelity_of, greedy_agreement, own_probabilities, with_first_token
from bench.llama_cpp import greedy_text, program_of, read_probabilities, seconds_of_llama_cpp, tokens_of
from tests import tiny


def stand_in(folder, name: str, script: str):
    """Write a program that stands in for one of llama.cpp."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def write_probabilities(path, tokens: list[list[int]], logits: list[list[list[float]]]) -> None:
    """Write a file as llama-perplexity does: of each row a scale and the least, then steps of 16 bits up from it."""
    length, vocabulary = len(tokens[0]), len(logits[0][0])
    content = b"_logits_" + struct.pack("<3i", length, vocabulary, len(tokens))
    content += struct.pack(f"<{len(tokens) * length}i", *(token for window in tokens for token in window))
    for row in (row for window in logits for row in window):
        most = max(row)
        least = max(min(row), most - 16)
        scale = (most - least) / 65535
        total = math.log(sum(math.exp(value - most) for value in row))
        steps = [round((value - least) / scale) if value > least else 0 for value in row]
        content += struct.pack("<2f", scale, least - most - total) + struct.pack(f"<{vocabulary}H", *steps)
        content += b"\0" * (2 * (vocabulary % 2))
    path.write_bytes(content)


@pytest.mark.parametrize("vocabulary", [6, 7])
def test_probabilities_are_read_as_they_were_written(tmp_path, vocabulary):
    logits = torch.randn(2, 4, vocabulary, generator=torch.Generator().manual_seed(0)).double() * 3
    logits[1, 2, 3] = -40.0  # below the range that the file has
    tokens = [[number % vocabulary for number in range(window, window + 9)] for window in range(2)]
    write_probabilities(tmp_path / "log.bin", tokens, logits.tolist())
    found = read_probabilities(tmp_path / "log.bin")
    assert found.tokens.tolist() == tokens and found.log.dtype == torch.float32
    expected = logits.log_softmax(-1)
    expected = torch.maximum(expected, expected.amax(-1, keepdim=True) - 16)
    torch.testing.assert_close(found.log.double(), expected, rtol=0, atol=16 / 65535)


def test_a_file_that_is_cut_short_is_refused(tmp_path):
    path = tmp_path / "log.bin"
    write_probabilities(path, [[1, 2, 3, 4]], [[[0.0, 1.0]]])
    whole = path.read_bytes()
    for content in (whole[:-1], b"other" + whole[5:], b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"path: expected \d+ bytes that begin with b'_logits_', got \d+ in log.bin"):
            read_probabilities(path)


def test_rows_of_queries_in_another_order_are_told_by_the_divergence(tmp_path):
    model, ids = tiny.llama(initializer_range=0.3), torch.arange(24).view(2, 12) * 5 % 320
    own = own_probabilities(model, ids)
    assert own.shape == (2, 5, 320)
    torch.testing.assert_close(own[1, 0], model(input_ids=ids[1:, :7]).logits[0, -1].log_softmax(-1))
    same = fidelity_of(own, own, ids)
    wanted = -sum(float(own[window, place, ids[window, 7 + place]]) for window in range(2) for place in range(5)) / 10
    assert (same.divergence, same.agreement) == (0.0, 1.0) and math.log(same.perplexity) == pytest.approx(wanted, rel=1e-6)
    with torch.no_grad():
        query = model.model.layers[0].self_attn.q_proj.weight
        query.copy_(query.view(4, 2, 4, -1).transpose(1, 2).reshape(query.shape))
    other = fidelity_of(own, own_probabilities(model, ids), ids)
    assert other.divergence > 0.01 and other.perplexity != other.dense_perplexity == same.perplexity


def test_windows_begin_with_bos_where_the_tokenizer_puts_one():
    words, ids = tiny.tokenizer(), torch.tensor([[5, 6, 7]])
    assert with_first_token(ids, words).tolist() == [[5, 6, 7]]

    class Beginning:
        bos_token_id = 2

        def __call__(self, text):
            return {"input_ids": [2, 9]}

    assert with_first_token(ids, Beginning()).tolist() == [[2, 6, 7]]


def test_greedy_tokens_are_counted_up_to_the_first_other_one(monkeypatch):
    monkeypatch.setattr(check_gguf, "NEW_TOKENS", 5)
    model, words = tiny.llama(), tiny.tokenizer()
    given = words("the quick", return_tensors="pt")["input_ids"]
    own = model.generate(given, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, given.shape[1] :]
    assert greedy_agreement(model, words, "the quick", words.decode(own) + " and more") == 5
    assert greedy_agreement(model, words, "the quick", words.decode(own[:3]) + "\x01") == 3


def test_programs_are_called_and_their_output_is_read(tmp_path):
    stand_in(tmp_path, "llama-tokenize", 'cat "$4" >&2; echo "[1, 22, 3]"')
    assert tokens_of(tmp_path, tmp_path / "a.gguf", "text\r\n") == [1, 22, 3]
    stand_in(tmp_path, "llama-simple", 'echo "<s>$5 and more"')
    assert greedy_text(tmp_path, tmp_path / "a.gguf", "a prompt", 4) == " and more"
    bench = stand_in(tmp_path, "llama-bench", 'echo "[{\\"avg_ts\\": 40.0}]"')
    assert seconds_of_llama_cpp(bench, tmp_path / "a.gguf", 4, 2) == 0.025
    stand_in(tmp_path, "llama-simple", "echo no such model >&2; exit 3")
    with pytest.raises(RuntimeError, match="llama-simple: exit code 3: no such model"):
        greedy_text(tmp_path, tmp_path / "a.gguf", "a prompt", 4)


def test_a_build_without_the_program_is_refused(tmp_path):
    (tmp_path / "llama-bench").mkdir()
    with pytest.raises(
        FileNotFoundError, match="--llama-cpp: expected a folder with the program llama-bench, got .*; build its target"
    ):
        program_of(tmp_path)
