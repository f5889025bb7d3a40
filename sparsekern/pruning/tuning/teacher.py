"""What distillation keeps of the dense model: the hidden states in front of its head, or a copy where the head is not the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from ..batches import Batch
from ..blockwise.shelf import Shelf
from .checks import check_copy, check_states
from .reader import Reader, copied_bytes, dense_copy


class Teacher:
    """The outputs of the dense model for the batches of a training.

    Where logits are the products with a plain head, its hidden states are computed once and stored: no pass over the text computes
    them again, and the model needs no copy. They take at most the memory of a copy; what exceeds it goes to a file without a name.

    Attributes:
        head: the weight of its head, `[vocabulary, features]`, if logits are the products with it and nothing else; None otherwise.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Batch],
        used: Iterable[int],
        pruned: Iterable[nn.Parameter],
        folder: Path | None = None,
        training: int = 0,
    ) -> None:
        """Read what training needs of a model that is still dense.

        Args:
            model: the model.
            batches: the calibration data.
            used: the numbers of the batches that are read.
            pruned: the parameters that will change, besides those that no training changes.
            folder: where the file is made, once it is needed; None is the folder for temporary files.
            training: bytes that the state of training will take on the model's device.

        Raises:
            MemoryError: the copy or the hidden states do not fit, with that state.
            OSError: the disk refuses the file.
        """
        self._batches = batches
        self._states: Shelf | None = None
        reader = Reader(model, batches[0])
        limit = copied_bytes(model)
        if reader.head is None:
            check_copy(model, limit, training)
            self._reader = Reader(dense_copy(model, pruned), batches[0])
            self.head = None
            return
        head = reader.head.detach()
        self.head = head.clone() if any(reader.head is parameter for parameter in pruned) else head
        used = sorted(set(used))
        tokens = sum(batches[number].tokens for number in used)
        check_states(head.device, min(limit, tokens * head.shape[1] * head.itemsize), training)
        self._states = Shelf(limit, folder)
        for number in used:
            self._states.put(number, reader.read(batches[number]))

    def read(self, number: int) -> torch.Tensor:
        """Return the hidden states of a batch's real tokens, `[tokens, features]`, or their logits where there is no plain head."""
        if self._states is None:
            return self._reader.read(self._batches[number])
        return self._states.get(number)
