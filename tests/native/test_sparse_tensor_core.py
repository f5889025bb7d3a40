"""Which lane brings which positions to the sparse tensor cores: by the metadata of PyTorch's own layout, which CUTLASS hands to them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.sparse._semi_structured_conversions import sparse_semi_structured_from_dense_cutlass

from . import sanitizers, simt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(sanitizers.compiler()[0]) is None, reason="no C++ compiler"),
]
INCLUDE = [f"-I{folder}" for folder in (simt.CSRC, simt.CSRC / "testing", simt.CSRC / "testing" / "simt")]


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    source, target = simt.CSRC / "testing" / "sparse_tensor_core.cpp", tmp_path_factory.mktemp("program") / "multiply"
    command = [*sanitizers.compiler(), "-std=c++17", "-DSPARSEKERN_SIMT", *INCLUDE, str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return target


def multiply(program: Path, *operands: torch.Tensor) -> torch.Tensor:
    given = b"".join(operand.contiguous().view(torch.int16).numpy().tobytes() for operand in operands)
    product = subprocess.run([program], input=given, capture_output=True, check=True).stdout
    return torch.frombuffer(bytearray(product), dtype=torch.float32).view(32, 8)


def test_positions_arrive_as_cutlass_stores_them(program, generator):
    kept = torch.rand(32, 32, 4, generator=generator).argsort(-1) < 2
    weight = (torch.randint(1, 8, kept.shape, generator=generator) * kept).flatten(1).bfloat16()
    x = torch.randint(-8, 8, (8, 128), generator=generator).bfloat16()
    values, meta = sparse_semi_structured_from_dense_cutlass(weight)
    expected = weight.float() @ x.float().T
    assert torch.equal(multiply(program, values, meta, x), expected)
    row_after_row = meta.flatten().roll(1)  # positions of other lanes
    assert not torch.equal(multiply(program, values, row_after_row, x), expected)
