"""Who solves what: every piece once, factors where they are needed, and loads that are even where the work can be divided."""

from __future__ import annotations

import pytest

from sparsekern import ALPS, SparseGPT
from sparsekern.methods import LinearMethod
from sparsekern.pruning.blockwise.dealing import TOGETHER, SharedWork, TeamWork, deal, tiles_of

# Rows of the linears with the same inputs, and the number of these inputs.
SMOLLM2 = [(576, [576, 192, 192]), (576, [576]), (576, [1536, 1536]), (1536, [576])]
LLAMA_7B = [(4096, [4096] * 3), (4096, [4096]), (4096, [11008] * 2), (11008, [4096])]
LLAMA_70B = [(8192, [8192, 1024, 1024]), (8192, [8192]), (8192, [28672] * 2), (28672, [8192])]
DEEPSEEK_V3 = [
    *[(7168, [1536, 576]), (1536, [24576]), (512, [32768]), (16384, [7168])],
    *[(7168, [2048] * 2), (2048, [7168])] * 257,
]


def works_of(sets: list[tuple[int, list[int]]], method: LinearMethod, *, tiles: bool) -> list[SharedWork]:
    found = []
    for features, linears in sets:
        works = [(method.work(rows, features), tiles_of(rows, 8) if tiles else [slice(0, rows)], rows) for rows in linears]
        pieces = [work.fixed + work.own * (tile.stop - tile.start) / rows for work, own, rows in works for tile in own]
        found.append(SharedWork(works[0][0].shared, tuple(pieces)))
    return found


@pytest.mark.parametrize("rows", [1, 15, 16, 64, 65, 192, 576, 1536, 8192, 28672, 28671])
def test_tiles_cover_all_rows_in_whole_panels(rows):
    tiles = tiles_of(rows, 8)
    assert [row for tile in tiles for row in range(tile.start, tile.stop)] == list(range(rows))
    heights = {tile.stop - tile.start for tile in tiles[:-1]}
    assert len(heights) <= 1 and all(height % 16 == 0 and height >= 64 for height in heights)
    assert len(tiles) <= 16


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("sets", [SMOLLM2, LLAMA_70B])
def test_each_piece_has_a_place_behind_its_factor(sets, size):
    works = works_of(sets, SparseGPT(), tiles=True)
    dealt = deal(works, size)
    assert dealt == deal(works, size)
    loads = [[0.0] * size, [0.0] * size]
    for index, (work, places) in enumerate(zip(works, dealt.places, strict=True)):
        assert len(places) == len(work.pieces)
        assert dealt.passed_on(index) == any(place.turn for place in places)
        loads[0][dealt.owners[index]] += work.factor
        for place, cost in zip(places, work.pieces, strict=True):
            assert place.turn or place.rank == dealt.owners[index]  # before the factors are passed on, only the owner has this one
            loads[place.turn][place.rank] += cost
        assert places[0].turn == 0  # the piece that makes the owner compute the factor
    total = sum(work.factor + sum(work.pieces) for work in works)
    assert sum(map(sum, loads)) == pytest.approx(total)
    if size == 1:
        assert not any(loads[1]) and dealt.longest == pytest.approx(total)
    assert dealt.longest <= sum(map(max, loads)) * (1 + 1e-9)


@pytest.mark.parametrize(
    ("sets", "method", "size"),
    [
        (SMOLLM2, SparseGPT(), 2),
        (SMOLLM2, ALPS(), 2),
        (LLAMA_7B, SparseGPT(), 2),
        (LLAMA_7B, ALPS(), 2),
        *[(DEEPSEEK_V3, method, size) for method in (SparseGPT(), ALPS()) for size in (2, 4, 8)],
    ],
    ids=str,
)
def test_the_busiest_process_has_little_more_than_its_share(sets, method, size):
    works = works_of(sets, method, tiles=not isinstance(method, ALPS))
    share = sum(work.total for work in works) / size
    assert share <= deal(works, size).longest <= 1.15 * share


@pytest.mark.parametrize("sets", [SMOLLM2, LLAMA_7B, LLAMA_70B])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_nothing_but_the_longest_factor_is_waited_for(sets, size):
    """One factor cannot be divided. What can is as even as its pieces allow."""
    works = works_of(sets, SparseGPT(), tiles=True)
    longest = max(works, key=lambda work: work.factor)
    rest = max(sum(work.total for work in works) / size, longest.factor + sum(longest.pieces) / size)
    assert deal(works, size).longest <= 1.15 * rest


@pytest.mark.parametrize("sets", [SMOLLM2, LLAMA_7B, LLAMA_70B])
@pytest.mark.parametrize("size", [2, 4, 8])
def test_alps_divides_its_longest_linears(sets, size):
    """What is left is the inverses of the widest linear, which each process computes for itself."""
    method = ALPS()
    works = works_of(sets, method, tiles=False)
    found = {
        (index, number): method.work(rows, features)
        for index, (features, linears) in enumerate(sets)
        for number, rows in enumerate(linears)
    }
    divisible = {key: TeamWork(work.fixed, work.own, len(tiles_of(sets[key[0]][1][key[1]], 8))) for key, work in found.items()}
    dealt = deal(works, size, divisible)
    share = sum(work.total for work in works) / size
    repeated = sum(divisible[i, n].fixed for i, own in enumerate(dealt.places) for n, at in enumerate(own) if at.turn == TOGETHER)
    assert dealt.longest <= min(1.3 * (share + repeated), deal(works, size).longest)
    if size > 2:
        assert dealt.longest < 0.8 * deal(works, size).longest


def test_linears_without_a_factor_go_to_the_least_busy_process():
    dealt = deal([SharedWork(0.0, (3.0, 5.0)), SharedWork(0.0, (4.0,))], 2)
    assert [[place.rank for place in places] for places in dealt.places] == [[1, 0], [1]]
    assert dealt.longest == 7 and not dealt.passed_on(0)
