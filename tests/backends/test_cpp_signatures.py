"""The functions in C++ take the arguments of the schemas that they are registered for: boxing compares nothing, by name or by type."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from sparsekern.backends import adapters
from sparsekern.ops._registry import OPS

CSRC = Path(__file__).resolve().parents[2] / "csrc"
TYPES = {
    "Tensor": "Tensor",
    "std::optional<Tensor>": "Optional[Tensor]",
    "int64_t": "int",
    "std::vector<int64_t>": "List[int]",
    "double": "float",
    "bool": "bool",
    "std::string": "str",
}


def raw_schemas() -> dict[str, torch._C.FunctionSchema]:
    """Of the C++ CUDA kernels, by name, as their wrappers define them."""
    texts = "\n".join(path.read_text(encoding="utf-8") for path in sorted((CSRC / "cuda").glob("*_op.cpp")))
    found = re.findall(r'm\.def\(\s*((?:"[^"]*"\s*)+)\)', texts)
    schemas = ["".join(re.findall(r'"([^"]*)"', text)) for text in found]
    return {text.partition("(")[0]: torch._C.parse_schema(f"sparsekern_cuda::{text}") for text in schemas}


@pytest.mark.parametrize("op", adapters.PLAIN_CUDA)
def test_a_cuda_kernel_that_an_adapter_calls_takes_the_arguments_of_its_op(op):
    raw, own = raw_schemas()[op], OPS[op].overload._schema

    def described(schema):
        return [(a.name, str(a.type), a.alias_info is not None and a.alias_info.is_write) for a in schema.arguments]

    assert described(raw) == described(own)
    types = [str(result.type) for result in raw.returns if result.name != "status"]
    assert types == [str(result.type) for result in own.returns]
    assert [result.name for result in raw.returns].count("status") <= 1 and "status" not in [r.name for r in raw.returns[:-1]]


def cpp_functions(folder: str, namespace: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """The ops that a folder registers in a namespace, each with type and name of the arguments of the function behind it."""
    found = []
    for path in sorted((CSRC / folder).glob("*.cpp")):
        text = path.read_text(encoding="utf-8")
        for block in re.findall(rf"STABLE_TORCH_LIBRARY_IMPL\({namespace}, \w+, m\) \{{(.*?)\}}", text, re.DOTALL):
            for op, function in re.findall(r'm\.impl\("(\w+)", TORCH_BOX\(&(\w+)\)\)', block):
                (arguments,) = re.findall(rf"[\w>&] {function}\(([^{{}}]*?)\) \{{", text)
                typed = [argument.split() for argument in re.sub(r"\s+", " ", arguments).split(", ") if argument]
                found.append((op, [(TYPES[kind], name) for kind, name in typed]))
    return found


def schema_of(namespace: str, op: str) -> torch._C.FunctionSchema:
    return raw_schemas()[op] if namespace == "sparsekern_cuda" else OPS[op].overload._schema


@pytest.mark.parametrize(("folder", "namespace", "least"), [("cpu", "sparsekern", 15), ("cuda", "sparsekern_cuda", 10)])
def test_the_functions_in_cpp_have_the_arguments_of_their_schemas(folder, namespace, least):
    """Boxing takes what is on the stack by its place and by the type that C++ declares: nothing else compares them."""
    functions = cpp_functions(folder, namespace)
    assert len(functions) >= least
    for op, arguments in functions:
        assert arguments == [(str(a.type), a.name) for a in schema_of(namespace, op).arguments], op
