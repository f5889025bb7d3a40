"""Loading of the compiled libraries. If one is missing or does not load, the references run, and the reason is recorded.

`SPARSEKERN_CPU_ISA=reference`, read when sparsekern is imported, disables the CPU kernels: every op runs its reference on CPU tensors.
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
    """The state of a compiled library.

    Attributes:
        name: name of the module.
        loaded: whether its kernels are registered.
        reason: why they are not; empty if loaded.
        wanted: False if the user disabled the library.
    """

    name: str
    loaded: bool
    reason: str
    wanted: bool = True


ISA = "SPARSEKERN_CPU_ISA"
WITHOUT = "reference"


INTERFACE = b"sparsekern-interface:2\0"  # the marker of csrc/common/interface.h

LIBRARIES: dict[str, Library] = {}


def load() -> None:
    """Load the libraries that this process can use, and record for the others why not."""
    if os.environ.get(ISA) == WITHOUT:
        LIBRARIES["_C"] = Library("_C", False, f"left out by {ISA}={WITHOUT}", wanted=False)
    else:
        _load("_C")
    if torch.version.cuda is None:
        # It needs the symbols of a CUDA torch: with a CPU torch it cannot be loaded, and must not be tried.
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
    """Return why a library must not be loaded, or an empty string: its ops may take other arguments, if built from other sources."""
    found = importlib.util.find_spec(f"sparsekern.{name}")
    if found is None or found.origin is None or not found.origin.endswith(tuple(EXTENSION_SUFFIXES)):
        return ""
    return "" if has_interface(Path(found.origin)) else f"built from other sources than these ({found.origin}); build it again"


def has_interface(library: Path) -> bool:
    """Return whether the ops of a library match the current schemas, without loading it."""
    if library.stat().st_size == 0:
        return False
    with library.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(INTERFACE) >= 0


def check_isa() -> None:
    """Raise `ValueError` if `SPARSEKERN_CPU_ISA` names no instruction set, or one that this CPU lacks; otherwise the first op would."""
    if not LIBRARIES["_C"].loaded:
        return
    if os.environ.get(ISA) == WITHOUT:
        raise ValueError(f"{ISA}: expected {WITHOUT!r} to be set before sparsekern is imported, got it afterwards")
    importlib.import_module("sparsekern._C").current_isa()
