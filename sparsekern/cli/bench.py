"""`sparsekern bench`: size, memory and speed of a packed model compared with the dense one."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial

from ..measure.compare import compare
from ..runtime.packing import PACKED, is_packed, packed_copy, unpacked_copy
from .common import load_model


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Return the work. Nothing can be checked before the model is loaded."""
    return partial(_compare, arguments)


def _compare(arguments: argparse.Namespace) -> None:
    model, format = load_model(arguments), arguments.format
    dense = unpacked_copy(model) if is_packed(model) else model
    packed = model if is_packed(model) and format == PACKED else packed_copy(dense, format)
    comparison = compare(
        dense,
        packed,
        prompt_length=arguments.prompt_length,
        tokens=arguments.tokens,
        rounds=arguments.rounds,
        resident=not arguments.no_rss,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(json.dumps(comparison.to_dict(), indent=2) if arguments.json else comparison)
    if arguments.plot:
        arguments.plot.write_text(comparison.to_svg() + "\n", encoding="utf-8")
