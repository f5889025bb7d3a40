"""Tile choices and schedules: pure functions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton", reason="Triton kernels need triton")

from sparsekern.triton_kernels import (  # noqa: E402
    bitmask_linear,
    feature_norm,
    head_neuron_scores,
    masked_lstsq,
    nm_linear,
    obs_sweep,
    sensitivity,
)
from sparsekern.triton_kernels._common import aligned_rows, lower_tile_at, lower_tiles, tile_at  # noqa: E402
from sparsekern.triton_kernels._product import CHAIN, START, config, schedule  # noqa: E402

H200 = 132


@pytest.mark.parametrize("group", [2, 4, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 33])
def test_every_tile_is_taken_once(rows, group):
    for columns in (1, 2, 5, 16):
        taken = [tile_at.fn(index, rows, columns, group) for index in range(rows * columns)]
        assert sorted(taken) == [(i, j) for i in range(rows) for j in range(columns)]


@pytest.mark.parametrize("wide", [1, 2])
@pytest.mark.parametrize("group", [2, 4, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 16, 17, 32, 33, 50])
def test_every_tile_that_reaches_the_lower_triangle_is_taken_once(rows, group, wide):
    reach = [(i, j) for i in range(rows) for j in range(rows) if j * wide <= i]
    assert lower_tiles(rows, wide) == len(reach)
    assert sorted(lower_tile_at.fn(index, rows, wide, group) for index in range(len(reach))) == reach


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    tiles=st.integers(0, 5000),
    depth=st.one_of(st.integers(0, 3000), st.integers(0, 2**33)),
    step=st.sampled_from([16, 32, 64]),
    multiprocessors=st.sampled_from([1, 108, 132, 148]),
)
def test_a_schedule_covers_all_the_depth_of_every_tile_once(tiles, depth, step, multiprocessors):
    covered = {}
    for part in schedule(tiles, depth, step, multiprocessors):
        assert part.first_tile == 0 or part.first_tile % multiprocessors == 0
        if part.splits > 1:
            assert part.depth % step == 0  # or splits would overlap
            assert part.tiles * part.splits <= max(8 * multiprocessors, part.tiles * -(-depth // CHAIN) * 2)
        assert (part.splits - 1) * part.depth < part.end - part.begin <= part.splits * part.depth
        assert part.depth <= CHAIN
        covered.setdefault((part.first_tile, part.tiles), []).append((part.begin, part.end))
    assert sum(count for _, count in covered) == (tiles if depth else 0)
    for ranges in covered.values():
        assert [begin for begin, _ in ranges] == [0, *(end for _, end in ranges[:-1])] and ranges[-1][1] == depth


def waves(part) -> int:
    return -(-part.tiles * part.splits // H200)


@pytest.mark.parametrize(
    ("features", "tokens", "least"),
    [(4096, 262144, 0.97), (4096, 32768, 0.94), (4096, 2048, 0.65), (11008, 32768, 0.97), (768, 262144, 0.95), (576, 2048, 0.15)],
)
def test_the_multiprocessors_of_an_h200_are_kept_busy(features, tokens, least):
    """The share of the time in which tiles are multiplied, by the model that chooses the split."""
    tile = config(torch.bfloat16, features, (9, 0))
    tiles = lower_tiles(-(-features // tile.rows), tile.columns // tile.rows)
    steps = -(-tokens // tile.depth)
    needed = sum(waves(part) * (-(-part.depth // tile.depth) + START) for part in schedule(tiles, tokens, tile.depth, H200))
    assert tiles * steps / H200 >= least * needed


def test_the_whole_waves_add_to_the_result_themselves():
    whole, *_, rest = schedule(272, 262144, 64, H200)
    assert (whole.first_tile, whole.tiles, whole.splits) == (0, 264, 1)
    assert (rest.first_tile, rest.tiles, rest.splits) == (264, 8, 16)


def test_shared_memory_that_only_some_devices_have_is_asked_of_those():
    assert config(torch.bfloat16, 4096, (9, 0)).depth == config(torch.bfloat16, 4096, (10, 0)).depth == 64
    assert config(torch.bfloat16, 4096, (8, 0)) == config(torch.bfloat16, 4096, (12, 0))


@pytest.mark.parametrize(("features", "tokens"), [(4096, 262144), (11008, 2048), (64, 1000), (1, 1), (4096, 1)])
def test_the_norms_of_features_keep_the_multiprocessors_busy(features, tokens):
    each = feature_norm.split_tokens(tokens, features, torch.bfloat16, H200)
    programs = -(-features // feature_norm.block_columns(torch.bfloat16)) * -(-tokens // each)
    shortest = feature_norm.TOKENS * feature_norm.UNROLL
    assert each % shortest == 0
    assert programs <= feature_norm.PROGRAMS * H200
    assert programs >= 4 * H200 or each == shortest


@settings(max_examples=200, deadline=None, derandomize=True)
@given(tokens=st.integers(1, 2**24), rows=st.integers(1, 300000), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_outputs_at_a_time_have_room_and_are_about_equally_many(tokens, rows, dtype):
    tile = sensitivity.config(tokens, rows, dtype)
    assert tile.tokens % 64 == tile.rows % 128 == 0
    assert tile.rows <= sensitivity.OUTPUT_ROWS and tile.tokens * tile.rows * dtype.itemsize <= sensitivity.OUTPUT_BYTES
    for whole, part, step in ((tokens, tile.tokens, 64), (rows, tile.rows, 128)):
        parts = -(-whole // part)
        assert part - -(-whole // parts) < step  # no part is much smaller than the others


def test_a_batch_of_calibration_is_few_tiles_of_outputs():
    assert sensitivity.config(16384, 4096, torch.bfloat16) == (16384, 4096)
    assert sensitivity.config(16384, 11008, torch.bfloat16) == (8192, 11008)
    assert sensitivity.config(2048, 128256, torch.float32) == (2048, 16128)


@pytest.mark.parametrize(("head_size", "tile"), [(1, (64, 1)), (5, (8, 8)), (64, (1, 64)), (80, (1, 64)), (11008, (1, 64))])
def test_units_of_a_step(head_size, tile):
    assert head_neuron_scores.config(head_size) == tile


@pytest.mark.parametrize("m", [0, *range(2, 65)])
@pytest.mark.parametrize("columns", [1, 16, 17, 64, 128])
def test_sub_blocks_of_a_sweep_hold_whole_groups_and_as_many_as_fit(columns, m):
    for dtype, capability in itertools.product((torch.float32, torch.bfloat16), ((8, 0), (9, 0), (10, 0))):
        tiles = obs_sweep.config(max(columns, m), m, dtype, capability)
        assert tiles.width <= tiles.size and tiles.size & (tiles.size - 1) == 0
        assert tiles.width % tiles.part == 0 and tiles.width + tiles.part > tiles.size
        assert tiles.part % (m or 1) == 0 and tiles.width > 0
        assert tiles.num_warps in (1, 2, 8)


def test_a_matrix_is_copied_only_where_its_rows_are_not_aligned():
    large = torch.zeros(8, 64)
    for x in (large, large[:, :32], large[:, 16:48], large[::2], large[:1].expand(5, 64)):
        assert aligned_rows(x) is x
    for x in (large[:, 1:33], large[:, :20], large.T, large[:, ::2], torch.zeros(8, 8)):
        copy = aligned_rows(x)
        assert torch.equal(copy, x) and copy.data_ptr() % 16 == 0 and copy.stride() == (-(-x.shape[1] // 16) * 16, 1)


@pytest.mark.parametrize(
    ("rows", "columns", "one", "more"),
    [(1024, 4096, 8, 8), (4096, 4096, 8, 4), (11008, 4096, 4, 4), (4096, 200, 2, 2), (1, 1, 1, 1), (0, 0, 1, 1)],
)
def test_the_warps_of_a_tile_of_packed_rows(rows, columns, one, more):
    """On an H200, where 4096 rows are two tiles for each multiprocessor."""
    assert bitmask_linear.config(rows, columns, 1, H200) == one
    assert bitmask_linear.config(rows, columns, 16, H200) == more


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    rows=st.integers(1, 100000),
    kept=st.integers(0, 60000),
    tokens=st.integers(1, 16),
    multiprocessors=st.sampled_from([1, 108, 132]),
)
def test_values_that_are_picked_for_fit_into_registers(rows, kept, tokens, multiprocessors):
    tiles = nm_linear.config(rows, kept, tokens, multiprocessors)
    sums = tiles.rows * 2 ** (tokens - 1).bit_length()  # of a thread
    assert tiles.rows in (4, 8, 16) and sums <= 64 and tiles.warps in (1, 2, 4, 8)
    assert tiles.warps == 1 or 16 * tiles.warps < kept  # no warp without values
    assert tiles.rows == 4 or -(-rows // tiles.rows) >= multiprocessors


@pytest.mark.parametrize(
    ("columns", "tile"),
    [
        (1, (128, 16, True, 4)),
        (64, (32, 64, True, 4)),
        (576, (2, 1024, True, 4)),
        (1536, (1, 2048, True, 4)),
        (4096, (1, 4096, True, 8)),
        (11008, (1, 16384, True, 32)),
        (16384, (1, 16384, True, 32)),
        (16385, (1, 4096, False, 8)),
        (28672, (1, 4096, False, 8)),
    ],
)
def test_rows_of_least_squares_are_held_whole_where_registers_suffice(columns, tile):
    assert masked_lstsq.config(columns) == tile


@settings(max_examples=100, deadline=None, derandomize=True)
@given(columns=st.integers(1, 100_000))
def test_a_tile_of_least_squares_is_sixteen_entries_a_thread(columns):
    tile = masked_lstsq.config(columns)
    entries = tile.rows * tile.columns
    assert tile.whole == (tile.columns >= columns) and tile.num_warps in (4, 8, 16, 32)
    assert entries == 512 * tile.num_warps and (tile.rows == 1 or entries == 2048)
