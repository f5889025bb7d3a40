"""The package as `SPARSEKERN_BUILD=0` installs it: every op runs its reference, and pruning and packed models work on them."""

from __future__ import annotations

from . import sanitizers

OPS = ("gram", "reverse_cholesky", "nm_mask", "bitmask_linear", "nm_linear")
TESTS = (
    *(f"tests/ops/test_{op}.py" for op in OPS),
    "tests/methods/test_wanda.py",
    "tests/methods/test_sparsegpt.py",
    "tests/runtime/test_sparse_linear.py",
    "tests/runtime/test_packing.py",
)


def test_tests_pass_on_the_references(tmp_path):
    done = sanitizers.run_op_tests(sanitizers.copy_package(tmp_path), "-v", tests=TESTS, LD_PRELOAD="")
    assert "sparsekern: references (" in done.stdout
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-6000:]
