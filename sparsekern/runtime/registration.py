"""Registration of packed models with transformers, without importing it.

`transformers.quantizers.auto` holds the table of quantizers. A finder waits for the import of that module and registers as soon as it
has run. transformers only warns about an unknown `quant_method` and then fills the model with random numbers. So registration happens at
`import sparsekern`, not at first use.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now if transformers has imported its table, else as soon as it does."""
    if TABLE in sys.modules:
        _register(sys.modules[TABLE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register(table: Any) -> None:
    from .hf_quantizer import METHOD, SparsekernConfig, SparsekernQuantizer
    from .packing import unpack

    SparsekernQuantizer.unpack = staticmethod(unpack)
    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(SparsekernConfig)
        table.register_quantizer(METHOD)(SparsekernQuantizer)


class _WhenImported(MetaPathFinder):
    """A finder that finds nothing itself: it makes the loader of the table run `_register` afterwards."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Return the spec of the table with a loader that registers, or None for other modules."""
        if name != TABLE:
            return None
        others = (finder for finder in sys.meta_path if finder is not self and hasattr(finder, "find_spec"))
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)
                with suppress(ValueError):  # removed already
                    sys.meta_path.remove(self)  # only now: an import that fails may be tried again

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]  # for this one import
        return spec
