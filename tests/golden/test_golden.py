"""The results of every method stay what they are, to the bit: a change has to be wanted, and its commit names it.

`python -m tests.golden.test_golden` recomputes them. Where torch, the vendor or the vector width of the CPU is not that of the
stored digests, floats round differently: there the test compares the zeros and the norm of each tensor, with room for a few other choices.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from sparsekern.backends.libraries import LIBRARIES
from sparsekern.methods import METHODS

from .cases import CASES, digest, machine, outline

GOLDEN = Path(__file__).with_name("golden.json")
ZEROS, NORM = 0.02, 0.02  # how far shares of zeros, and norms relatively, may be apart on another machine


def stored() -> dict:
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("case", CASES)
def test_results_are_what_they_were(case):
    golden, found = stored(), CASES[case]()
    if LIBRARIES["_C"].loaded and machine() in golden["digests"]:
        assert digest(found) == golden["digests"][machine()][case]
    expected, got = golden["outlines"][case], outline(found)
    assert got.keys() == expected.keys()
    for name, (zeros, norm) in expected.items():
        assert got[name][0] == pytest.approx(zeros, abs=ZEROS), name
        assert got[name][1] == pytest.approx(norm, rel=NORM, abs=1e-4), name


def test_one_case_twice_has_the_same_digest_and_one_bit_another():
    first, second = CASES["llama: sparsegpt"](), CASES["llama: sparsegpt"]()
    assert digest(first) == digest(second)
    name = next(name for name, tensor in second.items() if tensor.dim() == 2)
    second[name].view(torch.int32)[0, 0] ^= 1
    assert digest(first) != digest(second)


def test_no_case_is_missing():
    golden = stored()
    assert set(golden["outlines"]) == set(CASES)
    assert all(set(digests) == set(CASES) for digests in golden["digests"].values())
    assert {case.partition(": ")[2].split()[0].rstrip(",") for case in CASES} == {*METHODS, "packed"}


def main() -> None:
    torch.set_num_threads(1)
    results = {case: make() for case, make in CASES.items()}
    golden = stored() if GOLDEN.exists() and "--fresh" not in sys.argv else {"digests": {}}
    golden["digests"][machine()] = {case: digest(found) for case, found in results.items()}
    golden["outlines"] = {case: outline(found) for case, found in results.items()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
