"""What a run shows and counts: a bar of layers, notices, and seconds by phase."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._warnings import SparsekernWarning
from ..reports.report import LayerReport


class Clock:
    """Seconds by phase. Phases do not nest.

    On a GPU a phase lasts from when the device reaches its beginning until it reaches its end. Only reading the seconds waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[tuple[str, float | torch.cuda.Event, float | torch.cuda.Event]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase so far."""
        self._wait()
        seconds: dict[str, float] = {}
        for name, start, end in self._phases:
            taken = start.elapsed_time(end) / 1e3 if self._device.type == "cuda" else end - start
            seconds[name] = seconds.get(name, 0.0) + taken
        return seconds

    def now(self) -> float:
        """Return the time at which everything launched so far is done."""
        self._wait()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time within to a phase."""
        start = self._mark()
        try:
            yield
        finally:
            self._phases.append((name, start, self._mark()))

    def _mark(self) -> float | torch.cuda.Event:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


class Progress:
    """A bar over the layers, labelled with the last one's name, error and time; nothing is shown where `enabled` is False."""

    def __init__(self, layers: int, enabled: bool) -> None:
        from tqdm import tqdm

        self._bar = tqdm(total=layers, disable=not enabled, unit="layer", desc="pruning", dynamic_ncols=True)

    def layer_done(self, layer: LayerReport) -> None:
        """Advance by one layer."""
        error = "" if layer.error is None else f" error {layer.error:.2e}"
        self._bar.set_postfix_str(f"{layer.name}{error} {layer.seconds:.2f}s", refresh=False)
        self._bar.update()

    def count_steps(self, total: int) -> None:
        """Count optimizer steps from now on."""
        self._bar.unit = "step"
        self._bar.set_description_str("training", refresh=False)
        self._bar.reset(total)

    def step_done(self, text: str) -> None:
        """Advance by one optimizer step."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def steps_done(self, count: int) -> None:
        """Advance by the steps that a resumed run had taken before."""
        self._bar.update(count)

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._bar.close()


class Notices:
    """Warnings of which a run gives each kind once, whatever the number of layers."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, kind: str, message: str) -> None:
        """Warn of `message` unless a notice of this kind was given."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"{message} (this is said once)", SparsekernWarning, stacklevel=4)

    def few_tokens(self, name: str, tokens: int, features: int) -> None:
        """Warn of fewer tokens than features."""
        if tokens < features:
            self.once(
                "few tokens",
                f"{name}: {tokens} calibration tokens for {features} input features; the Gram matrix is rank-deficient, and the "
                "damping decides the rest",
            )
