"""Makes transformers know packed models, without importing it.

`transformers.quantizers.auto` holds the table of the ways to load a model. Until somebody imports that module there is nothing to
register with, so a finder waits for it and registers as soon as it has run. An unknown `quant_method` is only a warning to transformers,
which would then fill the model with random numbers: so this happens at `import sparsekern`, not at the first use of something.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder

TABLE = "transformers.quantizers.auto"


def register_with_transformers() -> None:
    """Register now where transformers has its table, else when it gets it."""
    if TABLE in sys.modules:
        _register(sys.modules[TABLE])
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def _register(table) -> None:
    from .hf_quantizer import METHOD, SparsekernConfig, SparsekernQuantizer
    from .packing import unpack

    SparsekernQuantizer.unpack = staticmethod(unpack)
    if METHOD not in table.AUTO_QUANTIZER_MAPPING:
        table.register_quantization_config(METHOD)(SparsekernConfig)
        table.register_quantizer(METHOD)(SparsekernQuantizer)


class _WhenImported(MetaPathFinder):
    """Finds nothing itself: it takes what the others find and lets its loader run `_register` afterwards."""

    def find_spec(self, name, path=None, target=None):
        if name != TABLE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module):
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register
        return spec
