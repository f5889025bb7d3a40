"""Programs of llama.cpp in a build of the user's: speed, quantised files, tokens, greedy text, and the probabilities it computes.

Nothing of it is built or downloaded here. `generate` of ours is timed in the same way as `llama-bench` times its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparsekern.measure.generate import generate, random_prompt

MAGIC = b"_logits_"  # what llama-perplexity begins its file of probabilities with
FULL_PRECISION = ("-fa", "off", "-ctk", "f32", "-ctv", "f32")  # of attention and its cache, so that only products differ


def program_of(build: Path, name: str = "llama-bench") -> Path:
    """Return the path of a program of llama.cpp; raise `FileNotFoundError` if it was not built."""
    found = next((path for path in sorted(build.rglob(name)) if path.is_file() and os.access(path, os.X_OK)), None)
    if found is None:
        raise FileNotFoundError(f"--llama-cpp: expected a folder with the program {name}, got {build}; build its target {name}")
    return found


def seconds_of_llama_cpp(program: Path, file: Path, tokens: int, threads: int) -> float:
    """Return the seconds of one token as `llama-bench` measures them."""
    (found,) = json.loads(_output_of(program, "-m", file, "-t", threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "json"))
    return 1.0 / found["avg_ts"]


def seconds_of_token(model: nn.Module, tokens: int) -> float:
    """Return the seconds of one token of `generate`, without those of the prompt and the first token."""
    prompt, taken = random_prompt(model, 1), []
    for count in (1, tokens + 1):
        begin = time.perf_counter()
        generate(model, prompt, count)
        taken.append(time.perf_counter() - begin)
    return (taken[1] - taken[0]) / tokens


def quantise(build: Path, source: Path, file: Path, type: str, threads: int = 2) -> Path:
    """Write a GGUF file with matrices of another type by `llama-quantize`, and return its path.

    Matrices that have the type already are copied unchanged. Embedding and head get the type that the program chooses for them, Q6_K for
    most types.
    """
    _output_of(program_of(build, "llama-quantize"), source, file, type, threads)
    return file


def tokens_of(build: Path, file: Path, text: str) -> list[int]:
    """Return the tokens of a text, with those that are put around it, as `llama-tokenize` prints them."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8", newline="") as given:
        given.write(text)
        given.flush()
        found = json.loads(_output_of(program_of(build, "llama-tokenize"), "-m", file, "-f", given.name, "--ids", "--log-disable"))
    return [int(token) for token in found]


def greedy_text(build: Path, file: Path, prompt: str, tokens: int) -> str:
    """Return the text that follows a prompt when each token is the most likely one, as `llama-simple` prints it."""
    printed = _output_of(program_of(build, "llama-simple"), "-m", file, "-n", tokens, prompt)
    return printed.partition(prompt)[2].removesuffix("\n")


@dataclass(frozen=True)
class Probabilities:
    """What llama.cpp computes for the windows of a text.

    Attributes:
        tokens: `[windows, length]` int64, as its tokenizer splits the text. The first of a window is not yet BOS where one is put there.
        log: `[windows, length - 1 - length // 2, vocabulary]` float32, logarithms of the probabilities of what follows the tokens from
            `length // 2` on. They have 16 bits, and none is below the largest minus 16.
    """

    tokens: torch.Tensor
    log: torch.Tensor


def probabilities_of(build: Path, file: Path, text: str, length: int, windows: int, threads: int = 1) -> Probabilities:
    """Return the probabilities of the first windows of a text, as `llama-perplexity` computes them."""
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        given, saved = Path(folder) / "text.txt", Path(folder) / "log.bin"
        given.write_text(text, encoding="utf-8", newline="")
        sizes = ("-c", length, "-b", length, "--chunks", windows, "-t", threads)
        program = program_of(build, "llama-perplexity")
        _output_of(program, "-m", file, "-f", given, *sizes, *FULL_PRECISION, "--save-all-logits", saved)
        return read_probabilities(saved)


def read_probabilities(path: Path) -> Probabilities:
    """Return what `llama-perplexity --save-all-logits` has written.

    Raises:
        ValueError: the file is another one, or is cut short.
    """
    content = path.read_bytes()
    length, vocabulary, windows = (int.from_bytes(content[at : at + 4], "little") for at in (8, 12, 16))
    rows, row_bytes = windows * (length - 1 - length // 2), 2 * (2 * -(-vocabulary // 2) + 4)
    begin = 20 + 4 * windows * length
    if not content.startswith(MAGIC) or len(content) != begin + rows * row_bytes:
        raise ValueError(
            f"path: expected {begin + rows * row_bytes} bytes that begin with {MAGIC!r}, got {len(content)} in {path.name}"
        )
    stored = bytearray(content)
    tokens = torch.frombuffer(stored, dtype=torch.int32, offset=20, count=windows * length)
    table = torch.frombuffer(stored, dtype=torch.uint8, offset=begin).view(rows, row_bytes)
    steps = table[:, 8:].contiguous().view(torch.uint16)[:, :vocabulary].float()
    scale, least = table[:, :8].contiguous().view(torch.float32).unbind(1)
    log = steps * scale[:, None] + least[:, None]
    return Probabilities(tokens.view(windows, length).long(), log.view(windows, -1, vocabulary))


def _output_of(*command: object) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        raise RuntimeError(f"{Path(str(command[0])).name}: exit code {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout
