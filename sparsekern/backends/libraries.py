"""Loads the compiled libraries. A library that is missing or does not load leaves the references in place, with the reason kept."""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Library:
    """What became of a compiled library: `reason` is empty where it is loaded."""

    name: str
    loaded: bool
    reason: str


LIBRARIES: dict[str, Library] = {}


def load() -> None:
    _load("_C")
    if torch.version.cuda is None:
        # Its symbols are those of a CUDA torch: beside a CPU torch it cannot be loaded, and must not be tried.
        LIBRARIES["_C_cuda"] = Library("_C_cuda", False, "this torch is built without CUDA")
    else:
        _load("_C_cuda")


def _load(name: str) -> None:
    try:
        importlib.import_module(f"sparsekern.{name}")
    except ModuleNotFoundError:
        LIBRARIES[name] = Library(name, False, "not built (SPARSEKERN_BUILD=0, or no compiler when it was installed)")
    except ImportError as error:
        LIBRARIES[name] = Library(name, False, str(error))
    else:
        LIBRARIES[name] = Library(name, True, "")


def check_isa() -> None:
    """Raise `ValueError` if `SPARSEKERN_CPU_ISA` names no instruction set, or one that this CPU lacks: before the first op does."""
    if LIBRARIES["_C"].loaded:
        importlib.import_module("sparsekern._C").current_isa()
