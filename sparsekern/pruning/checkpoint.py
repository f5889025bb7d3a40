"""Finished blocks on disk, so that a killed run loses at most the block it was at.

`OUT/checkpoint/state.json` says what the run is (written first, never changed); `block-00012.safetensors` holds one block's pruned
weights, with the reports of its layers in the header. Every file appears by an atomic rename. A resumed run puts the finished blocks
back and recomputes only the hidden states behind them, so it goes on with the very same numbers.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from .._files import write_atomically
from .._warnings import SparsekernWarning
from ..models import Linear
from ..reports.report import LayerReport, Report
from ..runtime import check_output_folder
from .run import BlockResult

FOLDER = "checkpoint"
STATE = "state.json"
FORMAT = 1
ReportLike = TypeVar("ReportLike")


class Checkpoint:
    """The checkpoint of one run in the output folder `out`."""

    def __init__(self, out: str | os.PathLike, settings: dict, environment: dict, *, resume: bool) -> None:
        """Start a checkpoint, or with `resume` go on with the one that is there (or start, where there is none).

        Args:
            settings: what the result depends on; a checkpoint made with others is refused.
            environment: versions and threads; where they differ the user is told, since rounding may then differ.

        Raises:
            FileExistsError: `out` holds something else.
            ValueError: `out` holds an unfinished run without `resume`, or the checkpoint of another run.
        """
        self.folder = Path(out) / FOLDER
        state = {"format": FORMAT, "settings": settings, "environment": environment}
        state = json.loads(json.dumps(state))  # as it will be read back: tuples are lists
        if not self.folder.exists():
            check_output_folder(out)
        elif not resume:
            raise ValueError(f"out: {out} holds an unfinished run; pass resume=True to go on with it, or remove {self.folder}")
        if (self.folder / STATE).exists():
            self._check_state(state)
        elif self.folder.exists() and any(not entry.name.startswith(".") for entry in self.folder.iterdir()):
            raise ValueError(f"out: {self.folder} holds no {STATE}, so it is not a checkpoint of a run; remove it to start anew")
        else:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self.folder / STATE, json.dumps(state, indent=1).encode())

    def _check_state(self, state: dict) -> None:
        path = self.folder / STATE
        try:
            found = json.loads(path.read_bytes())
            settings, environment, version = dict(found["settings"]), dict(found["environment"]), found["format"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {path} is not a checkpoint's state ({error}); remove {self.folder} to start anew") from error
        if version != FORMAT:
            raise ValueError(f"out: {path} has format {version}, this version reads {FORMAT}; remove {self.folder} to start anew")
        if different := differences(settings, state["settings"]):
            raise ValueError(
                f"out: {self.folder} belongs to another run, with another {', '.join(different)}; "
                "call with the same model and settings, or remove it to start anew"
            )
        if different := differences(environment, state["environment"]):
            warnings.warn(
                f"the run is resumed with another {', '.join(different)}; the result may differ in rounding from an unbroken run",
                SparsekernWarning,
                stacklevel=5,
            )

    def save(self, index: int, result: BlockResult) -> None:
        """Write the pruned weights of block `index` and the reports of its layers."""
        from safetensors.torch import save

        tensors = {name: weight.contiguous() for name, weight in result.weights.items()}
        metadata = {"layers": json.dumps([asdict(layer) for layer in result.layers])}
        write_atomically(self._path(index), save(tensors, metadata))

    def holds(self, index: int) -> bool:
        return self._path(index).exists()

    def load(self, index: int, linears: Sequence[Linear]) -> BlockResult | None:
        """Return the result of block `index`, or None where it is not finished.

        Raises:
            ValueError: the file is damaged or holds other layers.
        """
        found = self.read(index, LayerReport.from_dict)
        if found is None:
            return None
        weights, layers = found
        path = self._path(index)
        expected = {linear.name: (tuple(linear.weight.shape), linear.weight.dtype) for linear in linears}
        if {name: (tuple(weight.shape), weight.dtype) for name, weight in weights.items()} != expected:
            raise ValueError(f"out: {path} holds other layers than the model's; remove it to prune that block again")
        return BlockResult(weights, layers)

    def read(
        self, index: int, make_report: Callable[[dict], ReportLike]
    ) -> tuple[dict[str, torch.Tensor], list[ReportLike]] | None:
        """What `save` wrote for block `index`, whatever it is of, or None where the block is not finished.

        Raises:
            ValueError: the file is damaged.
        """
        from safetensors import SafetensorError, safe_open

        path = self._path(index)
        if not self.holds(index):
            return None
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
                return tensors, [make_report(layer) for layer in json.loads(file.metadata()["layers"])]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(f"out: {path} is damaged ({error}); remove it to prune that block again") from error

    def _path(self, index: int) -> Path:
        return self.folder / f"block-{index:05d}.safetensors"


def finish(out: str | os.PathLike, report: Report, dense_bytes: int, complete: Callable[[Report], None] | None) -> None:
    """Put the report beside the pruned model saved in `out`, then what `complete` adds, and remove the checkpoint.

    It goes last, so that a run killed before can be resumed.

    Args:
        dense_bytes: of the weights in memory, for the report.
    """
    folder = Path(out)
    report.size = {"dense": dense_bytes, "saved": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}
    report.to_json(folder / "report.json")
    report.to_html(folder / "report.html")
    if complete is not None:
        complete(report)
    shutil.rmtree(folder / FOLDER)


def model_fingerprint(model: nn.Module, without: Sequence[nn.Parameter] = ()) -> str:
    """A digest of a model's parameters: names, shapes, dtypes, the sum of all their bits and a sample of values.

    Those of `without` are left out.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    left_out = set(map(id, without))
    for name, parameter in model.named_parameters():
        if id(parameter) in left_out:
            continue
        flat = parameter.detach().flatten()
        bits = flat.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
        some = bits[:: max(1, len(bits) // 256)].cpu().contiguous().numpy().tobytes()
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {int(bits.sum(dtype=torch.int64))};".encode())
        digest.update(some)
    return digest.hexdigest()


def differences(found: dict, expected: dict) -> list[str]:
    return sorted(key for key in found.keys() | expected.keys() if found.get(key) != expected.get(key))
