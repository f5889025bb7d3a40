"""Which compiled libraries are loaded, and why others are not."""

from __future__ import annotations

import importlib
import importlib.util
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from sparsekern.backends import libraries
from sparsekern.backends.libraries import INTERFACE, LIBRARIES, has_interface

ROOT = Path(__file__).resolve().parents[2]


def test_a_library_that_is_built_has_the_interface_of_these_sources():
    found = importlib.util.find_spec("sparsekern._C")
    if found is None:
        pytest.skip(f"_C was not built here: {LIBRARIES['_C'].reason}")
    assert has_interface(Path(found.origin)) and LIBRARIES["_C"].loaded


def test_both_languages_name_the_same_interface():
    assert f'"{INTERFACE.decode()[:-1]}"' in (ROOT / "csrc" / "common" / "interface.h").read_text()


@pytest.mark.parametrize("content", [b"", b"\x7fELF sparsekern-interface:1\0", b"\x7fELF" + INTERFACE[:-1] + b"0\0"])
def test_a_library_from_other_sources_is_not_loaded(content, tmp_path, monkeypatch):
    """Its kernels would unpack other arguments than they are given."""
    library = tmp_path / "_C.abi3.so"
    library.write_bytes(content)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: ModuleSpec(name, None, origin=str(library)))
    monkeypatch.setattr(importlib, "import_module", lambda name: pytest.fail(f"{name} was loaded"))
    monkeypatch.setattr(libraries, "LIBRARIES", {})
    libraries._load("_C")
    loaded = libraries.LIBRARIES["_C"]
    assert not loaded.loaded and loaded.reason == f"built from other sources than these ({library}); build it again"
