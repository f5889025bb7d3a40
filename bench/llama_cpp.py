"""One token at a time: llama.cpp's `llama-bench`, and `generate` of ours measured in the same way."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

from torch import nn

from sparsekern.measure.generate import generate, random_prompt


def program_of(build: Path, name: str = "llama-bench") -> Path:
    """Return the path of a program of llama.cpp; raise `FileNotFoundError` if it was not built."""
    found = next((path for path in sorted(build.rglob(name)) if path.is_file() and os.access(path, os.X_OK)), None)
    if found is None:
        raise FileNotFoundError(f"--llama-cpp: expected a folder with the program {name}, got {build}; build its target {name}")
    return found


def seconds_of_llama_cpp(program: Path, file: Path, tokens: int, threads: int) -> float:
    """Return the seconds of one token as `llama-bench` measures them."""
    command = [program, "-m", file, "-t", threads, "-p", 0, "-n", tokens, "-r", 1, "-o", "json"]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout)
    return 1.0 / found["avg_ts"]


def seconds_of_token(model: nn.Module, tokens: int) -> float:
    """Return the seconds of one token of `generate`, without those of the prompt and the first token."""
    prompt, taken = random_prompt(model, 1), []
    for count in (1, tokens + 1):
        begin = time.perf_counter()
        generate(model, prompt, count)
        taken.append(time.perf_counter() - begin)
    return (taken[1] - taken[0]) / tokens
