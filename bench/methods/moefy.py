"""Perplexity of SmolLM2-135M with its feed-forward networks split into experts: `python -m bench.methods --wikitext FOLDER --only moefy`.

The number of active experts is changed on the finished mixture. `best` routes each token to the experts whose outputs are the longest,
which needs all outputs and so is only a bound for a router; `random` routes to experts drawn at random.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import sparsekern
from sparsekern.models.expert_layouts import find_experts
from sparsekern.models.experts import Experts

from .. import smollm2
from . import Unavailable, gradual, shown, store

NAME = "moefy"
EXPERTS = 16
SAMPLES, LENGTH = 16, 256
WINDOWS, WINDOW = 4, 512
SHARES = (4, 8, 12, 16)  # active parts of the 16
ROUTERS = ("learned", "best", "random")
SHARED = (1, 0)


def run(wikitext: Path | None, quick: bool) -> str:
    if wikitext is None:
        raise Unavailable("it needs --wikitext")
    calibration = gradual.text(wikitext, 4 if quick else SAMPLES, LENGTH)
    evaluation = gradual.held_out(wikitext, 1 if quick else WINDOWS, WINDOW)
    figures: dict[str, object] = {"dense": sparsekern.perplexity(smollm2.dense_model(), evaluation, WINDOW)}
    for shared in SHARED[:1] if quick else SHARED:
        mixture = sparsekern.moefy(smollm2.dense_model(), EXPERTS, 3, shared=shared, calibration=calibration, progress=False)
        for router in ROUTERS:
            for active in SHARES[:-1] if router != "learned" else SHARES:
                with_router(mixture, router, active - shared)
                perplexity = sparsekern.perplexity(mixture, evaluation, WINDOW)
                figures[f"{shared} shared, {active} active, {router}"] = perplexity
                if not quick:
                    store(NAME, figures)
    return section(figures)


def with_router(mixture: torch.nn.Module, router: str, top_k: int) -> None:
    """Make every layer of `mixture` choose `top_k` experts by `router`."""
    generator = torch.Generator().manual_seed(0)
    for experts in find_experts(mixture):
        gate: Any = mixture.get_submodule(f"{experts.name.rpartition('.')[0]}.gate")
        gate.top_k = top_k
        vars(gate).pop("forward", None)
        if router != "learned":
            gate.forward = best(experts, top_k) if router == "best" else random(experts.count, top_k, generator)


def best(experts: Experts, top_k: int) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1])
        lengths = torch.stack([experts.output(expert, rows).norm(dim=1) for expert in range(experts.count)], 1)
        chosen = lengths.topk(top_k).indices
        return lengths, torch.ones_like(chosen, dtype=x.dtype), chosen

    return forward


def random(count: int, top_k: int, generator: torch.Generator) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    def forward(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = torch.rand(x.numel() // x.shape[-1], count, generator=generator)
        chosen = scores.topk(top_k).indices
        return scores, torch.ones_like(chosen, dtype=x.dtype), chosen

    return forward


def section(figures: dict[str, object]) -> str:
    head = [f"{active / EXPERTS:.0%}" for active in SHARES]
    lines = [
        "## A mixture of experts made of a dense model (MoEfication)",
        "",
        f"SmolLM2-135M-Instruct (float32) by `sparsekern.moefy`, {EXPERTS} parts in each feed-forward network, nothing trained. Calibration",
        f"{SAMPLES} x {LENGTH} tokens of WikiText-2 `valid`, drawn with seed 0; perplexity of the first {WINDOWS} x {WINDOW} tokens of `test`",
        f"(dense {shown(figures.get('dense'), '.2f')}), by the share of neurons that is active for a token, shared ones included. *Best* routes to the experts of",
        "the longest outputs, which no router knows beforehand; *random* draws them.",
        "",
        "| | " + " | ".join(f"{share} active" for share in head) + " |",
        "|---|" + "---|" * len(head),
    ]
    for shared in SHARED:
        for router in ROUTERS:
            if not any(name.startswith(f"{shared} shared") for name in figures):
                continue
            cells = [figures.get(f"{shared} shared, {active} active, {router}") for active in SHARES]
            values = [shown(value, ".2f" if value is None or value < 1e4 else ".1e") for value in cells]
            values = [
                "" if router != "learned" and active == EXPERTS else value for active, value in zip(SHARES, values, strict=True)
            ]
            lines.append(f"| {shared} of {EXPERTS} shared, {router} | " + " | ".join(values) + " |")
    return "\n".join(lines) + "\n"
