"""A model on paper: how long pruning takes on several GPUs or processes, what it needs, and what bounds it. Nothing here is measured.

`python -m bench.scaling` writes docs/scaling.md. Work is counted in FLOPs and bytes, and divided by the rates of a machine. What each
process solves follows from `dealing.deal`, as in a run.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsekern import SparseGPT
from sparsekern.pruning.blockwise.dealing import PARTS_OF_LEAF, SharedWork, deal, tiles_of

PAGE = Path(__file__).resolve().parent.parent / "docs" / "scaling.md"
GIB = 2**30


@dataclass(frozen=True)
class Inputs:
    """Linears that have the same inputs: the number of features, and the rows of each linear."""

    features: int
    rows: tuple[int, ...]


@dataclass(frozen=True)
class Model:
    """The shapes of a model.

    Attributes:
        blocks: number of blocks.
        hidden: width of the hidden states.
        inputs: the linears of a block that every token goes through.
        experts: number of routed experts of a block.
        top_k: experts of a token.
        of_expert: the linears of one expert.
        vocabulary: tokens that have an embedding; embeddings and head are not tied.
        itemsize: bytes of a weight.
    """

    name: str
    blocks: int
    hidden: int
    inputs: tuple[Inputs, ...]
    experts: int = 0
    top_k: int = 0
    of_expert: tuple[Inputs, ...] = ()
    vocabulary: int = 0
    itemsize: int = 2

    @property
    def block_weights(self) -> float:
        """Weights of a block."""
        return _weights(self.inputs) + self.experts * _weights(self.of_expert)

    @property
    def used_weights(self) -> float:
        """Weights of a block that one token is multiplied by."""
        return _weights(self.inputs) + self.top_k * _weights(self.of_expert)


@dataclass(frozen=True)
class Machine:
    """The rates of one process and of what connects them, in FLOPs and bytes a second.

    Attributes:
        forward: products of a forward.
        gram: Gram matrices.
        solve: factors and sweeps.
        near: sending to another process of the same node.
        far: sending to one of another node.
        disk: reading the model, shared by the processes of a node.
        node: processes of a node.
    """

    name: str
    forward: float
    gram: float
    solve: float
    near: float
    far: float
    disk: float
    node: int


LLAMA_70B = Model(
    "Llama 70B",
    80,
    8192,
    (Inputs(8192, (8192, 1024, 1024)), Inputs(8192, (8192,)), Inputs(8192, (28672, 28672)), Inputs(28672, (8192,))),
    vocabulary=128256,
)
DEEPSEEK = Model(
    "DeepSeek-V3 671B",
    61,  # three of them are dense; counted as mixtures
    7168,
    (
        *(Inputs(7168, (1536, 576)), Inputs(1536, (24576,)), Inputs(512, (32768,)), Inputs(16384, (7168,))),
        *(Inputs(7168, (2048, 2048)), Inputs(2048, (7168,))),  # the shared expert
    ),
    256,
    8,
    (Inputs(7168, (2048, 2048)), Inputs(2048, (7168,))),
    129280,
)
SMOLLM2 = Model(
    "SmolLM2 135M",
    30,
    576,
    (Inputs(576, (576, 192, 192)), Inputs(576, (576,)), Inputs(576, (1536, 1536)), Inputs(1536, (576,))),
    vocabulary=49152,
    itemsize=4,
)
# Data sheet of the H100 SXM: 989 TFLOP/s in bfloat16, 67 in float32, NVLink 450 GB/s each way; DGX H100: 50 GB/s InfiniBand a GPU.
# The shares of these that are reached are assumptions: 40 % of bfloat16, 25 % of float32, 60 % of a link.
H100 = Machine("H100 SXM", 0.4 * 989e12, 0.4 * 989e12, 0.25 * 67e12, 0.6 * 450e9, 0.6 * 50e9, 5e9, 8)
# bench/results/amd-epyc-cpu.json: factor and sweep of 8 experts at 104 GFLOP/s on two threads, which is 60 % of sgemm.
EPYC = Machine("AMD EPYC, one thread a process", 87e9, 87e9, 52e9, 1e9, 1e9, 1e9, 2)


@dataclass(frozen=True)
class Estimate:
    """Seconds of one block by phase, and what a process holds and sends."""

    forward: float
    gram: float
    solve: float
    exchange: float
    disk: float
    sent: float
    memory: float

    @property
    def block(self) -> float:
        """Seconds of a block, whose reading and writing run beside the computing."""
        return max(self.forward + self.gram + self.solve + self.exchange, self.disk)

    @property
    def bound(self) -> str:
        """The phase that takes longest."""
        phases = {"forward": self.forward, "Gram matrices": self.gram, "solving": self.solve, "exchange": self.exchange}
        if self.disk >= self.block:
            return "reading and writing"
        return max(phases, key=lambda name: phases[name])


def estimate(model: Model, machine: Machine, processes: int, tokens: int) -> Estimate:
    """Return the estimate for SparseGPT 2:4."""
    leaves = max(8, processes)
    routed = tokens * model.top_k / max(model.experts, 1)
    gram = sum(tokens * part.features**2 for part in model.inputs)
    gram += model.experts * sum(routed * part.features**2 for part in model.of_expert)
    works = [_work(part, leaves) for part in model.inputs]
    shared = 2 * deal(works, processes).longest  # two FLOPs a multiply-add
    experts = 0.0
    if model.experts:
        packs = min(model.experts, PARTS_OF_LEAF * leaves)
        rounds = -(-packs // processes)  # packs of equal work; the last round may be short
        experts = 2 * rounds * model.experts / packs * sum(_work(part, leaves).total for part in model.of_expert)
    near, far = sent_by(model, machine, processes, tokens)
    stored = model.block_weights * model.itemsize
    return Estimate(
        forward=2 * 2 * model.used_weights * tokens / processes / machine.forward,  # dense, and once more pruned
        gram=gram / processes / machine.gram,
        solve=(shared + experts) / machine.solve,
        exchange=near / machine.near + far / machine.far,
        disk=2 * stored / machine.disk,  # read by each node, and written by one process
        sent=near + far,
        memory=_memory(model, processes, tokens, leaves),
    )


def _weights(inputs: tuple[Inputs, ...]) -> float:
    return sum(part.features * sum(part.rows) for part in inputs)


def _work(part: Inputs, leaves: int) -> SharedWork:
    method, pieces, factor = SparseGPT(), [], 0.0
    for rows in part.rows:
        work = method.work(rows, part.features)
        factor = work.shared
        pieces += [work.own * (tile.stop - tile.start) / rows for tile in tiles_of(rows, leaves)]
    return SharedWork(factor, tuple(pieces))


def sent_by(model: Model, machine: Machine, processes: int, tokens: int) -> tuple[float, float]:
    """Return the bytes that a process sends for a block to processes of its node, and to others.

    A sum over `P` processes halves what it sends with each step, to the nearest process first, and the halves come back. Factors, new
    weights and the tokens of experts go from one process to all or to one other.
    """
    triangles = sum(4 * part.features**2 / 2 for part in model.inputs)
    near = far = 0.0
    step, part = 1, 0.5
    while step < processes:
        both = 2 * part * triangles
        near, far = (near + both, far) if step < machine.node else (near, far + both)
        step, part = 2 * step, part / 2
    if processes > 1:
        share_far = max(processes - machine.node, 0) / (processes - 1)
        moved = triangles + model.block_weights * model.itemsize  # each process receives them once
        moved += tokens / processes * model.top_k * model.hidden * model.itemsize * (processes - 1) / processes
        near, far = near + moved * (1 - share_far), far + moved * share_far
    return near, far


def _memory(model: Model, processes: int, tokens: int, leaves: int) -> float:
    """Return the bytes of a process: embeddings and head, two blocks, hidden states, and the Gram matrices of a block.

    Of a sum, log2(leaves / processes) + 2 parts are held: those of the tree, and the current leaf. A factor is as large as one of them.
    """
    parts = (leaves // processes).bit_length() + 1
    grams = sum(4 * part.features**2 for part in model.inputs) * (parts + 1)
    outside = 2 * model.vocabulary * model.hidden * model.itemsize
    hidden = tokens / processes * model.hidden * model.itemsize
    received = tokens * model.top_k / (PARTS_OF_LEAF * leaves) * model.hidden * model.itemsize  # of one pack of experts
    return outside + 2 * model.block_weights * model.itemsize + hidden + grams + received


def _row(model: Model, machine: Machine, processes: int, tokens: int) -> str:
    found = estimate(model, machine, processes, tokens)
    seconds = [found.forward, found.gram, found.solve, found.exchange, found.disk]
    total = found.block * model.blocks
    time = f"{total / 3600:.1f} h" if total > 7200 else f"{total / 60:.0f} min" if total > 120 else f"{total:.0f} s"
    cells = [model.name, str(processes), *(f"{value:.2g}" for value in seconds), time, f"{found.sent / 1e9:.2g}"]
    return f"| {' | '.join([*cells, f'{found.memory / GIB:.2g}', found.bound])} |"


def page() -> str:
    """Return docs/scaling.md."""
    head = (
        "| model | processes | forward | Gram | solve | exchange | disk | whole run | GB sent | GiB held | bound by |\n"
        "|---|---|---|---|---|---|---|---|---|---|---|"
    )
    tokens = 128 * 2048
    rows = [_row(model, H100, processes, tokens) for model in (LLAMA_70B, DEEPSEEK) for processes in (1, 2, 4, 8, 64)]
    here = [_row(SMOLLM2, EPYC, processes, 64 * 512) for processes in (1, 2)]
    one, two = (estimate(SMOLLM2, EPYC, processes, 64 * 512).block for processes in (1, 2))
    faster = estimate(LLAMA_70B, H100, 1, tokens).solve / estimate(LLAMA_70B, H100, 8, tokens).solve
    return f"""<!-- Written by python -m bench.scaling; do not edit. -->

# How it scales, on paper

**This page is a model, not a measurement.** `bench/scaling.py` counts the FLOPs and bytes of a block and divides them by rates. What each
process solves is dealt as in a run. Figures are for SparseGPT 2:4 of a streamed model in bfloat16.

## GPUs

{H100.name}: 989 TFLOP/s in bfloat16, 67 in float32, 450 GB/s of NVLink each way (NVIDIA's data sheet), 50 GB/s of InfiniBand for each GPU
between nodes of eight (DGX H100). Assumed: 40 % of bfloat16 in forwards and Gram matrices, 25 % of float32 in factors and sweeps, 60 % of
each link, and 5 GB/s to and from a disk. Calibration: 128 x 2048 tokens. Seconds are those of one block.

{head}
{chr(10).join(rows)}

* *Disk* is reading the block and writing it, beside the computing; the slower of the two decides. One process writes.
* *Sent* is what a process sends for one block; *held* includes embeddings and head, two blocks, hidden states and statistics.
* 64 processes need 64 leaves (`--leaves 64`). Equal leaves give equal bits, and 8 do not give those of 64.
* The factor of the widest Gram matrix is one process's work. For Llama 70B's down projection it takes as much as the sweep of all rows, so
  that eight processes solve a block only {faster:.1f} times as fast as one. All else is divided evenly, also the many small factors of a
  mixture.
* The attention's products of queries and keys, launches of kernels and waiting for one another are left out.

## Two processes here

{EPYC.name}: 87 GFLOP/s in products and 52 in factors and sweeps, half of what [two threads](results-cpu-avx2.md)
reach; 1 GB/s between processes is assumed. SmolLM2-135M in float32, 64 x 512 tokens.

{head}
{chr(10).join(here)}

Two processes are {one / two:.2f} times as fast as one by this count, if each has a core of its own and memory is not the limit.
"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
