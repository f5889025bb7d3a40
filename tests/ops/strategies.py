"""What the property tests draw: small matrices full of the values that selection and packing get wrong."""

from __future__ import annotations

import math
import os

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

FLOATS = (torch.float32, torch.bfloat16, torch.float16)

# Few distinct values, so that ties are the rule; 2^-14 and 2^-24 are the smallest normal and subnormal float16.
AWKWARD = (0.0, -0.0, 1.0, -1.0, 2.0, 0.5, -0.5, 2.0**-14, -(2.0**-14), 2.0**-24, 3.0, 60000.0, math.inf, -math.inf)

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # which takes seconds where a kernel takes microseconds
ON_GPU = torch.get_default_device().type == "cuda"  # --kernels=gpu or gpu-triton
FEW_KERNELS = (
    INTERPRETED or ON_GPU
)  # dtypes, patterns and numbers of tokens: Triton compiles most of their combinations for seconds

SANITIZED = "libasan" in os.environ.get("LD_PRELOAD", "")
# Values are compared by all examples natively, and by half of them for the CUDA kernels in the forward order of threads. The sanitized
# CPU kernels and the reversed order look for other faults, which depend on sizes more than on values.
FORWARD = os.environ.get("SPARSEKERN_SIMT_ORDER") == "forward"
EXAMPLES = 3 if INTERPRETED else 8 if ON_GPU else 50 if not SANITIZED else 25 if FORWARD else 10

# The `isa` fixture sets an environment variable once for all examples, which is what is wanted.
PROPERTY = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


ROWS, COLUMNS, NO_ZEROS = st.integers(0, 5), st.integers(0, 70), st.just(0.0)


@st.composite
def matrices(draw, *, columns=COLUMNS, rows=ROWS, zeros=NO_ZEROS):
    """`[rows, columns]` of a floating dtype; about the share `zeros` of it is zero, of either sign."""
    shape = (draw(rows), draw(columns))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    if draw(st.booleans()):
        matrix = torch.tensor(AWKWARD)[torch.randint(len(AWKWARD), shape, generator=generator)]
    else:
        matrix = torch.randn(shape, generator=generator)
    dropped = torch.rand(shape, generator=generator) < draw(zeros)
    signed_zeros = torch.tensor([0.0, -0.0])[torch.randint(2, shape, generator=generator)]
    return torch.where(dropped, signed_zeros, matrix).to(draw(st.sampled_from(FLOATS)))


def best(row: list[float], k: int) -> list[bool]:
    """The k largest of a list, of equal ones the first: the definition, one comparison at a time."""
    kept = set(sorted(range(len(row)), key=lambda i: (-row[i], i))[:k])
    return [i in kept for i in range(len(row))]


def bits(tensor: torch.Tensor) -> bytes:
    """The memory of a tensor's values, so that -0.0 differs from 0.0."""
    return tensor.contiguous().view(torch.uint8).cpu().numpy().tobytes() if tensor.numel() else b""


def with_nan(matrix: torch.Tensor, *places: tuple[int, int]) -> torch.Tensor:
    matrix = matrix.clone()
    for place in places:
        matrix[place] = math.nan
    return matrix


def assert_rounded_once(got: torch.Tensor, full: torch.Tensor) -> None:
    """Compare with a call in float32, to the bit. On a GPU to a unit in the last place: Triton contracts each dtype's code by itself."""
    ulp = torch.finfo(got.dtype).eps if got.is_cuda else 0
    torch.testing.assert_close(got, full.to(got.dtype), rtol=ulp, atol=0)


def misaligned(matrix: torch.Tensor) -> torch.Tensor:
    """The same values, contiguous, but beginning one element into their memory: where no vector can be read at once."""
    moved = matrix.new_zeros(matrix.numel() + 1)[1:].view(matrix.shape)
    return moved.copy_(matrix)
