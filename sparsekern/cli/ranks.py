"""The command line under `torchrun`: the process group, the GPU of each rank, and one voice for all ranks."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import torch

from ..ranks import World

SHARED = ("prune", "eval")  # commands that several ranks run together
TERMINATED = 128 + signal.SIGTERM  # what a shell reports for a program that SIGTERM ended


def rank() -> int:
    """Return the number of this process under `torchrun`, 0 without."""
    return int(os.environ.get("RANK", "0")) if ranks() > 1 else 0


def ranks() -> int:
    """Return the number of processes that `torchrun` started, 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined(arguments: argparse.Namespace, stopped: Callable[[], str]) -> Iterator[None]:
    """Join the process group of all ranks within. Only the first rank prints, and each rank has a GPU of its own.

    Args:
        arguments: the command line, whose device becomes that of the rank.
        stopped: returns what is printed if `torchrun` ends this rank because another one ended.

    Raises:
        ValueError: a command that ranks cannot share, or more ranks than GPUs.
    """
    if ranks() == 1:
        yield
        return
    from torch import distributed

    if arguments.name not in SHARED:
        raise ValueError(f"torchrun: expected {' or '.join(SHARED)}, got {arguments.name}; start it as a single process")
    gpu = arguments.device.type == "cuda"
    if gpu:
        local, count = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        here = int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))  # the same for all ranks of the machine, so that all fail alike
        if here > count or arguments.device.index is not None:
            raise ValueError(
                f"torchrun: expected a GPU for each rank of a machine, got {here} ranks, {count} GPUs and --device "
                f"{arguments.device}; start fewer ranks, or give --device cpu"
            )
        arguments.device = torch.device("cuda", local)
        torch.cuda.set_device(arguments.device)
    distributed.init_process_group("cpu:gloo,cuda:nccl" if gpu else "gloo")
    try:
        with _told_to_stop(stopped), _one_voice():
            yield
    finally:
        distributed.destroy_process_group()


class HeardWarnings:
    """Warnings of all ranks, each of which the first rank prints once.

    Attributes:
        texts: the warnings of this rank so far.
    """

    def __init__(self) -> None:
        self.texts: list[str] = []

    def share(self, world: World) -> list[str]:
        """Return what only other ranks have warned of, on the first rank. All ranks call this."""
        found = world.gather("warnings", self.texts)
        return list(dict.fromkeys(text for texts in found[1:] for text in texts if text not in found[0])) if world.leads else []


@contextmanager
def _one_voice() -> Iterator[None]:
    """Drop the output of all ranks but the first. Errors are printed once this has ended."""
    if rank() == 0:
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


@contextmanager
def _told_to_stop(message: Callable[[], str]) -> Iterator[None]:
    """Print a message and end the process at once when SIGTERM comes, even if the main thread waits for another rank."""
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    before = signal.signal(signal.SIGTERM, lambda *_: None)  # the signal only wakes the thread
    wakeup = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM:
                print(message(), file=sys.__stderr__, flush=True)
                os._exit(TERMINATED)
        os.close(reading)

    threading.Thread(target=wait, name="sparsekern-stop", daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        signal.signal(signal.SIGTERM, before)
        os.close(writing)
