"""Resident memory of a process that only loads one model and generates with it.

Each model is measured in a fresh process. In a shared one, memory that the first model freed could stay resident and count for the
second, and the peak would cover both.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple, cast

from torch import nn

from .._files import locked
from ..runtime.save import check_space

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Linux only. Its peak starts at zero; that of getrusage starts at the peak of the parent process.
STATUS = Path("/proc/self/status")
PREFIX, LOCK = "sparsekern-bench-", ".lock"  # of the folder that holds a copy of the model; the lock is held while it is needed


class Resident(NamedTuple):
    """Bytes of a process in physical memory as the system counts them, pages of libraries and mapped files included.

    Attributes:
        before: bytes before the model was loaded.
        after: bytes after the model generated.
        peak: most bytes over the whole process.
    """

    before: int
    after: int
    peak: int


def why_unknown() -> str:
    """Return why the resident memory of a process cannot be measured here, or an empty text if it can."""
    if not STATUS.exists():
        return f"{sys.platform} has no {STATUS} to read it from"
    return "" if sys.executable else "this Python does not know its own executable"


def resident_of(model: nn.Module, *, prompt_length: int, tokens: int, trust_remote_code: bool = False) -> Resident:
    """Measure a process that loads a temporary copy of `model` and generates, on the model's device.

    During the measurement, SIGTERM and SIGHUP end that process, remove the copy and exit. Copies of killed measurements are removed.

    Args:
        model: a transformers causal language model.
        prompt_length: tokens of the prompt.
        tokens: number of tokens to generate.
        trust_remote_code: let the process run the model's own code.

    Returns:
        The resident bytes of that process.

    Raises:
        OSError: no space is left for temporary files.
        RuntimeError: the process failed. The message ends with its last line of output.
    """
    _remove_leftovers()
    with _signals_as_exit(), tempfile.TemporaryDirectory(prefix=PREFIX) as folder, locked(Path(folder) / LOCK, folder):
        check_space(model, folder)
        of = cast("PreTrainedModel", model)
        of.save_pretrained(folder)
        command = [sys.executable, "-c", _program(), folder, "--device", str(of.device)]
        command += ["--prompt-length", str(prompt_length), "--tokens", str(tokens)]
        command += ["--trust-remote-code"] if trust_remote_code else []
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise RuntimeError(f"resident memory: the process that loaded the model {_how_it_ended(done)}; --no-rss skips it")
    return Resident(**json.loads(done.stdout.splitlines()[-1]))


def _remove_leftovers() -> None:
    """Remove the copies of killed measurements: those whose lock nobody holds any more."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        if (folder / LOCK).exists():
            with suppress(ValueError, OSError):  # in use, or another user's
                with locked(folder / LOCK, str(folder)):
                    shutil.rmtree(folder)


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, so that child processes and temporary files do not outlive this process.

    Signals that the program already handles or ignores, as under `nohup`, are left alone. Outside the main thread, where Python cannot
    set signals, this does nothing.
    """
    previous: dict[int, signal.Handlers] = {}

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


def _how_it_ended(done: subprocess.CompletedProcess[str]) -> str:
    """Describe the exit of a failed process in words."""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    words = f": {lines[-1]}" if lines else ""
    if done.returncode > 0:
        return f"ended with {done.returncode}{words}"
    name = signal.Signals(-done.returncode).name
    hint = ", which the system sends when memory runs out" if name == "SIGKILL" else ""
    return f"was ended by {name}{hint}{words}"


def current_and_peak(status: str) -> tuple[int, int]:
    """Return the current and the peak resident bytes in the text of a /proc/PID/status."""
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    current, peak = (int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    return current, peak


def main() -> None:
    """Load a model, generate with it, and print a `Resident` as JSON."""
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
