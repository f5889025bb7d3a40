"""The state of a training run on disk: weights, moments and masks, in one entry of the checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from ...training.keep_sparsity import SparsityKeeper
from ...training.masked_adamw import MASTER, SCALES, MaskedAdamW
from ..checkpoint import REMEDY, Checkpoint
from ..store import check_finite_tensors

NAME = "training"
WEIGHT, MASK = "weight/", "mask/"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LEAST_SECONDS = 60.0  # between two writes
MOST_SHARE = 0.05  # of the time is spent on writing


class TrainingState:
    """The progress of training, kept in a checkpoint if there is one.

    Attributes:
        curve: an entry for each optimizer step.
        steps_done: the optimizer steps that are done of the current pruning step.
    """

    def __init__(self, checkpoint: Checkpoint | None, parameters: Mapping[str, nn.Parameter], name: str = NAME) -> None:
        """Begin with no progress.

        Args:
            checkpoint: holds the state; None keeps nothing.
            parameters: what is trained, by name.
            name: the name of the entry.
        """
        self._checkpoint, self._name = checkpoint, name
        self._parameters = dict(parameters)
        self._moments: dict[str, torch.Tensor] = {}
        self._written, self._cost = time.monotonic(), 0.0
        self.curve: list[dict] = []
        self.steps_done = 0

    def load(self) -> tuple[int, dict[str, torch.Tensor] | None]:
        """Give the parameters the weights of the checkpoint, where it holds any.

        Returns:
            The number of pruning steps that are done, and the masks by linear name of the step in which the run was killed. The
            masks are None if it was killed between two steps.

        Raises:
            ValueError: the file is damaged, of another run, or holds another model's weights, NaN or Inf. The model is unchanged then.
        """
        checkpoint = self._checkpoint
        found = checkpoint.get(self._name) if checkpoint else None
        if checkpoint is None or found is None:
            return 0, None
        tensors, note = found
        where = checkpoint.store.place(self._name)
        try:
            check_finite_tensors(where, tensors)
        except ValueError as error:
            raise ValueError(f"{error}; {REMEDY}") from error
        try:
            done, steps_done, curve = note["done"], note["steps_done"], list(note["curve"])
        except (KeyError, TypeError) as error:
            raise checkpoint.damaged(self._name, error) from error
        if problem := self._mismatch(tensors):
            raise checkpoint.damaged(self._name, problem)
        self.steps_done, self.curve = steps_done, curve
        for name, parameter in self._parameters.items():
            parameter.copy_(tensors.pop(WEIGHT + name))
        masks = {name.removeprefix(MASK): tensor for name, tensor in tensors.items() if name.startswith(MASK)}
        self._moments = {name: tensor for name, tensor in tensors.items() if not name.startswith(MASK)}
        return done, masks or None

    def _mismatch(self, tensors: Mapping[str, torch.Tensor]) -> str | None:
        """Return why the tensors are not weights, moments and masks of this model, or None if they are."""
        for name in self._parameters:
            if WEIGHT + name not in tensors:
                return f"{WEIGHT}{name} is missing"
        for key, tensor in tensors.items():
            kind, _, name = key.partition("/")
            if kind == "mask":
                if tensor.dtype != torch.bool:
                    return f"{key} is not a mask"
                continue
            parameter = self._parameters.get(name)
            expected = tensor.shape if kind == SCALES or parameter is None else torch.Size() if kind == "step" else parameter.shape
            if parameter is None or tensor.shape != expected:
                return f"{key} of shape {tuple(tensor.shape)} is not of this model"
            if kind == "weight" and tensor.dtype != parameter.dtype:
                return f"{key} is {tensor.dtype}, expected {parameter.dtype}"
            if kind not in ("weight", MASTER, SCALES, *MOMENTS):
                return f"{key} is none of its tensors"
        return None

    def restore_optimizer(self, optimizer: torch.optim.AdamW) -> None:
        """Give `optimizer` the moments that `load` found.

        Raises:
            ValueError: the file lacks a moment of a parameter that it has others of.
        """
        moments, self._moments = self._moments, {}
        for name, parameter in self._parameters.items():
            found = {moment: moments[f"{moment}/{name}"] for moment in MOMENTS if f"{moment}/{name}" in moments}
            if found and self._checkpoint is not None:
                if missing := [moment for moment in MOMENTS if moment not in found]:
                    raise self._checkpoint.damaged(self._name, f"{missing[0]}/{name} is missing")
                optimizer.state[parameter].update({moment: tensor.to(parameter.device) for moment, tensor in found.items()})

    def restore_masked(self, optimizer: MaskedAdamW) -> None:
        """Give `optimizer` what `load` found.

        Raises:
            ValueError: the file lacks a tensor, or holds one of another shape.
        """
        moments, self._moments = self._moments, {}
        if self._checkpoint is not None and self.steps_done:
            try:
                optimizer.restore(moments, self.steps_done)
            except ValueError as error:
                raise self._checkpoint.damaged(self._name, error) from error

    def save_now_and_then(
        self, step: int, steps_done: int, tensors: Callable[[], Mapping[str, torch.Tensor]], *, now: bool
    ) -> None:
        """Write everything if the last write was long enough ago for the time that writing takes.

        Args:
            step: the current pruning step.
            steps_done: its finished optimizer steps.
            tensors: returns moments and masks, by `exp_avg/NAME`, `mask/NAME` and the like.
            now: write in any case.
        """
        self.steps_done = steps_done
        checkpoint = self._checkpoint
        if checkpoint and (now or time.monotonic() - self._written > max(LEAST_SECONDS, self._cost / MOST_SHARE)):
            self._write(checkpoint, step - 1, tensors())

    def tensors_of(self, optimizer: torch.optim.AdamW, keeper: SparsityKeeper) -> dict[str, torch.Tensor]:
        """Return the moments of an optimizer and the masks of a keeper, as `save_now_and_then` takes them."""
        names: dict[torch.Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        moments = {f"{m}/{names[p]}": state[m] for p, state in optimizer.state.items() for m in MOMENTS}
        return {**moments, **{MASK + name: mask for name, mask in keeper.masks.items()}}

    def finish_step(self, step: int) -> None:
        """Write the weights after pruning step `step`."""
        self.steps_done = 0
        if self._checkpoint:
            self._write(self._checkpoint, step, {})

    def _write(self, checkpoint: Checkpoint, done: int, tensors: Mapping[str, torch.Tensor]) -> None:
        start = time.monotonic()
        weights = {WEIGHT + name: parameter for name, parameter in self._parameters.items()}
        note = {"done": done, "steps_done": self.steps_done, "curve": self.curve}
        checkpoint.put(self._name, {**tensors, **weights}, note)
        self._written = time.monotonic()
        self._cost = self._written - start
