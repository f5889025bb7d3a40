"""`sparsekern pack`: a pruned model in a packed format, in a folder of its own."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from ..runtime.output import check_model_folder, check_output_folder
from ..runtime.packing import weight_bytes
from ..runtime.save import save
from .common import check_push_option, load_model, load_tokenizer_of, next_steps, push_result, say

MB = 1e6


def prepare(arguments: argparse.Namespace) -> Callable[[], None]:
    """Check a command line as far as possible without a model, and return the work.

    Raises:
        ValueError: options contradict each other.
        OSError: the output folder cannot be written to.
    """
    if arguments.head is not None and arguments.stream:
        raise ValueError("--head: expected none with --stream, which cannot round the head; leave --stream out")
    if Path(arguments.model).resolve() == Path(arguments.out).resolve():
        raise ValueError(f"--out: expected another folder than MODEL, got {str(arguments.out)!r}")
    check = check_model_folder if arguments.overwrite else check_output_folder
    check(arguments.out, "--out")
    check_push_option(arguments)
    return partial(_pack, arguments)


def _pack(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer_of(arguments, needed=False)
    model = load_model(arguments)
    before = weight_bytes(model)
    say(f"packing {arguments.model}")
    out = save(model, arguments.out, arguments.format, tokenizer=tokenizer, overwrite=arguments.overwrite, head=arguments.head)
    after = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    print(f"{after / MB:,.1f} MB of weights, {after / before:.3f} of {before / MB:,.1f} MB")
    print(next_steps(model, out, packed=True))
    push_result(arguments)
