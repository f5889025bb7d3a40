"""How much longer the public SparseLLM takes than ours on one feed-forward network."""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch.nn import functional as F

from baselines.sparsellm import ROUNDS, public_sparsellm
from sparsekern import SparseLLM
from sparsekern.data import calibration_ids
from sparsekern.methods.network import FeedForwardProblem, Layer
from sparsekern.methods.statistics import Gram
from sparsekern.pattern import Unstructured
from sparsekern.pruning.blockwise.feed_forward import TILE, MappedRows

from .. import smollm2
from ..inputs import correlated_tokens

BLOCK, SPARSITY, SAMPLES, LENGTH = 14, 0.7, 8, 512
# Inputs, features and tokens: LLaMA-7B's shape with as few tokens as the public program needs to end within minutes, and a quarter of
# it with more tokens than features, as a calibration has.
WIDE = {"one wide network": (4096, 11008, 1024), "one network of a quarter": (1024, 2752, 8192)}


def our_sparsellm(x: torch.Tensor, up: torch.Tensor, gate: torch.Tensor, down: torch.Tensor, sparsity: float) -> list[torch.Tensor]:
    """Prune by ours in the same number of rounds, with the statistics that the pipeline would gather."""
    tokens, cpu = len(x), torch.device("cpu")
    tiles = [slice(start, min(start + TILE, tokens)) for start in range(0, tokens, TILE)]
    inputs, hidden, rows = Gram(len(x.T), cpu), Gram(len(up), cpu), MappedRows(tokens, len(x.T), x.dtype, cpu)
    rows.write(slice(None), x)
    for tile in tiles:
        inputs.add(x[tile], None)
        hidden.add(F.silu(x[tile] @ gate.T) * (x[tile] @ up.T), None)
    layers = [Layer(weight, None, Unstructured(sparsity)) for weight in (up, gate, down)]
    problem = FeedForwardProblem(
        *layers, "silu", inputs, hidden, rows, lambda width: MappedRows(tokens, width, x.dtype, cpu), lambda sums_of: sums_of(tiles)
    )
    solution = SparseLLM(iterations=ROUNDS, keep="last").solve_feed_forward(problem)
    return [solution.up, solution.gate, solution.down]


@torch.no_grad()
def measure(wikitext: Path, quick: bool = False) -> dict[str, object]:
    """Measure a network of SmolLM2-135M: seconds of both in one run on the same inputs, and their output errors."""
    model, seen = smollm2.dense_model(), []
    network = model.model.layers[BLOCK].mlp
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten(0, 1)))
    ids = calibration_ids(wikitext / "valid.txt", smollm2.tokenizer(), samples=1 if quick else SAMPLES, length=LENGTH, seed=0)
    for sample in ids:
        model(sample[None])
    weights = [getattr(network, name).weight.detach() for name in ("up_proj", "gate_proj", "down_proj")]
    return {"one network": compare(torch.cat(seen), weights)}


@torch.no_grad()
def measure_wide(name: str) -> dict[str, object]:
    """Measure the same with random weights and correlated tokens, in a shape of `WIDE`."""
    inputs, features, tokens = WIDE[name]
    generator = torch.Generator().manual_seed(0)
    x = correlated_tokens(generator, tokens, inputs)
    shapes = ((features, inputs), (features, inputs), (inputs, features))
    return {name: compare(x, [torch.randn(shape, generator=generator) / shape[1] ** 0.5 for shape in shapes])}


def compare(x: torch.Tensor, weights: list[torch.Tensor]) -> dict[str, object]:
    y = _output(x, weights)
    figures: dict[str, object] = {"shape": [weights[0].shape[1], len(weights[0]), len(weights[2])], "tokens": len(x)}
    our_sparsellm(
        x[:LENGTH, :LENGTH], *(weight[:LENGTH, :LENGTH] for weight in weights), SPARSITY
    )  # a first call loads and allocates
    for name, solve in (("sparsekern", our_sparsellm), ("public", public_sparsellm)):
        start = time.perf_counter()
        solved = solve(x, *weights, SPARSITY)
        figures[f"{name}, seconds"] = time.perf_counter() - start
        figures[f"{name}, output_error"] = float((_output(x, solved) - y).square().sum() / y.square().sum())
        print(figures, flush=True)
    return figures


def _output(x: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
    up, gate, down = weights
    return (F.silu(x @ gate.T) * (x @ up.T)) @ down.T
