"""Worker processes that stand for ranks: started once, they run case after case, since each start loads torch and transformers."""

from __future__ import annotations

import importlib
import queue
import tempfile
import traceback
from pathlib import Path
from typing import Any

import torch
from torch import multiprocessing

WATCHDOG = 60  # seconds after which a case that has not answered counts as hanging; it decides nothing else


PRELOADED = [
    "transformers.models.llama.modeling_llama",
    "transformers.models.mixtral.modeling_mixtral",
    "sparsekern",
    "tests.tiny",
    "tests.ranks.pool",
]


class Pool:
    """`most` processes, of which the first ones are ranks of a group. They live until `close`."""

    def __init__(self, most: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)  # loaded once, for all
        self._folder = tempfile.TemporaryDirectory(prefix="sparsekern-ranks-")
        self._tasks = [context.Queue() for _ in range(most)]
        self._answers = context.Queue()
        self._groups, self._hangs = 0, False
        self._size = 0
        self.processes = [
            context.Process(target=_work, args=(rank, self._tasks[rank], self._answers), daemon=True) for rank in range(most)
        ]
        for process in self.processes:
            process.start()

    def run(self, size: int, case: str, *arguments: Any) -> list[Any]:
        """Return what `case`, a function `module:name` of `(rank, *arguments)`, returns on each of `size` ranks.

        An exception is returned as its class, message and traceback.
        """
        assert not self._hangs, "an earlier case hangs"
        if size != self._size:
            self._size, self._groups = size, self._groups + 1
        store = Path(self._folder.name) / f"store-{self._groups}"
        for tasks in self._tasks[:size]:
            tasks.put((size, str(store), case, arguments))
        found: dict[int, Any] = {}
        try:
            while len(found) < size:
                rank, answer = self._answers.get(timeout=WATCHDOG)
                found[rank] = answer
        except queue.Empty:
            self._hangs = True
            raise AssertionError(f"ranks {sorted(set(range(size)) - set(found))} hang; the others: {found}") from None
        return [found[rank] for rank in range(size)]

    def renew(self) -> None:
        """Make a new group for the next case, since the ranks of this one cannot reach one another any more."""
        self._size = 0

    def close(self) -> None:
        for tasks in self._tasks:
            tasks.put(None)
        for process in self.processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


def _work(rank: int, tasks, answers) -> None:
    from torch import distributed

    torch.set_num_threads(1)
    joined = None
    while (task := tasks.get()) is not None:
        size, store, case, arguments = task
        if joined != store and distributed.is_initialized():
            distributed.destroy_process_group()
        if joined != store and size > 1:
            distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=size)
        joined = store
        module, _, name = case.partition(":")
        try:
            answer = getattr(importlib.import_module(module), name)(rank, *arguments)
        except Exception as error:
            answer = (type(error).__name__, str(error), traceback.format_exc())
        answers.put((rank, answer))
    if distributed.is_initialized():
        distributed.destroy_process_group()


def succeeded(answers: list[Any]) -> list[Any]:
    """The answers of all ranks, none of which is an exception."""
    for answer in answers:
        if isinstance(answer, tuple) and len(answer) == 3 and "Traceback" in str(answer[2]):
            raise AssertionError(answer[2])
    return answers
