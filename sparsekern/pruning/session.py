"""Work that every pruning run does: check its inputs, make batches of them, and prepare the model."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata

import torch
from torch import nn

from .._version import __version__
from ..data import CalibrationText
from ..methods import ExpertMethod, LinearMethod, Method
from ..models.adapters import check_no_adapter
from ..models.evaluation import evaluation_mode
from ..models.float32_products import float32_products, switched_on
from ..models.limits import positions, vocabulary
from ..models.scaled_weights import undivided
from ..models.streaming import in_memory, stream_of
from ..pattern import NM, Pattern, parse_pattern
from ..runtime.formats import format_of
from ..runtime.packable import Packable, chosen_packables
from ..runtime.packing import PACKED, smallest
from ..runtime.save import DENSE
from .batches import Batch, Calibration, ModelInputs, as_batches
from .seeds import seed_torch, torch_generators_kept


def check_module(model: object) -> None:
    """Raise `TypeError` unless `model` is a module, `ValueError` if it has adapters."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a transformers model, got {type(model).__name__}; sparsekern.load returns one")
    check_no_adapter(model)


def check_streamed(model: nn.Module, methods: Iterable[Method | None], out: object) -> None:
    """Raise `ValueError` if `model` is streamed and a method needs more than a block of it, or has nowhere to write to."""
    if stream_of(model) is None:
        return
    for method in methods:
        by_block = isinstance(method, ExpertMethod) or (isinstance(method, LinearMethod) and not method.needs_whole_model)
        if method is not None and not by_block:
            raise ValueError(f"method: expected one that works block by block for a streamed model, got {method!r}")
    if out is None:
        raise ValueError("out: expected a folder, which holds the pruned blocks of a streamed model; got None")


def check_seed(seed: int) -> None:
    """Raise `ValueError` unless every generator accepts `seed`."""
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"seed: expected a whole number from 0 to 2**63 - 1, got {seed!r}")


def batches_for(
    model: nn.Module, method: Method, calibration: Calibration | None, batch_size: int | None, most_tokens: int | None = None
) -> list[Batch]:
    """Return the calibration data as batches for `model`, and read them first if they are a text.

    Args:
        model: the model.
        method: the method that needs them.
        calibration: see `prune`.
        batch_size: see `prune`.
        most_tokens: tokens in a batch where `batch_size` is None and one sample has no more; None chooses.

    Raises:
        TypeError: see `as_batches`.
        ValueError: see `as_batches`; also no calibration data, or a text that is too short.
    """
    if calibration is None:
        raise ValueError(
            f"calibration: expected token ids, which {type(method).__name__} needs (or report_error asks for); got None"
        )
    expected = ModelInputs.of(model)
    if isinstance(calibration, CalibrationText):
        if expected.main != "input_ids":
            raise ValueError(
                f"calibration: {type(model).__name__} takes {expected.main}, not text; expected batches of its inputs, got "
                f"{str(calibration.source)!r}"
            )
        calibration = calibration.read(model)
    device = next(model.parameters()).device
    if most_tokens is not None and batch_size is None and isinstance(calibration, torch.Tensor) and calibration.dim() == 2:
        batch_size = max(1, most_tokens // max(1, calibration.shape[1]))
    return as_batches(calibration, batch_size, device, vocabulary(model), positions(model), expected)


def check_format_fits(model: nn.Module, patterns: Mapping[str, Pattern], format: str) -> None:
    """Raise `ValueError` if no linear is sure to get smaller in `format`. This is checked before the work, not after it.

    Args:
        model: the model.
        patterns: the pattern of each linear that is pruned, by name.
        format: the format to save in.
    """
    if format == DENSE:
        return
    packables = chosen_packables(model, None, None).values()
    if any(_is_sure_to_shrink(known, patterns, format) for known in packables):
        return
    if _some_shrink(model, packables, format):
        return
    shown = ", ".join(sorted(set(map(str, patterns.values()))))
    raise ValueError(f"format: by pattern {shown}, none of {len(packables)} linear layers is sure to get smaller with {format!r}")


def _some_shrink(model: nn.Module, packables: Collection[Packable], format: str) -> bool:
    """Return whether a weight gets smaller as it is. The blocks of a streamed model are read one after another."""
    if any(smallest(known.dense, format) for known in packables if not known.is_unread):
        return True
    stream = stream_of(model)
    for index, name in enumerate(stream.blocks if stream else ()):
        with in_memory(model, index):
            if any(smallest(known.dense, format) for known in packables if known.parameter_name.startswith(f"{name}.")):
                return True
    return False


def _is_sure_to_shrink(known: Packable, patterns: Mapping[str, Pattern], format: str) -> bool:
    """Return whether a weight gets smaller by the patterns of all its matrices."""
    names = known.matrices
    if any(name not in patterns for name in names):
        return False
    weight = known.dense if known.dense.dim() == 2 else known.dense[0]
    return all(_gets_smaller(weight, pattern, format) for pattern in {patterns[name] for name in names})


def _gets_smaller(weight: torch.Tensor, pattern: Pattern, format: str) -> bool:
    """Return whether weights of a pattern get smaller in a format. The padding of a bitmask is not counted."""
    names = [format] if format != PACKED else ["bitmask", str(pattern)]
    return any(_bytes_when_pruned(weight, pattern, name) < weight.nbytes for name in names)


def _bytes_when_pruned(weight: torch.Tensor, pattern: Pattern, format: str) -> float:
    (rows, columns), kept = weight.shape, int((1 - pattern.sparsity) * weight.numel())
    shape = (rows, columns)
    try:
        layout = format_of(format)
        if format != "bitmask":
            wanted = parse_pattern(format)
            if not isinstance(wanted, NM) or not isinstance(pattern, NM) or not pattern.guarantees(wanted.n, wanted.m):
                return math.inf
        return sum(spec.nbytes for spec in layout.specs(shape, weight.dtype, kept).values())
    except ValueError:  # no such format, or other input features than it takes
        return math.inf


@contextmanager
def prepared(model: nn.Module, seed: int) -> Iterator[None]:
    """Prepare `model` to run within: evaluation mode, no gradients, seeded generators, fast products. Everything is restored."""
    device = next(model.parameters()).device
    with torch.no_grad(), torch_generators_kept(device), evaluation_mode(model), undivided(model), float32_products(model):
        seed_torch(seed, device)
        yield


def parameters_of(model: nn.Module) -> int:
    """Return the number of weights of a model, shared ones counted once."""
    return sum(parameter.numel() for parameter in model.parameters())


def environment(model: nn.Module) -> dict[str, object]:
    """Return the versions and settings of the process that the last bit of a result may depend on."""
    return {
        "sparsekern": __version__,
        "torch": torch.__version__,
        "transformers": metadata.version("transformers"),
        "device": str(next(model.parameters()).device),
        "threads": torch.get_num_threads(),
        "float32_matmul": _float32_matmul(),
        "float32_products": switched_on(),
        "attention": getattr(getattr(model, "config", None), "_attn_implementation", None),
    }


def _float32_matmul() -> str:
    """Return the precision of float32 products that the user has set, through either of torch's interfaces."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:  # set through the newer interface, which the older one then refuses to read
        return f"cuda: {torch.backends.cuda.matmul.fp32_precision}"
