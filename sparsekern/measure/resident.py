"""The resident memory of a process that only loads one model and generates with it.

Each model has a fresh process of its own. In a process that has held both, memory freed of one model may still be resident and count
for the other, and the peak covers both.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from torch import nn

from ..runtime.save import check_space

# On Linux. Unlike the peak of getrusage, its peak does not begin with that of the parent process.
STATUS = Path("/proc/self/status")


class Resident(NamedTuple):
    """Bytes of a process in physical memory, as the system counts them, pages of libraries and mapped files included.

    Attributes:
        before: before the model is loaded.
        after: after it has generated.
        peak: the most over the whole process.
    """

    before: int
    after: int
    peak: int


def why_unknown() -> str:
    """Return why the resident memory of a process cannot be measured here; empty where it can."""
    if not STATUS.exists():
        return f"{sys.platform} has no {STATUS} to read it from"
    return "" if sys.executable else "this Python does not know its own executable"


def resident_of(model: nn.Module, *, prompt_length: int, tokens: int, trust_remote_code: bool = False) -> Resident:
    """Measure a process that loads a temporary copy of `model` and generates, on the model's device.

    SIGTERM and SIGHUP meanwhile end that process, remove the copy and exit.

    Args:
        model: a transformers causal language model.
        prompt_length: tokens of the prompt.
        tokens: to generate after it.
        trust_remote_code: let the process run code that the model has brought along.

    Returns:
        The bytes of that process.

    Raises:
        OSError: no space left for temporary files.
        RuntimeError: the process failed; the message ends with its last line.
    """
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        check_space(model, folder)
        model.save_pretrained(folder)
        command = [sys.executable, "-c", _program(), folder, "--device", str(model.device)]
        command += ["--prompt-length", str(prompt_length), "--tokens", str(tokens)]
        command += ["--trust-remote-code"] if trust_remote_code else []
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"resident memory: the process that loaded the model {_how_it_ended(done)}; --no-rss does without")
    return Resident(**json.loads(done.stdout.splitlines()[-1]))


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, so that child processes and temporary files do not outlive this process.

    A signal that the program already handles or ignores, as under `nohup`, is left alone. Outside the main thread, where Python
    cannot set signals, nothing is done.
    """
    previous: dict[int, object] = {}

    def end(number: int, frame: FrameType | None) -> None:
        for taken in previous:
            signal.signal(taken, signal.SIG_IGN)  # a second signal must not interrupt the clean-up
        raise SystemExit(128 + number)

    if threading.current_thread() is threading.main_thread():
        known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
        previous = {number: signal.SIG_DFL for number in known if signal.getsignal(number) == signal.SIG_DFL}
    try:
        for number in previous:
            signal.signal(number, end)
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _program() -> str:
    """Return a program that runs `main` with this process's modules, not with files of the same names in the current folder."""
    return f"import sys; sys.path[:] = {[str(path) for path in sys.path]}; from sparsekern.measure.resident import main; main()"


def _how_it_ended(done: subprocess.CompletedProcess) -> str:
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = f": {lines[-1]}" if lines else ""
    if done.returncode > 0:
        return f"ended with {done.returncode}{words}"
    name = signal.Signals(-done.returncode).name
    hint = ", as the system does where memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}{words}"


def current_and_peak(status: str) -> tuple[int, int]:
    """Return the resident bytes of a process, now and at most, from the text of its /proc/PID/status."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    current, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return current, peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", required=True)
    parser.add_argument("--prompt-length", type=int, required=True)
    parser.add_argument("--tokens", type=int, required=True)
    parser.add_argument("--trust-remote-code", action="store_true")
    arguments = parser.parse_args()

    import torch
    from transformers.utils import logging

    from ..models.load import load
    from .generate import generate, random_prompt

    logging.disable_progress_bar()
    before, _ = current_and_peak(STATUS.read_text())
    model = load(arguments.model, device=arguments.device, trust_remote_code=arguments.trust_remote_code)
    with torch.no_grad():
        generate(model, random_prompt(model, arguments.prompt_length), arguments.tokens)
    after, peak = current_and_peak(STATUS.read_text())
    print(json.dumps(Resident(before, after, peak)._asdict()))
