"""A digest of what a model computes."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .streaming import stream_of

# Settings of a config that change no result: where the model came from, and what a forward returns beside it.
NOT_COMPUTED = {
    "_name_or_path", "architectures", "dtype", "output_attentions", "output_hidden_states", "return_dict", "transformers_version",
    "use_cache",
}  # fmt: skip


def model_fingerprint(model: nn.Module, without: Sequence[nn.Parameter] = ()) -> str:
    """Return a digest of a model's tensors and of its config.

    Of each parameter and buffer it holds the name, shape and dtype, the sum of the bits and a sample of values. The config, such as the
    base of rotary positions, can change what a model computes without changing a tensor.

    Args:
        model: the model.
        without: parameters to leave out.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    left_out = set(map(id, without))
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_dict"):
        known = {name: value for name, value in config.to_dict().items() if name not in NOT_COMPUTED}
        digest.update(json.dumps(known, sort_keys=True, default=str).encode())
    if (stream := stream_of(model)) is not None:
        digest.update(stream.fingerprint(model, without).encode())
        return digest.hexdigest()
    for name, parameter in itertools.chain(model.named_parameters(), model.named_buffers()):
        if id(parameter) in left_out:
            continue
        flat = parameter.detach().flatten()
        if flat.is_complex():
            flat = torch.view_as_real(flat).flatten()
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        some = bits[:: max(1, len(bits) // 256)].cpu().contiguous().numpy().tobytes()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
        digest.update(some)
    return digest.hexdigest()
