"""The benchmark problems of every op: `bench_<op>.py` holds an op's `CASES`."""

from __future__ import annotations

import importlib
import pkgutil

from ..problem import Case


def all_cases() -> dict[str, list[Case]]:
    """Return the cases by the name of their module."""
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name.startswith("bench_"))
    return {name: importlib.import_module(f"{__name__}.{name}").CASES for name in modules}
