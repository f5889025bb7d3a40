"""Work of the products with packed experts, `bitmask_experts_linear` and `nm_experts_linear`: which program multiplies what.

A *pair* is a token and one of its experts. Pairs are numbered token by token, as rows of the result. A *job* is at most `width` pairs of
one expert: what one program multiplies by its rows of the weight. All jobs of a call are one launch.

* Pairs of one token are a job each. Its experts differ, so that nothing could be shared.
* More pairs are grouped by a kernel of one program, on the device. The host cannot know how many jobs there are without waiting. It
  launches as many as there can be: one for each expert, and one more for each `width` pairs. Programs without a job end at once.

Grouping counts the pairs of each expert and then ranks each pair among those of its expert, by comparing it with all experts. That is
`pairs * experts` comparisons twice, on one multiprocessor. By instruction counts they take 2 us for 16 tokens with 8 of 64 experts, and a
fifth of the product for a prompt of 2048 tokens. The order is stable, without atomics, so that every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand
from ._packed_linear import COLUMNS, MOST_TOKENS

COMPARED = 8192  # pairs times experts that the grouping kernel compares at a time: 32 a thread
GROUP_WARPS = 8
MANY = 4 * MOST_TOKENS  # pairs of a job if experts have many
MANY_COLUMNS = COLUMNS // 4  # columns expanded at a time for them: registers hold the factors of all pairs
MANY_FROM = MANY // 2  # pairs of an expert, on the average
MOST_EXPERTS = 1023  # with which the grouping kernel compares 8 pairs at a time


class Jobs(NamedTuple):
    """The jobs of a call.

    Attributes:
        ids: `[pairs]` int64, the expert of each pair.
        places: int32, what `group` stores; None if each pair is a job.
        most: the most jobs there can be; so many are launched.
        width: the most pairs of a job.
    """

    ids: torch.Tensor
    places: torch.Tensor | None
    most: int
    width: int


def width_of(experts: torch.Tensor, count: int, dtype: torch.dtype) -> int:
    """Return the most pairs of a job of the tensor cores: one pair alone if there is one token, else one tile of them, or several.

    float32 has no registers for several.
    """
    if len(experts) == 1:
        return 1
    return MANY if dtype != torch.float32 and experts.numel() >= MANY_FROM * count else MOST_TOKENS


def columns_of(width: int) -> int:
    """Return the columns that a warp expands at a time for a job of `width` pairs."""
    return MANY_COLUMNS if width == MANY else COLUMNS


def jobs_of(experts: torch.Tensor, count: int, width: int) -> Jobs:
    """Return the jobs of at most `width` pairs each, for `count` experts; a width of 1 makes each pair a job.

    Args:
        experts: `[tokens, choices]` int64, with at least one pair.
        count: number of experts, at most `MOST_EXPERTS`. Pairs with other ids are jobs too.
        width: the most pairs of a job.
    """
    ids = experts.reshape(-1).contiguous()
    pairs = len(ids)
    if width == 1:
        return Jobs(ids, None, pairs, 1)
    most = min(pairs, min(pairs, count + 1) + pairs // width)
    places = torch.empty(1 + pairs + 3 * most, dtype=torch.int32, device=ids.device)
    group[(1,)](ids, places, pairs, count, **_constants(count, width), num_warps=GROUP_WARPS)
    return Jobs(ids, places, most, width)


def check_experts(x: torch.Tensor, experts: torch.Tensor, count: int) -> None:
    """Raise `ValueError` unless `experts` can name some of `count` experts for each row of the matrix `x`."""
    if x.dim() != 2 or experts.dim() != 2:
        raise ValueError(f"x, experts: expected 2 dimensions each, got shapes {tuple(x.shape)} and {tuple(experts.shape)}")
    check_operand("experts", experts, x, (len(x), experts.shape[1]), (torch.int64,))
    if not count and experts.numel():
        raise ValueError("experts: expected none, since there are no experts")


@triton.jit
def experts_of(ids, pair, inside, count, EXPERTS: tl.constexpr):
    """Return where each pair has its expert, `[pairs, EXPERTS]`; ids of no expert stand for expert `count`."""
    expert = tl.load(ids + pair, mask=inside, other=0)
    expert = tl.where((expert < 0) | (expert >= count), count, expert).to(tl.int32)
    return ((expert[:, None] == tl.arange(0, EXPERTS)[None, :]) & inside[:, None]).to(tl.int32)


@triton.jit
def own(values, here):
    """Return the value that each pair has of `values`, one for each expert or for each pair and expert."""
    return tl.sum(here * values, axis=1)


@triton.jit(do_not_specialize=["pairs", "count"])
def group(ids, places, pairs, count, WIDTH: tl.constexpr, CHUNK: tl.constexpr, EXPERTS: tl.constexpr):
    """Store the number of jobs, the pairs in the order of their experts, and of each job: expert, place of its first pair, pairs."""
    lane = tl.arange(0, CHUNK)
    held = tl.zeros([EXPERTS], tl.int32)
    for begin in range(0, pairs, CHUNK):
        held += tl.sum(experts_of(ids, begin + lane, begin + lane < pairs, count, EXPERTS), axis=0)
    jobs = (held + WIDTH - 1) // WIDTH
    first_pair, first_job = tl.cumsum(held, axis=0) - held, tl.cumsum(jobs, axis=0) - jobs
    tl.store(places, tl.sum(jobs, axis=0))
    seen = tl.zeros([EXPERTS], tl.int32)
    for begin in range(0, pairs, CHUNK):
        pair = begin + lane
        inside = pair < pairs
        here = experts_of(ids, pair, inside, count, EXPERTS)
        rank = own(seen[None, :] + tl.cumsum(here, axis=0) - here, here)
        seen += tl.sum(here, axis=0)
        place = own(first_pair[None, :], here) + rank
        tl.store(places + 1 + place, pair, mask=inside)
        job = places + 1 + pairs + 3 * (own(first_job[None, :], here) + rank // WIDTH)
        first = inside & (rank % WIDTH == 0)
        tl.store(job, own(tl.arange(0, EXPERTS)[None, :], here), mask=first)
        tl.store(job + 1, place, mask=first)
        tl.store(job + 2, tl.minimum(own(held[None, :], here) - rank, WIDTH), mask=first)


@triton.jit
def has_job(places, job):
    """Return whether there is a job of this number."""
    if places is None:
        return job >= 0
    else:
        return job < tl.load(places)


@triton.jit
def job_of(ids, places, job, pairs, count, status, WIDTH: tl.constexpr):
    """Return the expert of a job, whether there is such an expert, and its pairs: `[WIDTH]`, and which of them are there.

    Sets `status` for an id of no expert, and returns an expert that can be read.
    """
    lane = tl.arange(0, WIDTH)
    if places is None:
        expert = tl.load(ids + job)
        pair, present = job + lane, lane < 1
    else:
        entry = places + 1 + pairs + 3 * job
        expert = tl.load(entry).to(tl.int64)
        present = lane < tl.load(entry + 2)
        pair = tl.load(places + 1 + tl.load(entry + 1) + lane, mask=present, other=0)
    known = (expert >= 0) & (expert < count)
    if status is not None:
        tl.store(status, 1, mask=known == 0)
    return tl.where(known, expert, 0), known, pair, present


def _constants(count: int, width: int) -> dict[str, int]:
    experts = triton.next_power_of_2(count + 1)
    return {"WIDTH": width, "CHUNK": COMPARED // max(64, experts), "EXPERTS": experts}


def compile_cases() -> Iterator[CompileCase]:
    """Yield the configurations of the grouping kernel, the same for every device."""
    for count in (64, MOST_EXPERTS):
        signature = {"ids": "*i64:16", "places": "*i32:16", "pairs": "i32", "count": "i32"}
        yield CompileCase(group, signature, _constants(count, 16), GROUP_WARPS, 3)
