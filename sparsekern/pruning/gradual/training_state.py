"""The state of a training run on disk: weights, moments and masks, in one file that is replaced as a whole."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from torch import nn

from ..._files import replace_atomically
from ...training.keep_sparsity import SparsityKeeper

FILE = "training.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LEAST_SECONDS = 60.0  # between two files
MOST_SHARE = 0.05  # of the time may go to writing them


class TrainingState:
    """How far training has come; kept in `folder`, or nowhere where that is None.

    `curve` has one entry for each optimizer step, `steps_done` counts those of the pruning step at hand.
    """

    def __init__(self, folder: Path | None, model: nn.Module) -> None:
        self._path = folder / FILE if folder else None
        self._parameters = dict(model.named_parameters())
        self._moments: dict[str, torch.Tensor] = {}
        self._written, self._cost = time.monotonic(), 0.0
        self.curve: list[dict] = []
        self.steps_done = 0

    def load(self) -> tuple[int, dict[str, torch.Tensor] | None]:
        """Give the model the weights of the file, where there is one.

        Returns:
            The number of pruning steps that are done, and the masks of the one in which the run was killed, by linear name (None
            where it was not in the middle of one).

        Raises:
            ValueError: the file is damaged or holds another model's weights.
        """
        from safetensors import SafetensorError, safe_open

        if self._path is None or not self._path.exists():
            return 0, None
        try:
            with safe_open(self._path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                state = json.loads(file.metadata()["state"])
            done, self.steps_done, self.curve = state["done"], state["steps_done"], state["curve"]
            weights = {name: tensors.pop(f"weight/{name}") for name in self._parameters}
            for name, parameter in self._parameters.items():
                parameter.copy_(weights[name])
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ValueError(f"out: {self._path} is damaged ({error}); remove {self._path.parent} to start anew") from error
        masks = {name.removeprefix("mask/"): tensor for name, tensor in tensors.items() if name.startswith("mask/")}
        self._moments = {name: tensor for name, tensor in tensors.items() if not name.startswith("mask/")}
        return done, masks or None

    def restore_optimizer(self, optimizer: torch.optim.AdamW) -> None:
        """Give `optimizer` the moments that `load` has found."""
        if not self._moments:
            return
        for name, parameter in self._parameters.items():
            if f"{MOMENTS[0]}/{name}" in self._moments:
                state = optimizer.state[parameter]
                for moment in MOMENTS:
                    state[moment] = self._moments.pop(f"{moment}/{name}").to(parameter.device)

    def save_now_and_then(
        self, step: int, steps_done: int, optimizer: torch.optim.AdamW, keeper: SparsityKeeper, *, now: bool
    ) -> None:
        """Write everything if the last file is old enough for the time that writing takes, or `now`."""
        self.steps_done = steps_done
        if self._path and (now or time.monotonic() - self._written > max(LEAST_SECONDS, self._cost / MOST_SHARE)):
            names = {parameter: name for name, parameter in self._parameters.items()}
            moments = {f"{m}/{names[p]}": state[m] for p, state in optimizer.state.items() for m in MOMENTS}
            masks = {f"mask/{name}": mask for name, mask in keeper.masks.items()}
            self._write(step - 1, {**moments, **masks})

    def finish_step(self, step: int) -> None:
        """Write the weights after pruning step `step`."""
        self.steps_done = 0
        if self._path:
            self._write(step, {})

    def _write(self, done: int, tensors: dict[str, torch.Tensor]) -> None:
        from safetensors.torch import save_file

        start = time.monotonic()
        tensors |= {f"weight/{name}": parameter.detach() for name, parameter in self._parameters.items()}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        state = {"done": done, "steps_done": self.steps_done, "curve": self.curve}
        replace_atomically(self._path, lambda temporary: save_file(tensors, temporary, {"state": json.dumps(state)}))
        self._written = time.monotonic()
        self._cost = self._written - start
