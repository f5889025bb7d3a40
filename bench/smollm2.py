"""The real model of the end-to-end figures, and the weights that a run has written for it."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

import sparsekern
from sparsekern.models.load import load_tokenizer

MODEL = "builtin:smollm2-135m"
SAMPLES, LENGTH = 32, 512
WINDOWS, WINDOW = 8, 2048


def dense_model() -> torch.nn.Module:
    return sparsekern.load(MODEL, dtype="float32", device="cpu")


def tokenizer():
    return load_tokenizer(MODEL)


def put_weights(model: torch.nn.Module, file: Path) -> None:
    """Replace the weights of `model` by those of a safetensors file that holds all its parameters.

    Raises:
        ValueError: The names differ.
    """
    weights = load_file(file)
    own = dict(model.named_parameters())
    if weights.keys() != own.keys():
        raise ValueError(
            f"{file.name}: expected the parameters of the model, got {sorted(weights.keys() ^ own.keys())[:3]} besides"
        )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])


def share_of_valid_groups(model: torch.nn.Module) -> float:
    """Return the share of linears inside the blocks that are 2:4: every four consecutive inputs hold at most two non-zeros."""
    linears = [m.weight for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in name]
    return sum(bool((w.unflatten(1, (-1, 4)) != 0).sum(2).le(2).all()) for w in linears) / len(linears)
