"""One signature an op: torch leaves out arguments that equal the schema's default, so a kernel's own default decides the result."""

from __future__ import annotations

import inspect

import pytest

from sparsekern import ops
from sparsekern.backends import implementations
from sparsekern.ops._registry import OPS

ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)

EVERY_OP = pytest.mark.parametrize("op", OPS.values(), ids=OPS.keys())
IMPLEMENTATIONS = [(op, known) for op in OPS for known in implementations(op)]
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("name", "known"), IMPLEMENTATIONS, ids=lambda v: getattr(v, "name", v))


def bare(parameters) -> list[inspect.Parameter]:
    """Name, kind and default; annotations are documentation."""
    return [parameter.replace(annotation=inspect.Parameter.empty) for parameter in parameters]


def differs(function, signature: inspect.Signature) -> str:
    """How a function's arguments differ from a signature, or nothing."""
    found, wanted = (bare(known.parameters.values()) for known in (inspect.signature(function), signature))
    return "" if found == wanted else f"({', '.join(map(str, found))}) is not ({', '.join(map(str, wanted))})"


def looks_at_others(function, signature: inspect.Signature) -> str:
    """How the arguments that a function names differ from those of a signature; it may take the rest as they come."""
    found, wanted = list(inspect.signature(function).parameters.values()), list(signature.parameters.values())
    named = bare(parameter for parameter in found if parameter.kind not in ANY)
    first = [parameter for parameter in named if parameter.kind != inspect.Parameter.KEYWORD_ONLY]
    same = first == bare(wanted[: len(first)]) and all(parameter in bare(wanted) for parameter in named)
    return "" if same else f"({', '.join(map(str, found))}) has other arguments than ({', '.join(map(str, wanted))})"


def with_friendly(op) -> inspect.Signature:
    """The schema's signature with the wrapper's own arguments where the ones that they stand for begin."""
    given = inspect.signature(getattr(ops, op.name)).parameters
    parameters = list(op.signature.parameters.values())
    for name, stands_for in op.friendly.items():
        kept = [parameter for parameter in parameters if parameter.name not in stands_for]
        place = next(i for i, parameter in enumerate(parameters) if parameter.name == stands_for[0])
        assert len(parameters) - len(kept) == len(stands_for) and name in given and name not in op.signature.parameters
        parameters = [*kept[:place], given[name], *kept[place:]]
    return inspect.Signature(parameters)


@EVERY_OP
def test_reference_and_fake_have_the_arguments_of_the_schema(op):
    assert differs(op.reference, op.signature) == "" == differs(op.fake, op.signature)


@EVERY_OP
def test_the_wrapper_has_them_but_for_those_it_says(op):
    assert differs(getattr(ops, op.name), with_friendly(op)) == ""


@EVERY_IMPLEMENTATION
def test_implementations_have_them(name, known):
    if known.name == "triton":
        pytest.importorskip("triton")
    assert differs(known.run, OPS[name].signature) == "" == looks_at_others(known.supports, OPS[name].signature)


def test_every_public_op_is_in_the_table():
    assert sorted(ops.__all__) == sorted(["OPS", *OPS])


def test_a_difference_is_found():
    def right(x, n, *, alpha=1.0): ...
    def renamed(x, m, *, alpha=1.0): ...
    def reordered(n, x, *, alpha=1.0): ...
    def positional(x, n, alpha=1.0): ...
    def other_default(x, n, *, alpha=2.0): ...
    def more(x, n, *, alpha=1.0, beta=0.0): ...

    wanted = inspect.signature(right)
    assert differs(right, wanted) == ""
    for wrong in (renamed, reordered, positional, other_default, more):
        assert differs(wrong, wanted) and looks_at_others(wrong, wanted)
    assert looks_at_others(lambda x, *args, **kwargs: 0, wanted) == "" == looks_at_others(lambda *a, alpha=1.0, **k: 0, wanted)
    assert looks_at_others(lambda n, *args, **kwargs: 0, wanted) and looks_at_others(lambda *a, alpha=0.5, **k: 0, wanted)
