"""Progress of a run: a bar of layers, notices, and seconds by phase."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .._warnings import SparsekernWarning
from ..reports import LayerReport, MixtureReport, SubLayerReport

Mark = float | torch.cuda.Event  # a point in time: in seconds, or on a GPU


class Clock:
    """A clock of seconds by phase. Phases do not nest.

    On a GPU the device itself takes the time at the beginning and the end of a phase. Only reading the seconds waits for it.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._phases: list[tuple[str, Mark, Mark]] = []

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds of each phase so far."""
        self._wait()
        seconds: dict[str, float] = {}
        for name, start, end in self._phases:
            seconds[name] = seconds.get(name, 0.0) + _seconds_between(start, end)
        return seconds

    def now(self) -> float:
        """Wait for all work launched so far, and return the time."""
        self._wait()
        return time.perf_counter()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time within to a phase."""
        start = self._mark()
        try:
            yield
        finally:
            self._phases.append((name, start, self._mark()))

    def _mark(self) -> Mark:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def _seconds_between(start: Mark, end: Mark) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(end, torch.cuda.Event):
        return start.elapsed_time(end) / 1e3
    assert isinstance(start, float) and isinstance(end, float)  # both are marks of one clock
    return end - start


class Progress:
    """A bar over the layers, labelled with the name, error and time of the last layer.

    Attributes:
        enabled: True if the bar is shown.
    """

    def __init__(self, layers: int, enabled: bool) -> None:
        """Show a bar.

        Args:
            layers: the number of layers.
            enabled: False shows nothing.
        """
        from tqdm import tqdm

        self.enabled = enabled
        self._bar = tqdm(total=layers, disable=not enabled, unit="layer", desc="pruning", dynamic_ncols=True)

    def layer_done(self, layer: LayerReport | SubLayerReport | MixtureReport) -> None:
        """Advance by one layer."""
        error = "" if layer.error is None else f" error {layer.error:.2e}"
        self._bar.set_postfix_str(f"{layer.name}{error} {layer.seconds:.2f}s", refresh=False)
        self._bar.update()

    def count_steps(self, total: int) -> None:
        """Count `total` optimizer steps from now on."""
        self._bar.unit = "step"
        self._bar.set_description_str("training", refresh=False)
        self._bar.reset(total)

    def step_done(self, text: str) -> None:
        """Advance by one optimizer step."""
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update()

    def steps_done(self, count: int) -> None:
        """Advance by the `count` steps that a resumed run had already taken."""
        self._bar.update(count)

    def close(self) -> None:
        """End the bar, which stays visible."""
        self._bar.close()


class Notices:
    """Warnings that a run gives once for each kind, not for each layer."""

    def __init__(self) -> None:
        self._said: set[str] = set()

    def once(self, kind: str, message: str) -> None:
        """Give the warning `message`, unless a warning of this kind was given."""
        if kind not in self._said:
            self._said.add(kind)
            warnings.warn(f"{message} (shown once)", SparsekernWarning, stacklevel=4)

    def few_tokens(self, name: str, tokens: int, features: int) -> None:
        """Warn if there are fewer tokens than features."""
        if tokens < features:
            self.once(
                "few tokens",
                f"{name}: {tokens} calibration tokens for {features} input features; the Gram matrix is rank-deficient, and the "
                "damping decides the rest",
            )
