"""The kept plans of cuSPARSELt on a CPU: our wrapper as it is, csrc/testing/fake_cusparselt.cpp for the library."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from . import sanitizers, simt

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which(sanitizers.compiler()[0]) is None, reason="no C++ compiler"),
]

SHARED = """
import ctypes, threading, time
import torch
from torch.nn import functional

WRAPPER, FAKE = {wrapper!r}, {library!r}
torch.ops.load_library(WRAPPER)
fake = ctypes.CDLL(FAKE)
calls = lambda what: fake.fake_calls(what.encode())
raw = torch.ops.sparsekern_cuda

def randn(*shape):
    return torch.randint(-4, 5, shape, generator=generator).to(dtype)  # every sum is exact

generator, dtype = torch.Generator().manual_seed(0), torch.bfloat16
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """Our wrapper, and the library that it opens."""
    sanitizers.runtime_libraries()
    fake = tmp_path_factory.mktemp("cusparselt") / "libfake.so"
    source = simt.CSRC / "testing" / "fake_cusparselt.cpp"
    command = [*sanitizers.compiler(), *simt.FLAGS, "-shared", f"-I{simt.CSRC}", source, "-o", fake]
    subprocess.run([str(part) for part in command], check=True)
    return {"wrapper": str(simt.build_library()), "library": str(fake)}


@pytest.fixture(scope="module")
def passes(tmp_path_factory, sanitized_python, files):
    """A function that runs a program after `SHARED`, and raises if it fails."""
    package = sanitizers.copy_package(tmp_path_factory.mktemp("cusparselt_package"))

    def run(program: str, **environment: str) -> None:
        done = sanitized_python.run(package, SHARED.format(**files) + program, **environment)
        assert done.returncode == 0, done.stdout + done.stderr

    return run


def test_plans_are_kept(passes):
    passes(
        """
assert raw.cusparselt_open(FAKE) == raw.cusparselt_open("anything, since one is open") == 801
for dtype in (torch.bfloat16, torch.float16):
    weight, bias, other = randn(32, 48), randn(32), randn(32)
    kept = weight.clone()
    for tokens in (1, 8, 13, 16, 5, 13):
        x = randn(tokens, 48)
        for strided in (x, x.T.contiguous().T, torch.cat([x.new_zeros(1), x.flatten()])[1:].view(tokens, 48)):
            for added in (None, bias, other, bias):
                product = raw.cusparselt_linear(strided, weight, 32, added, True)
                assert product.dtype == dtype and torch.equal(product, functional.linear(x, weight, added)), (dtype, tokens)
    assert torch.equal(weight, kept), "the search wrote to the weight"
# 2 dtypes x (8 and 16 tokens) x (with a bias and without); plans also for each bias, and one for each search
assert calls("search") == 8, calls("search")
assert calls("plan") == 2 * 2 * 3 + 8 and calls("destroyed plan") == 8, (calls("plan"), calls("destroyed plan"))
assert calls("handle") == 1
assert calls("matrix") - calls("destroyed matrix") == 3 * 12
assert calls("multiply by algorithm 5") == calls("multiply") - 8
assert raw.cusparselt_counts() == (calls("plan"), calls("search"))
""",
    )


def test_without_a_search_the_default_runs_and_is_not_remembered(passes):
    passes(
        """
raw.cusparselt_open(FAKE)
weight, x = randn(32, 48), randn(8, 48)
for _ in range(2):
    assert torch.equal(raw.cusparselt_linear(x, weight, 32, None, False), functional.linear(x, weight))
assert calls("search") == 0 and calls("plan") == 1 and calls("multiply by algorithm 0") == 2
assert torch.equal(raw.cusparselt_linear(x, weight, 32, None, True), functional.linear(x, weight))
assert torch.equal(raw.cusparselt_linear(x, weight, 32, None, False), functional.linear(x, weight))
assert calls("search") == 1 and calls("multiply by algorithm 5") == 2
assert raw.cusparselt_linear(x[:0], weight, 32, None, True).shape == (0, 32)
""",
    )


def test_numbers_of_tokens_share_an_algorithm(passes):
    passes(
        """
raw.cusparselt_open(FAKE)
weight = randn(32, 48)
for tokens in (100, 128, 72, 129):  # padded to 104, 128, 72 and 136
    x = randn(tokens, 48)
    assert torch.equal(raw.cusparselt_linear(x, weight, 32, None, True), functional.linear(x, weight))
assert calls("search") == 2 and calls("plan") - calls("destroyed plan") == 4
""",
    )


def test_each_thread_has_a_handle_and_gives_it_back(passes):
    passes(
        """
raw.cusparselt_open(FAKE)
weight, x = randn(32, 48), randn(8, 48)
right = []
def work():
    right.append(torch.equal(raw.cusparselt_linear(x, weight, 32, None, True), functional.linear(x, weight)))
threads = [threading.Thread(target=work) for _ in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert right == [True] * 3 and calls("handle") == 3
deadline = time.monotonic() + 20  # Python joins a thread a little before the thread has put its things away
while calls("destroyed handle") < 3 and time.monotonic() < deadline:
    time.sleep(0.01)
assert calls("destroyed handle") == 3
for what in ("plan", "matrix", "selection"):
    assert calls(what) == calls("destroyed " + what), what
""",
    )


def test_many_plans_do_not_pile_up(passes):
    passes(
        """
raw.cusparselt_open(FAKE)
weight, x = randn(16, 16), randn(8, 16)
biases = randn(1100, 16)
for bias in biases:
    assert torch.equal(raw.cusparselt_linear(x, weight, 16, bias, True), functional.linear(x, weight, bias))
assert calls("plan") - calls("destroyed plan") == 1100 - 1024
""",
    )


def test_what_is_refused(passes):
    passes(
        """
raw.cusparselt_open(FAKE)
weight, x, bias = randn(32, 48), randn(8, 48), randn(32)
for arguments, message in (
    ((x.float(), weight, 32, None), "x: expected dtype bfloat16 or float16"),
    ((x[0], weight, 32, None), "x: expected [tokens, in_features]"),
    ((x, weight.half(), 32, None), "compressed: expected the dtype of x"),
    ((x, weight.T, 32, None), "compressed: expected contiguous memory"),
    ((x, weight[:8], 32, None), "compressed: expected values and metadata"),
    ((x, weight, 32, bias[:8]), "bias: expected [out_features] of the dtype of x"),
    ((x, weight, 32, bias.half()), "bias: expected [out_features] of the dtype of x"),
    ((x, weight, 32, torch.stack((bias, bias), 1)[:, 0]), "bias: expected contiguous memory"),
    ((x, weight, 24, None), "cuSPARSELt: cusparseLtStructuredDescriptorInit failed: invalid value"),
):
    try:
        raw.cusparselt_linear(*arguments, True)
    except (ValueError, RuntimeError) as error:
        assert message in str(error), error
    else:
        raise AssertionError("not refused: " + message)
assert calls("matrix") == calls("destroyed matrix")
""",
    )


def test_the_reason_why_the_library_cannot_be_had(passes):
    passes(
        """
for name, reason in (("libnothing.so.0", "libnothing.so.0"), (WRAPPER, "has no cusparseLtGetProperty"), (FAKE, "expected version 0.8")):
    try:
        raw.cusparselt_open(name)
    except RuntimeError as error:
        assert "cuSPARSELt: " in str(error) and reason in str(error), error
    else:
        raise AssertionError("not refused")
try:
    raw.cusparselt_linear(randn(8, 16), randn(16, 16), 16, None, True)
except RuntimeError as error:
    assert "expected cusparselt_open to be called first" in str(error)
""",
        FAKE_CUSPARSELT_MINOR="7",
    )


def test_the_package_takes_kept_plans_first_and_torch_where_it_must(passes):
    passes(
        """
import sparsekern
from sparsekern import backends
from sparsekern.backends import cusparselt_linear as table
from sparsekern.backends.libraries import LIBRARIES, Library
from sparsekern import ops as module

LIBRARIES["_C_cuda"] = Library("_C_cuda", True, "")
weight, x, bias = randn(32, 48), randn(5, 48), randn(32)
torched = []
def through_torch(x, compressed, out_features, bias=None):
    torched.append(x.shape)
    return functional.linear(x, compressed, bias)
torch.library.register_kernel("sparsekern::cusparselt_linear", "cpu")(backends.dispatcher("cusparselt_linear", through_torch))

table.LIBRARY = "libnothing.so.0"
assert torch.equal(module.cusparselt_linear(x, weight, 32, bias), functional.linear(x, weight, bias)) and len(torched) == 1
with backends.use(cusparselt_linear="cuda"):
    try:
        module.cusparselt_linear(x, weight, 32)
    except ValueError as error:
        assert "cusparselt_linear: the cuda implementation was requested, but libnothing.so.0" in str(error), error
    else:
        raise AssertionError("not refused")

assert sparsekern.info().libraries["cuSPARSELt"].startswith("libnothing.so.0")

table.LIBRARY = FAKE
assert torch.equal(module.cusparselt_linear(x, weight, 32, bias), functional.linear(x, weight, bias)) and len(torched) == 1
assert calls("search") == 1 and calls("multiply by algorithm 5") == 1
with backends.use(cusparselt_linear="reference"):
    module.cusparselt_linear(x, weight, 32)
assert len(torched) == 2 and sparsekern.info().libraries["cuSPARSELt"] == "loaded"
""",
    )
