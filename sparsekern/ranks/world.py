"""The processes of one run, as `torchrun` or the caller started them.

Every exchange begins with a short message of each rank to rank 0 and back, which says what the rank is about to do, or that it failed.
So a failure on one rank, wherever it happens, is the same exception on all ranks at their next exchange. Ranks wait for one another
only there: data are sent once all are known to be ready, so that no timeout of a collective depends on how long a rank works or writes.
Ranks that work when another one fails are stopped, see `watch.py`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import Any

import torch

from .failures import as_text, causes, lost, shared, silence
from .watch import Stopped, Watch

PATIENCE = timedelta(hours=24)  # for a rank that works; one that ended is noticed at once
SHORT = 40  # characters of a value that a message shows
_worlds: list[tuple[object, World]] = []  # of the default process group that was used last


class World:
    """The processes that prune together. A single process is a world of size 1, in which everything here does nothing.

    Attributes:
        rank: the number of this process.
        size: the number of processes.
        sent: bytes of tensors that this process has sent.
        formula: the least that the sums and broadcasts so far take, in bytes sent a rank.
    """

    def __init__(self, rank: int = 0, size: int = 1, group: Any = None) -> None:
        """Make a world.

        Args:
            rank: the number of this process.
            size: the number of processes.
            group: a gloo group of all of them; None for a single process.
        """
        self.rank, self.size, self._group = rank, size, group
        self.sent, self.formula = 0, 0.0
        self._exchanges = 0  # that are over
        self._talking = False  # with others, so that an interrupt would leave a message half read
        self._shared: BaseException | None = None  # the last exception that all ranks have raised
        self._watch: Watch | None = None

    @classmethod
    def current(cls) -> World:
        """Return the world of the default process group of `torch.distributed`, or that of a single process where there is none.

        The first call for a group is a collective of all its ranks.
        """
        from torch import distributed

        if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
            return cls()
        default = distributed.group.WORLD
        if not _worlds or _worlds[0][0] is not default:
            group = distributed.new_group(backend="gloo", timeout=PATIENCE)
            world = cls(distributed.get_rank(), distributed.get_world_size(), group)
            world._begin_to_watch()
            _worlds[:] = [(default, world)]
        return _worlds[0][1]

    @property
    def leads(self) -> bool:
        """True on rank 0, which alone writes files."""
        return self.rank == 0

    @contextmanager
    def together(self) -> Iterator[None]:
        """Turn an exception of any rank within into the same exception on all ranks, which names the rank.

        The other ranks raise it at their next exchange, at the latest at the end of the block; those that work are stopped. An
        interrupt or exit of one rank is a `RuntimeError` on the others.
        """
        if self._watch is None:
            yield
            return
        with self._watch.looking():
            try:
                yield
                self.agree("end")
            except BaseException as error:
                if isinstance(error, GeneratorExit) or self.has_raised(error):
                    raise
                if self._talking:
                    self._watch.tell_silence(f"rank {self.rank} was interrupted: {type(error).__name__}")
                    raise
                if isinstance(error, Stopped):
                    self.agree("stopped")
                self._watch.tell_failure()
                self._exchange("", None, as_text(error), error)

    def has_raised(self, error: BaseException) -> bool:
        """Return whether all ranks have raised an exception, or one that it follows from."""
        return any(cause is self._shared for cause in causes(error))

    def check(self) -> None:
        """Stop working if another rank has failed: raise what `together` turns into its exception."""
        if self._watch is not None:
            self._watch.check()

    @contextmanager
    def stoppable(self) -> Iterator[None]:
        """Stop anywhere within if another rank fails. Nothing is changed in place within, and nothing exchanged."""
        if self._watch is None:
            yield
            return
        with self._watch.stoppable():
            yield

    def agree(self, at: str) -> None:
        """Wait until all ranks are here, and raise the same exception on all of them if one has failed instead.

        Args:
            at: names the place; the same on all ranks.
        """
        self.gather(at, None)

    def gather(self, at: str, value: Any) -> list[Any]:
        """Return the values of all ranks by rank, which JSON can hold.

        Args:
            at: names the place; the same on all ranks.
            value: the value of this rank.
        """
        return [value] if self.size == 1 else self._exchange(at, value, None, None)

    def from_first(self, at: str, value: Any = None) -> Any:
        """Return the value of rank 0 on all ranks. JSON can hold it."""
        return self.gather(at, value if self.leads else None)[0]

    def check_alike(self, values: Mapping[str, Any]) -> None:
        """Raise `ValueError` on all ranks if values differ between them. The message names all that do, and a rank."""
        first, *others = self.gather("arguments", dict(values))
        for rank, own in enumerate(others, start=1):
            if names := sorted(name for name in {**first, **own} if own.get(name) != first.get(name)):
                shown = [text for name in names if (text := _shown(name, own.get(name), first.get(name)))]
                values_shown = f" ({', '.join(shown)})" if shown else ""
                raise ValueError(
                    f"{', '.join(names)}: expected the same on all ranks, got another on rank {rank} than on rank 0{values_shown}"
                )

    def swap(self, tensor: torch.Tensor, rank: int, into: torch.Tensor) -> None:
        """Send a tensor to another rank, and receive one from it. Both ranks call this.

        Args:
            tensor: contiguous.
            rank: the other rank.
            into: takes what comes.
        """
        from torch import distributed

        self.sent += tensor.nbytes
        group, send, receive = self._channel(tensor), self._staged(tensor), self._staged(into)
        operations = []
        if tensor.numel():
            operations.append(distributed.P2POp(distributed.isend, send, rank, group))
        if into.numel():
            operations.append(distributed.P2POp(distributed.irecv, receive, rank, group))

        def exchange() -> None:
            for work in distributed.batch_isend_irecv(operations) if operations else ():
                work.wait()

        self._talk(exchange, rank, tensor)
        if receive is not into:
            into.copy_(receive)

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Replace a contiguous tensor by that of the rank `source`. The caller has made sure that all ranks are there."""
        from torch import distributed

        if self.size == 1:
            return
        if self.rank == source:
            self.sent += tensor.nbytes
        staged = self._staged(tensor)
        self._talk(partial(distributed.broadcast, staged, source, self._channel(tensor)), source, tensor)
        if staged is not tensor:
            tensor.copy_(staged)

    def _channel(self, tensor: torch.Tensor) -> Any:
        return None if _has_nccl(tensor) else self._group

    def _staged(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor that its group can send: itself, or a copy in host memory."""
        return tensor if tensor.device.type == "cpu" or _has_nccl(tensor) else tensor.cpu()

    def _begin_to_watch(self) -> None:
        """Let the ranks leave notes for one another in the store of the default process group. All ranks call this."""
        from torch import distributed

        self._watch = Watch(distributed.HashStore(), lambda: self._exchanges)
        name = self.from_first("watch", uuid.uuid4().hex)  # of another world, notes may be left
        store = distributed.distributed_c10d._get_default_store()
        self._watch = Watch(distributed.PrefixStore(f"sparsekern {name}", store), lambda: self._exchanges)

    @contextmanager
    def _conversation(self) -> Iterator[Watch]:
        """Mark what an interrupt would leave half done. A rank that others have given up waiting for is a `ConnectionError`."""
        assert self._watch is not None
        self._talking = True
        try:
            yield self._watch
        except ConnectionAbortedError as error:
            raise self._ended(silence(str(error))) from None
        self._talking = False

    def _talk(self, call: Callable[[], object], rank: int, tensor: torch.Tensor) -> None:
        """Call what sends or receives a tensor, and raise an exception that names `rank` if there is no answer."""
        with self._conversation() as watch:
            try:
                if _has_nccl(tensor):
                    call()  # of this thread's device and stream; it does not wait here
                else:
                    watch.waited(call)
            except RuntimeError as error:
                raise self._lost(rank, error) from error

    def _lost(self, rank: int, error: BaseException) -> OSError:
        """Return the exception for a rank that cannot be reached; there is no exchange from now on."""
        return self._ended(lost(rank, error))

    def _ended(self, error: OSError) -> OSError:
        assert self._watch is not None
        self._watch.tell_silence(str(error.args[1]))
        self._shared, self._talking = error, False
        return error

    def _exchange(self, at: str, value: Any, failure: dict[str, Any] | None, cause: BaseException | None) -> list[Any]:
        """Return the values of all ranks, or raise the exception of those that failed."""
        own = json.dumps({"at": at, "value": value, "failure": failure}).encode()
        with self._conversation() as watch:
            if watch.silent is not None:
                raise self._ended(silence(watch.silent))
            answer = json.loads(self._collect(own, watch) if self.leads else self._report(own, watch))
            if answer["lost"] is not None:
                raise self._ended(ConnectionError(*answer["lost"]))
        self._exchanges += 1
        found = [json.loads(text) for text in answer["found"]]
        failures = [one["failure"] for one in found]
        if any(failures):
            error: BaseException = shared(failures)
            alike = failures[self.rank] is not None and all(other == failures[self.rank] for other in failures)
            if cause is not None and (alike or not isinstance(cause, Exception)):
                error, cause = cause, cause.__cause__
            self._shared = error
            raise error from cause
        if {one["at"] for one in found} != {at}:
            places = ", ".join(f"rank {rank} at {one['at']!r}" for rank, one in enumerate(found))
            self._shared = RuntimeError(f"ranks: expected all at one place, got {places}")
            raise self._shared
        return [one["value"] for one in found]

    def _collect(self, own: bytes, watch: Watch) -> bytes:
        """Receive the messages of all ranks as they come, and answer each with all of them."""
        found, gone = {0: own}, None
        for place, message, error in watch.outcomes([partial(self._receive, rank) for rank in range(1, self.size)]):
            if error is None:
                found[place + 1] = message
                continue
            if not isinstance(error, RuntimeError):
                raise error
            gone = gone or lost(place + 1, error)
            watch.tell_failure()  # for those that work, so that they come here
        texts = [found[rank].decode() for rank in sorted(found)]
        answer = json.dumps({"found": texts, "lost": None if gone is None else list(gone.args)}).encode()
        for rank, _, error in watch.outcomes([partial(self._send, answer, rank) for rank in range(1, self.size)]):
            if error is not None and gone is None:
                raise self._lost(rank + 1, error) from error
        return answer

    def _report(self, own: bytes, watch: Watch) -> bytes:
        def report() -> bytes:
            self._send(own, 0)
            return self._receive(0)

        try:
            return watch.waited(report)
        except RuntimeError as error:
            raise self._lost(0, error) from error

    def _send(self, message: bytes, rank: int) -> None:
        from torch import distributed

        distributed.send(torch.tensor([len(message)]), rank, self._group)
        distributed.send(torch.frombuffer(bytearray(message), dtype=torch.uint8), rank, self._group)

    def _receive(self, rank: int) -> bytes:
        from torch import distributed

        length = torch.zeros(1, dtype=torch.int64)
        distributed.recv(length, rank, self._group)
        message = torch.empty(int(length), dtype=torch.uint8)
        distributed.recv(message, rank, self._group)
        return message.numpy().tobytes()


def _has_nccl(tensor: torch.Tensor) -> bool:
    """Return whether the default group sends tensors of this device itself."""
    from torch import distributed

    return tensor.is_cuda and "nccl" in str(distributed.get_backend_config())


def _shown(name: str, value: Any, first: Any) -> str:
    """Return two values for a message if they are short, so no digests."""
    return f"{name} {value} and {first}" if max(len(str(value)), len(str(first))) <= SHORT else ""
