"""A model on paper: the products of one token with packed weights on a GPU, by what bounds them. Nothing here is measured.

`python -m bench.decoding` writes docs/decoding.md. Bytes follow from the layouts. Instructions are those of the machine code for sm_90,
which tests/native/test_decode_machine_code.py counts. Reads of shared memory that meet in a bank are drawn at random.
"""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent / "docs" / "decoding.md"
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))
SPARSITIES = (0.5, 0.6, 0.7)
LANES = BANKS = 32


@dataclass(frozen=True)
class Device:
    """What a product of one token is measured against.

    Attributes:
        bytes_a_second: that a copy reaches.
        multiprocessors: their number; each issues four instructions of a warp, and reads 128 bytes of shared memory, a cycle.
        cycles_a_second: of a multiprocessor.
        issued: share of the issue slots that a kernel uses.
        latency: seconds until the first bytes arrive.
    """

    bytes_a_second: float
    multiprocessors: int
    cycles_a_second: float
    issued: float
    latency: float


H200 = Device(bytes_a_second=0.9 * 4.8e12, multiprocessors=132, cycles_a_second=1.83e9, issued=0.8, latency=0.7e-6)
A100 = Device(bytes_a_second=0.9 * 2.039e12, multiprocessors=108, cycles_a_second=1.41e9, issued=0.8, latency=0.7e-6)
RTX_4090 = Device(bytes_a_second=0.9 * 1.008e12, multiprocessors=128, cycles_a_second=2.52e9, issued=0.8, latency=0.7e-6)
DEVICES = {"H200": H200, "A100, 80 GB": A100, "RTX 4090": RTX_4090}
UNIT, STEP = 300 / 64, 241 / 128  # instructions for each weight of bitmask rows: of the loop over units, and of a step around it
STORED = 231 / 64  # instructions for each stored value of 2:4 rows
ONE_STORED = 311 / 32  # likewise of 1:4 rows
FOUR_BITS = 414 / 64  # likewise of values of 4 bits, of a step with its copies; 70 / 16 of a block by itself
TRITON = {"bitmask": 10.6, "2:4": 17.7 / 2, "1:4": 17.7 / 4}  # instructions of a thread for each weight, zeros included


@dataclass(frozen=True)
class Estimate:
    """The seconds of a product that each bound takes, and those of the whole."""

    memory: float
    issue: float
    shared: float
    latency: float

    @property
    def seconds(self) -> float:
        """The slowest bound, after the latency of what has to arrive first."""
        return max(self.memory, self.issue, self.shared) + self.latency

    @property
    def bound(self) -> str:
        """Name of the slowest bound."""
        return max(("memory", "issue", "shared"), key=lambda name: getattr(self, name))


def dense(rows: int, columns: int, device: Device = H200) -> Estimate:
    return Estimate(2 * rows * columns / device.bytes_a_second, 0.0, 0.0, device.latency)


def bitmask(rows: int, columns: int, sparsity: float, device: Device = H200) -> Estimate:
    """Return the estimate of bitmask rows. The bits arrive before it is known where the values begin: two latencies."""
    weights = rows * columns
    stored = 2 * weights * (1 - sparsity)
    # Of 1024 weights: 32 gathers, 4 reads of records and x, and the copy.
    waves = weights / 1024 * (32 * conflicts(1 - sparsity) + 4) + 1.125 * stored / 128
    return _estimate(stored + weights / 8, weights * (UNIT + STEP), waves, 2 * device.latency, device)


def two_of_four(rows: int, columns: int, device: Device = H200) -> Estimate:
    weights = rows * columns
    packed = weights * 9 / 8
    return _estimate(packed, weights / 2 * STORED, 2 * packed / 128, device.latency, device)


def one_of_four(rows: int, columns: int, device: Device = H200) -> Estimate:
    weights = rows * columns
    packed = weights * 9 / 16
    # Of 1024 stored values: 16 reads of slots and 4 of codes, 32 matrices of x, and the copies, of 2304 bytes and of x.
    waves = weights / 4 / 1024 * (20 + 32 + 2304 / 128 + 4)
    return _estimate(packed, weights / 4 * ONE_STORED, waves, device.latency, device)


def streams(rows: int, columns: int, sparsity: float, device: Device = H200) -> Estimate:
    """Return the estimate of a layout that is not written: lanes have slots of their own, each in one bank, and begin where a table says.

    A warp has 16 rows and 1024 columns, so that a lane has 256 of two rows. All 32 lanes have as many slots as the longest of the 64 rows.
    """
    weights, density = rows * columns, 1 - sparsity
    stored = 2 * weights * longest(256, density, 64) / 256
    waves = weights / 1024 * 36 + stored / 128
    return _estimate(stored + weights / 8, weights * (UNIT + 0.5), waves, device.latency, device)


def four_bits(rows: int, columns: int, device: Device = H200) -> Estimate:
    """Return the estimate of 2:4 rows with values of 4 bits. A kernel before it rounds the token: two latencies."""
    weights = rows * columns
    packed = weights * 13 / 32
    return _estimate(packed, weights / 2 * FOUR_BITS, 2 * packed / 128, 2 * device.latency, device)


def _estimate(packed: float, instructions: float, waves: float, latency: float, device: Device) -> Estimate:
    cycles = device.multiprocessors * device.cycles_a_second
    return Estimate(packed / device.bytes_a_second, instructions / LANES / 4 / cycles / device.issued, waves / cycles, latency)


@functools.cache
def conflicts(density: float, trials: int = 1000) -> float:
    """Return the cycles that a warp's read takes if each lane reads with probability `density` from a random bank."""
    draw, total = random.Random(0), 0
    for _ in range(trials):
        banks = [0] * BANKS
        for _ in range(LANES):
            if draw.random() < density:
                banks[draw.randrange(BANKS)] += 1
        total += max(banks)
    return total / trials


@functools.cache
def longest(columns: int, density: float, rows: int, trials: int = 25) -> float:
    """Return the mean of the most non-zeros that a row has, of `rows` with random non-zeros."""
    draw = random.Random(0)
    counts = [[sum(draw.random() < density for _ in range(columns)) for _ in range(rows)] for _ in range(trials)]
    return sum(map(max, counts)) / trials


def page() -> str:
    """Return docs/decoding.md."""
    lines = [HEAD]
    for rows, columns in SHAPES:
        whole = dense(rows, columns)
        shape = f"{rows} x {columns}"
        lines.append(f"| {shape} | dense | {_us(whole.memory)} | | | {_us(whole.seconds)} | 1 | memory |")
        for sparsity in SPARSITIES:
            lines.append(_row(shape, f"bitmask, {sparsity:.0%}", bitmask(rows, columns, sparsity), whole))
        lines.append(_row(shape, "2:4", two_of_four(rows, columns), whole))
        lines.append(_row(shape, "1:4", one_of_four(rows, columns), whole))
        lines.append(_row(shape, "2:4, 4 bits", four_bits(rows, columns), whole))
    lines.append(OTHER_DEVICES)
    rows, columns = SHAPES[1]
    for name, device in DEVICES.items():
        whole = dense(rows, columns, device)
        for sparsity in SPARSITIES:
            lines.append(_row(name, f"bitmask, {sparsity:.0%}", bitmask(rows, columns, sparsity, device), whole))
            lines.append(_row(name, f"streams, {sparsity:.0%}", streams(rows, columns, sparsity, device), whole))
    return "\n".join(lines) + "\n" + TAIL


def _row(shape: str, what: str, found: Estimate, whole: Estimate) -> str:
    bounds = " | ".join(_us(seconds) for seconds in (found.memory, found.issue, found.shared, found.seconds))
    return f"| {shape} | {what} | {bounds} | {whole.seconds / found.seconds:.2f} | {found.bound} |"


def _us(seconds: float) -> str:
    return f"{1e6 * seconds:.1f}"


HEAD = f"""\
<!-- Written by python -m bench.decoding; do not edit. -->

# One token on a GPU, on paper

**This page is a model, not a measurement: the kernels have not run on a GPU.** `bench/decoding.py` counts bytes, instructions and reads of
shared memory, and divides them by rates of an H200: 4.8 TB/s (NVIDIA's data sheet), of which a copy is taken to reach 90 %; 132
multiprocessors at 1.83 GHz, from 989 TFLOP/s in bfloat16; 80 % of the issue slots; 0.7 us until the first bytes arrive, twice for a
bitmask, whose bits say where the values are. Weights are bfloat16. Times are in microseconds; the last but one column is dense / packed.

The machine code for sm_90 has {UNIT:.1f} instructions for each weight of a bitmask, zeros included, and {STEP:.1f} around that; the Triton kernel
has {TRITON["bitmask"]:.1f}. Of 2:4 it has {STORED:.1f} for each stored value, of 1:4 {ONE_STORED:.1f}, and the Triton kernel {2 * TRITON["2:4"]:.1f}. With values of 4 bits
it has {FOUR_BITS:.1f}; a short kernel before it rounds the token to 8 bits.

| weight | format | memory | issue | shared memory | total | against dense | bound by |
|---|---|---|---|---|---|---|---|"""

OTHER_DEVICES = """
## What bounds a bitmask on other devices

11008 x 4096. An A100 has 2.039 TB/s, 108 multiprocessors and 1.41 GHz, an RTX 4090 1.008 TB/s, 128 and 2.52 GHz, by NVIDIA's data sheets.
*Streams* are a layout that is not written: each lane has slots of its own, 32 lanes side by side, so that no two reads meet in a bank and no
bits are counted. All lanes are filled up to the longest.

| device | format | memory | issue | shared memory | total | against dense | bound by |
|---|---|---|---|---|---|---|---|"""

TAIL = """
* A bitmask is bound by shared memory: each value is a read of two bytes at a place that follows from the bits. Where lanes meet in a
  bank, the read takes another cycle.
* At 50 % that is 9 instructions for each stored value. Below 4 no kernel gets with this layout: reading a value, moving on, clearing what
  has no value and joining two halves are 3 instructions for each weight, 6 for each value at 50 %.
* The H200 has so many bytes a second that reads of shared memory bound a bitmask. On an A100 they are about level with its bytes, and on
  an RTX 4090 its bytes are four times as long. Streams have some 15 % more bytes, so that they would be slower there. They would
  be a second layout for one kind of GPU, made at load.
* 2:4 weights have no such reads: the sparse tensor cores take values and positions as they are stored.
* Up to 8 tokens take the same instructions. For 9 to 16 the columns of `x` are read again by every tile of 16 rows, as many bytes
  from the second-level cache as a dense weight has.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
