"""Calibration tokens of any accepted form, as a list of batches to call a model with."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch

from ..data import CalibrationText
from ..models.limits import check_token_ids
from .values import replaced

# On a CPU: enough rows for the matrix products to run at full speed. With more, the activations no longer fit the caches.
TOKENS_PER_BATCH = 2048
# On a GPU a batch should take longer than the launch of the next batch's kernels, and fit beside the model. The activations of one
# block take 0.1 MB a token in a model of 7B weights and 0.3 MB in one of 70B.
MOST_TOKENS_PER_BATCH = 32768
DEVICE_BYTES_PER_TOKEN = 4 << 20
SAMPLES_PER_BATCH = 8  # of images or sounds, whose rows are not known beforehand
IGNORED = -100  # a label that is not predicted
SEQUENCES = ("input_ids", "inputs_embeds")  # inputs `[samples, length, ...]`, whose padding `attention_mask` tells
Calibration = torch.Tensor | Iterable[torch.Tensor | Mapping[str, torch.Tensor]] | str | os.PathLike | CalibrationText


TOKENS, DECODED = "attention_mask", "decoder_attention_mask"  # the two masks of padding that a batch may have
BY_POSITION = " by position"  # behind the name of a mask: rows may be `[length, samples, ...]`, as in XLNet, LED and FSMT
FITTING = "fitting"  # `TOKENS` for rows that fit it, no mask for others: values that were made from none of the model's inputs


@dataclass(frozen=True)
class ModelInputs:
    """The inputs that a model takes, as far as calibration data depend on them.

    Attributes:
        main: the input that a bare tensor is.
        decodes: True for an encoder with a decoder, which takes `decoder_input_ids` too.
        shifted: makes decoder ids from labels; None where the model has no such function.
    """

    main: str = "input_ids"
    decodes: bool = False
    shifted: Callable[[torch.Tensor], torch.Tensor] | None = None

    @classmethod
    def of(cls, model: Any) -> ModelInputs:
        """Return the inputs of `model`."""
        decodes = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
        shifted = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        return cls(getattr(model, "main_input_name", "input_ids"), decodes, shifted if decodes else None)


@dataclass(frozen=True)
class Batch:
    """One call of the model.

    Attributes:
        inputs: the keyword arguments.
        first_sample: the number of the first row among all calibration samples.
        token_mask: `[samples, length]` bool, True at real tokens of the model's main sequence; None where there is no padding.
        decoder_mask: the same for the tokens of a decoder behind an encoder.
        main: the name of the main input, whose first dimension counts the samples.
        held_out: True if nothing is fitted on its samples, see `windows.with_held_out`.
        numbers: the number of each row among all calibration samples, where these do not follow one another; None where they do.
    """

    inputs: dict[str, Any]
    first_sample: int
    token_mask: torch.Tensor | None
    decoder_mask: torch.Tensor | None = None
    main: str = "input_ids"
    held_out: bool = False
    numbers: tuple[int, ...] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """The number of samples and their length in tokens, which is 1 where the main input is not a sequence of tokens."""
        samples, *rest = self.inputs[self.main].shape
        return samples, rest[0] if self.main in SEQUENCES else 1

    @cached_property
    def tokens(self) -> int:
        """The number of real tokens. It is counted once, since reading a count waits for the device."""
        samples, length = self.shape
        return samples * length if self.token_mask is None else int(self.token_mask.sum())

    @cached_property
    def _decoded(self) -> int:
        return 0 if self.decoder_mask is None else int(self.decoder_mask.sum())

    @property
    def given(self) -> frozenset[str]:
        """The names of the inputs that are not None."""
        return frozenset(name for name, value in self.inputs.items() if value is not None)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The inputs that are tensors."""
        return {name: value for name, value in self.inputs.items() if isinstance(value, torch.Tensor)}

    @property
    def is_divided(self) -> bool:
        """True if the first dimension of every input divides it into samples."""
        samples = self.shape[0]
        return all(tensor.dim() and len(tensor) == samples for tensor in self.tensors.values())

    def first_sample_alone(self) -> dict[str, Any] | None:
        """Return the inputs of the first sample, or None where an input is not divided into samples by its first dimension."""
        if not self.is_divided:
            return None
        return {name: value[:1] if isinstance(value, torch.Tensor) else value for name, value in self.inputs.items()}

    def part(self, samples: torch.Tensor) -> Batch:
        """Return a batch of some of the samples.

        Args:
            samples: their places in this batch, int64.

        Raises:
            ValueError: an input is not divided into samples by its first dimension.
        """
        if not self.is_divided:
            shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in self.tensors.items())
            raise ValueError(
                f"calibration: expected inputs that their first dimension divides into samples, of which some are held out; got {shapes}"
            )

        def chosen(value: Any) -> Any:
            return value[samples.to(value.device)] if isinstance(value, torch.Tensor) else value

        inputs = {name: chosen(value) for name, value in self.inputs.items()}
        numbers = tuple(self._number(place) for place in samples.tolist())
        return replace(
            self,
            inputs=inputs,
            first_sample=numbers[0],
            token_mask=chosen(self.token_mask),
            decoder_mask=chosen(self.decoder_mask),
            numbers=numbers,
        )

    def _number(self, place: int) -> int:
        """Return the number among all calibration samples of the sample at `place`."""
        return self.first_sample + place if self.numbers is None else self.numbers[place]

    def mask(self, name: str | None = TOKENS) -> torch.Tensor | None:
        """Return the padding mask `name`; None where there is no padding, or no mask of that name."""
        masks = {TOKENS: self.token_mask, FITTING: self.token_mask, DECODED: self.decoder_mask}
        return masks.get((name or "").removesuffix(BY_POSITION))

    def used(self, rows: int, mask: str | None = TOKENS) -> int:
        """Return how many of the `rows` of a flattened activation belong to real tokens of the sequence that `mask` is of."""
        tokens = self.mask(mask)
        if tokens is None:
            return rows
        return (self._decoded if tokens is self.decoder_mask else self.tokens) * (rows // tokens.numel())

    def flatten(self, x: torch.Tensor, mask: str | None = TOKENS) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return an activation of this batch as `(rows [n, features], row_mask [n] or None)`.

        Args:
            x: the activation.
            mask: the padding mask of the sequence that its rows are of, see `Trace.masks`; None takes all rows.

        Raises:
            ValueError: there is padding, and the shape of `x` does not tell which rows are padding.
        """
        rows, tokens = x.reshape(-1, x.shape[-1]), self.mask(mask)
        if tokens is None:
            return rows, None
        view = None
        if (mask or "").endswith(BY_POSITION) and x.shape[:2] == tokens.T.shape:
            tokens, view = tokens.T, [*tokens.T.shape, *[1] * (x.dim() - 3)]
        view = fitted(x.shape, tokens.shape) if view is None else view
        if view is None and (mask or "").startswith(FITTING):
            return rows, None
        if view is None:
            raise ValueError(unclear(x.shape, tokens.shape))
        return rows, tokens.reshape(view).expand(x.shape[:-1]).flatten()

    def sample_of_row(self, row: int, rows: int, mask: str | None = TOKENS) -> int | None:
        """Return the calibration sample of row `row` of `rows`, or None where the rows do not follow the samples."""
        if (mask or "").endswith(BY_POSITION) and not rows % (self.shape[0] * self.shape[1]):
            return self._number(row // (rows // (self.shape[0] * self.shape[1])) % self.shape[0])
        return None if rows % self.shape[0] else self._number(row // (rows // self.shape[0]))


def fitted(shape: Sequence[int], mask: Sequence[int]) -> list[int] | None:
    """Return the shape in which a mask broadcasts to the leading dimensions of an activation; None where no dimension tells.

    Args:
        shape: `[samples, length, ...]`, `[samples, heads, length, ...]` or `[samples * length, ...]`, features last.
        mask: `[samples, length]`.
    """
    leading, (samples, length) = shape[:-1], mask
    places = [place for place, size in enumerate(leading) if place and size == length]
    view = [1] * len(leading)
    if list(leading[:1]) == [samples] and (1 in places or len(places) == 1):
        view[0], view[1 if 1 in places else places[0]] = samples, length
    elif list(leading[:1]) == [samples * length]:
        view[0] = samples * length
    else:
        return None
    return view


def unclear(shape: Sequence[int], mask: Sequence[int]) -> str:
    """Return the message for an activation whose shape does not tell which rows are padding."""
    return (
        f"an input of shape {tuple(shape)} in a padded batch of {mask[0]} x {mask[1]} tokens does not tell which rows are padding; "
        "calibrate with samples of one length"
    )


def as_batches(
    calibration: Calibration,
    batch_size: int | None,
    device: torch.device,
    vocabulary: int | None,
    positions: int | None = None,
    expected: ModelInputs | None = None,
) -> list[Batch]:
    """Check calibration data, and return it as batches on `device`.

    Args:
        calibration: one tensor of the model's main input, such as token ids, LongTensor `[samples, length]`; or an iterable of
            batches: such tensors, or mappings of the arguments of the model's forward, with `attention_mask` 0 at padding.
        batch_size: samples in a batch if `calibration` is one tensor; None chooses, see `tokens_per_batch`.
        device: the device of the batches.
        vocabulary: the ids must be below it; None checks nothing.
        positions: the longest sample allowed; None checks nothing.
        expected: the inputs that the model takes; None is those of a decoder.

    Raises:
        TypeError: calibration data of another type, or ids of another dtype.
        ValueError: a bad `batch_size`, wrong shapes, no tokens, ids outside the vocabulary, or samples that are too long.
    """
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size: expected a whole number of at least 1, got {batch_size!r}")
    expected = expected or ModelInputs()
    if isinstance(calibration, Mapping):
        calibration = [calibration]
    elif isinstance(calibration, torch.Tensor):
        if expected.main == "input_ids":
            _check_ids(calibration, vocabulary)
            size = batch_size or max(1, tokens_per_batch(_memory_of(device)) // max(calibration.shape[1], 1))
        else:
            size = batch_size or SAMPLES_PER_BATCH
        calibration = calibration.split(size)
    if not isinstance(calibration, Iterable):
        raise TypeError(f"calibration: expected token ids or an iterable of batches, got {calibration!r}")
    batches, samples = [], 0
    for given in calibration:
        batch = _as_batch(given, samples, device, vocabulary, expected)
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


def _as_batch(given: object, first_sample: int, device: torch.device, vocabulary: int | None, expected: ModelInputs) -> Batch:
    inputs: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {expected.main: given}
    if expected.decodes and not isinstance(given, Mapping) and expected.main == "input_ids":
        inputs["decoder_input_ids"] = given
    tensors = [name for name, value in inputs.items() if isinstance(value, torch.Tensor) and value.dim() and name != "labels"]
    main = next((name for name in (*SEQUENCES, expected.main, *tensors) if name in tensors), None)
    if main is None:
        kind = type(given).__name__
        raise TypeError(f"calibration: expected token tensors or mappings of the model's inputs with tensors, got {kind}")
    if "input_ids" in tensors:
        _check_ids(inputs["input_ids"], vocabulary)
    elif not inputs[main].numel():
        raise ValueError(f"calibration: expected at least one sample, got {main} of shape {tuple(inputs[main].shape)}")
    _check_mask(inputs, TOKENS, main if main in SEQUENCES else None)
    decoded = next((name for name in ("decoder_input_ids", "decoder_inputs_embeds") if inputs.get(name) is not None), None)
    _check_mask(inputs, DECODED, decoded)
    labels = inputs.get("labels")
    decoder_mask = inputs.get(DECODED)
    if isinstance(labels, torch.Tensor) and expected.decodes and decoded is None:
        decoder_mask = labels != IGNORED if decoder_mask is None else decoder_mask
        if expected.shifted is not None:
            inputs["decoder_input_ids"] = _shifted(expected.shifted, labels)
    if not expected.decodes or "decoder_input_ids" in inputs or decoded is not None:
        inputs.pop("labels", None)  # they would only cost a loss
    inputs = {name: replaced(value, torch.Tensor, partial(_plain, device=device)) for name, value in inputs.items()}
    return Batch(inputs, first_sample, _padding(inputs.get(TOKENS), device), _padding(decoder_mask, device), main)


def _shifted(function: Callable[[torch.Tensor], torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    try:
        return function(labels)
    except Exception as error:
        raise ValueError(f"calibration: the model makes no decoder_input_ids of labels ({error}); give both") from error


def _check_mask(inputs: Mapping[str, Any], name: str, of: str | None) -> None:
    """Raise unless the mask `name` is a tensor of the length of the sequence `of`; None takes any shape.

    A mask of four dimensions says which tokens attend to which. The model gets it as it is.

    Raises:
        TypeError: it is not a tensor.
        ValueError: it has another shape, or negative values, which are added to scores and mark no padding.
    """
    mask = inputs.get(name)
    shape = None if of is None else inputs[of].shape[:2]
    if mask is not None and not isinstance(mask, torch.Tensor):
        expected = "" if shape is None else f" of shape {tuple(shape)}"
        raise TypeError(f"calibration: expected {name} as a tensor{expected}, got {type(mask).__name__}")
    attends = mask is not None and mask.dim() == 4
    if mask is not None and shape is not None and mask.shape != shape and not (attends and mask.shape[0] in (1, shape[0])):
        raise ValueError(f"calibration: expected {name} of shape {tuple(shape)}, got {tuple(mask.shape)}")
    if mask is not None and mask.dim() == 2 and mask.dtype != torch.bool and bool((mask < 0).any()):
        raise ValueError(f"calibration: expected {name} with 0 at padding and 1 elsewhere, got {float(mask.min())}")


def _padding(mask: torch.Tensor | None, device: torch.device) -> torch.Tensor | None:
    """Return a mask of real tokens as bool on `device`; None where all are real, or where it does not tell tokens apart."""
    if mask is None or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.to(device).bool()


def _plain(value: torch.Tensor, *, device: torch.device) -> torch.Tensor:
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
