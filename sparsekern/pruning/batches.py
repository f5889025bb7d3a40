"""Calibration tokens of any accepted form, as a list of batches to call a model with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from ..data import CalibrationText
from ..models.limits import check_token_ids

# On a CPU: enough rows for the matrix products to run at full speed. With more, the activations no longer fit the caches.
TOKENS_PER_BATCH = 2048
# On a GPU a batch should take longer than the launch of the next batch's kernels, and fit beside the model. The activations of one
# block take 0.1 MB a token in a model of 7B weights and 0.3 MB in one of 70B.
MOST_TOKENS_PER_BATCH = 32768
DEVICE_BYTES_PER_TOKEN = 4 << 20
Calibration = torch.Tensor | Iterable[torch.Tensor | Mapping[str, torch.Tensor]] | str | os.PathLike | CalibrationText


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        inputs: the keyword arguments, with `input_ids` `[samples, length]`.
        first_sample: the number of the first row among all calibration samples.
        token_mask: `[samples, length]` bool, True at real tokens; None where there is no padding.
    """

    inputs: dict[str, torch.Tensor]
    first_sample: int
    token_mask: torch.Tensor | None

    @property
    def shape(self) -> tuple[int, int]:
        """The number of samples and their length in tokens."""
        samples, length = self.inputs["input_ids"].shape
        return samples, length

    @cached_property
    def tokens(self) -> int:
        """The number of real tokens. It is counted once, since reading a count waits for the device."""
        return self.inputs["input_ids"].numel() if self.token_mask is None else int(self.token_mask.sum())

    def beginning(self, tokens: int) -> dict[str, torch.Tensor]:
        """Return the inputs of the first tokens of the first sample."""
        return {
            name: value[:1, :tokens] if isinstance(value, torch.Tensor) and value.shape[:2] == self.shape else value
            for name, value in self.inputs.items()
        }

    def used(self, rows: int) -> int:
        """Return how many of the `rows` of a flattened activation belong to real tokens."""
        return self.tokens * (rows // self.inputs["input_ids"].numel())

    def flatten(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return an activation of this batch as `(rows [n, features], row_mask [n] or None)`.

        Raises:
            ValueError: there is padding, and the shape of `x` does not tell which rows are padding.
        """
        rows = x.reshape(-1, x.shape[-1])
        if self.token_mask is None:
            return rows, None
        leading, (samples, length) = x.shape[:-1], self.shape
        if leading[:2] == (samples, length):
            mask, trailing = self.token_mask, leading[2:]
        elif leading[:1] == (samples * length,):
            mask, trailing = self.token_mask.flatten(), leading[1:]
        else:
            raise ValueError(
                f"an input of shape {tuple(x.shape)} in a padded batch of {samples} x {length} tokens does not tell which "
                "rows are padding; calibrate with samples of one length"
            )
        return rows, mask[(...,) + (None,) * len(trailing)].expand(leading).flatten()

    def sample_of_row(self, row: int, rows: int) -> int | None:
        """Return the calibration sample of row `row` of `rows`, or None where the rows do not follow the samples."""
        return None if rows % self.shape[0] else self.first_sample + row // (rows // self.shape[0])


def as_batches(
    calibration: Calibration,
    batch_size: int | None,
    device: torch.device,
    vocabulary: int | None,
    positions: int | None = None,
) -> list[Batch]:
    """Check calibration data, and return it as batches on `device`.

    Args:
        calibration: LongTensor `[samples, length]`, or an iterable of batches: LongTensors, or mappings with `input_ids` and
            `attention_mask` (0 at padding).
        batch_size: samples in a batch if `calibration` is one tensor; None chooses, see `tokens_per_batch`.
        device: the device of the batches.
        vocabulary: the ids must be below it; None checks nothing.
        positions: the longest sample allowed; None checks nothing.

    Raises:
        TypeError: calibration data of another type, or ids of another dtype.
        ValueError: a bad `batch_size`, wrong shapes, no tokens, ids outside the vocabulary, or samples that are too long.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    elif isinstance(calibration, torch.Tensor):
        _check_ids(calibration, vocabulary)
        size = batch_size or max(1, tokens_per_batch(_memory_of(device)) // max(calibration.shape[1], 1))
        calibration = calibration.split(size)
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected token ids or an iterable of batches, got {calibration!r}")
    batches, samples = [], 0
    for given in calibration:
        batch = _as_batch(given, samples, device, vocabulary)
        samples += batch.shape[0]
        if positions is not None and batch.shape[1] > positions:
            raise ValueError(
                f"calibration: expected samples of at most {positions} tokens, the positions of this model, got {batch.shape[1]}"
            )
        batches.append(batch)
    if not sum(batch.tokens for batch in batches):
        raise ValueError("calibration: expected at least one token, got none")
    return batches


def tokens_per_batch(memory: int | None) -> int:
    """Return how many tokens to run at once on a device with `memory` bytes in all, None for a CPU. It is a power of two.

    Free memory is ignored, so that a resumed run on the same device makes the same batches.
    """
    if memory is None:
        return TOKENS_PER_BATCH
    fitting = max(memory // DEVICE_BYTES_PER_TOKEN, TOKENS_PER_BATCH)
    return min(1 << fitting.bit_length() - 1, MOST_TOKENS_PER_BATCH)


def _memory_of(device: torch.device) -> int | None:
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def fingerprint(batches: list[Batch]) -> str:
    """Return a digest of the tokens, their padding and their division into batches."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch.inputs):
            value = batch.inputs[name]
            if not isinstance(value, torch.Tensor):  # such as `output_attentions=False`
                digest.update(f"{name} {value!r};".encode())
                continue
            digest.update(f"{name} {value.dtype} {tuple(value.shape)};".encode())
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _as_batch(given: object, first_sample: int, device: torch.device, vocabulary: int | None) -> Batch:
    inputs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {"input_ids": given}
    if not isinstance(inputs.get("input_ids"), torch.Tensor):
        raise TypeError(f"calibration: expected token tensors or mappings with 'input_ids', got {type(given).__name__}")
    ids = inputs["input_ids"]
    _check_ids(ids, vocabulary)
    mask = inputs.get("attention_mask")
    if mask is not None and not isinstance(mask, torch.Tensor):
        raise TypeError(f"calibration: expected attention_mask as a tensor of shape {tuple(ids.shape)}, got {type(mask).__name__}")
    if mask is not None and mask.shape != ids.shape:
        raise ValueError(f"calibration: expected attention_mask of shape {tuple(ids.shape)}, got {tuple(mask.shape)}")
    inputs.pop("labels", None)
    inputs = {name: _plain(value, device) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    mask = inputs.get("attention_mask")
    return Batch(inputs, first_sample, None if mask is None or bool(mask.all()) else mask.bool())


def _plain(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a tensor on `device`. One made in inference mode is copied, since autograd refuses it."""
    value = value.to(device)
    return value.clone() if value.is_inference() else value


def _check_ids(ids: torch.Tensor, vocabulary: int | None) -> None:
    if ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"calibration: expected token ids of dtype int64, got {str(ids.dtype).removeprefix('torch.')}")
    if ids.dim() != 2:
        raise ValueError(f"calibration: expected token ids of shape [samples, length], got {tuple(ids.shape)}")
    if not ids.numel():
        raise ValueError(f"calibration: expected at least one token, got shape {tuple(ids.shape)}")
    check_token_ids("calibration", ids, vocabulary)
