"""Commands with a limit on their time, whose output goes to a log."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMED_OUT = None


def run(command: Sequence[object], log: Path, seconds: float, environment: Mapping[str, str] | None = None) -> int | None:
    """Run a command in the repository and add its output to `log`. Return its exit code, or None if it was stopped after `seconds`."""
    with open(log, "a") as output:
        print(f"\n$ {' '.join(map(str, command))}", file=output, flush=True)
        process = subprocess.Popen(
            [str(part) for part in command],
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            stop(process)
            print(f"stopped after {seconds:.0f} s", file=output)
            return TIMED_OUT


def stop(process: subprocess.Popen) -> None:
    """End a process that was started with a session of its own, and all that it has started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path, count: int = 3) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()] if log.is_file() else []
    return " | ".join(lines[-count:])
