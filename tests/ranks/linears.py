"""A few linears that the ranks of a pool solve together."""

from __future__ import annotations

from types import SimpleNamespace
from unittest import mock

import torch
from torch import nn

from sparsekern import ops
from sparsekern.methods import ALPS, LinearMethod
from sparsekern.methods.statistics import Gram
from sparsekern.models import Linear, find_linears
from sparsekern.pattern import parse_pattern
from sparsekern.pruning.blockwise import messages
from sparsekern.pruning.blockwise.sharing import SharedSolve
from sparsekern.pruning.blockwise.solving import Job, Solved, Solver
from sparsekern.pruning.progress import Clock
from sparsekern.ranks import World

SHAPES = {"q": (200, 32), "k": (70, 32), "o": (64, 48), "down": (150, 64)}  # of rows and features; q and k have the same inputs


def linears(dtype: torch.dtype) -> list[Linear]:
    generator = torch.Generator().manual_seed(3)
    block = nn.Module()
    for name, (rows, features) in SHAPES.items():
        linear = nn.Linear(features, rows, bias=False, dtype=dtype)
        linear.weight.data = torch.randn(rows, features, generator=generator).to(dtype)
        linear.weight.data[rows // 2, ::3] = 0
        block.add_module(name, linear)
    return find_linears(block)


def jobs_of(found: list[Linear]) -> list[Job]:
    grams: dict[int, Gram] = {}
    for linear in found:
        if linear.features not in grams:
            own = grams[linear.features] = Gram(linear.features, torch.device("cpu"))
            x = torch.randn(90, linear.features, generator=torch.Generator().manual_seed(linear.features))
            x[:, 5] = 0  # a dead feature
            own.add(x @ torch.randn(linear.features, linear.features, generator=torch.Generator().manual_seed(1)).tril(), None)
    return [Job(linear, grams[linear.features], grams[linear.features]) for linear in found]


def solver_of(method: LinearMethod, pattern: str, found: list[Linear]) -> Solver:
    plan = SimpleNamespace(patterns={linear.name: parse_pattern(pattern) for linear in found})
    return Solver(method, plan, 0, Clock(torch.device("cpu")))


def solve_alone(method: LinearMethod, pattern: str, dtype: torch.dtype) -> Solved:
    """Solve each linear as a whole, in this process."""
    found, result = linears(dtype), Solved()
    solver = solver_of(method, pattern, found)
    for job in jobs_of(found):
        solver.solve(job, result)
    return result


def solve_shared(rank: int, method: LinearMethod, pattern: str, dtype: torch.dtype, bad_on: int | None = None):
    """Return the new weights, the layers' errors, and the bytes that this rank has sent."""
    found, before = linears(dtype), World.current().sent
    weights, errors, _ = shared(found, method, pattern, Solved(), bad=rank == bad_on)
    return weights, errors, World.current().sent - before


def solve_in_place(rank: int, method: LinearMethod, pattern: str, dtype: torch.dtype):
    """Return the new weights of the model, the layers' errors, and what `Solved.lost` counts. Messages hold a few rows each."""
    found = linears(dtype)
    with mock.patch.object(messages, "MESSAGE", 1000):
        weights, errors, lost = shared(found, method, pattern, Solved(in_place=True))
    assert all(weights[linear.name].data_ptr() == linear.weight.data_ptr() for linear in found)
    return weights, errors, lost


def shared(found: list[Linear], method: LinearMethod, pattern: str, result: Solved, bad: bool = False):
    world, jobs = World.current(), jobs_of(found)
    for job in jobs if bad else ():
        job.inputs.gram.fill_(float("nan"))
    with world.together():
        SharedSolve(solver_of(method, pattern, found), world, 8, jobs, in_place=result.in_place).solve(result)
    assert all(layer.seconds > 0 for layer in result.layers.values())
    bits = torch.int32 if found[0].weight.dtype == torch.float32 else torch.int16
    weights = {name: weight.view(bits) for name, weight in result.weights.items()}
    return weights, {name: layer.error for name, layer in result.layers.items()}, result.lost


def fail_together(rank: int, victim: int):
    """Solve by ALPS on four ranks, of which one fails in the rows that it solves of a linear of all."""
    found, step = linears(torch.float32), ops.admm_step_

    def failing(*args, **options):
        rows, features = args[0].shape
        if rank == victim and features == SHAPES["down"][1] and rows < SHAPES["down"][0]:
            raise ValueError("dual: a bug")
        return step(*args, **options)

    world = World.current()
    with mock.patch.object(ops, "admm_step_", failing), world.together():
        SharedSolve(solver_of(ALPS(), "2:4", found), world, 8, jobs_of(found)).solve(Solved())
