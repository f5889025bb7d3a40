"""Loads the compiled libraries. Where one is missing or does not load, the references run, and the reason is kept.

`SPARSEKERN_CPU_ISA=reference`, read when sparsekern is imported, leaves the CPU kernels out: every op runs its reference on CPU tensors.
"""

from __future__ import annotations

import importlib
import importlib.util
import mmap
import os
from dataclasses import dataclass
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import torch


@dataclass(frozen=True)
class Library:
    """What became of a compiled library.

    Attributes:
        name: of the module.
        loaded: its kernels are registered.
        reason: why not; empty where it is loaded.
        wanted: nobody asked to leave it out.
    """

    name: str
    loaded: bool
    reason: str
    wanted: bool = True


ISA = "SPARSEKERN_CPU_ISA"
WITHOUT = "reference"


INTERFACE = b"sparsekern-interface:2\0"  # of csrc/common/interface.h

LIBRARIES: dict[str, Library] = {}


def load() -> None:
    """Load what this process can use, or keep the reason why not."""
    if os.environ.get(ISA) == WITHOUT:
        LIBRARIES["_C"] = Library("_C", False, f"left out by {ISA}={WITHOUT}", wanted=False)
    else:
        _load("_C")
    if torch.version.cuda is None:
        # Its symbols are those of a CUDA torch: beside a CPU torch it cannot be loaded, and must not be tried.
        LIBRARIES["_C_cuda"] = Library("_C_cuda", False, "this torch is built without CUDA")
    else:
        _load("_C_cuda")


def _load(name: str) -> None:
    reason = _stale(name)
    if not reason:
        try:
            importlib.import_module(f"sparsekern.{name}")
        except ModuleNotFoundError:
            reason = "not built (SPARSEKERN_BUILD=0, or no compiler when it was installed)"
        except ImportError as error:
            reason = str(error)
    LIBRARIES[name] = Library(name, not reason, reason)


def _stale(name: str) -> str:
    """Return why a library must not be loaded: it was built from sources whose ops take other arguments. Empty: it may be."""
    found = importlib.util.find_spec(f"sparsekern.{name}")
    if found is None or found.origin is None or not found.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return ""
    return "" if has_interface(Path(found.origin)) else f"built from other sources than these ({found.origin}); build it again"


def has_interface(library: Path) -> bool:
    """Whether the ops of a library take the arguments of today's schemas, told without loading it."""
    if library.stat().st_size == 0:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(INTERFACE) >= 0


def check_isa() -> None:
    """Raise `ValueError` if `SPARSEKERN_CPU_ISA` names no instruction set, or one that this CPU lacks: before the first op does."""
    if not LIBRARIES["_C"].loaded:
        return
    if os.environ.get(ISA) == WITHOUT:
        raise ValueError(f"{ISA}: expected {WITHOUT!r} to be set before sparsekern is imported, and it was not")
    importlib.import_module("sparsekern._C").current_isa()
