"""Samples that are held out: the same ones however they are batched, drawn by the seed, each with its number and its padding."""

import pytest
import torch

from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.windows import RUN, overlapping, with_held_out

IDS = torch.arange(20 * 3).reshape(20, 3)


def samples(batches, held_out: bool) -> list[int]:
    return [int(row[0]) // 3 for batch in batches if batch.held_out is held_out for row in batch.inputs["input_ids"]]


def batches_of(size: int, ids=IDS):
    return as_batches(ids, size, torch.device("cpu"), None)


def test_one_of_eight_is_held_out_whatever_the_batches():
    found = [with_held_out(batches_of(size), 3) for size in (1, 4, 7, 20)]
    assert len({tuple(samples(batches, True)) for batches in found}) == 1
    assert all(sorted(samples(batches, True) + samples(batches, False)) == list(range(20)) for batches in found)
    assert len(samples(found[0], True)) == 2
    assert samples(with_held_out(batches_of(4), 4), True) != samples(found[0], True)


def test_numbers_and_padding_follow_the_samples():
    mask = torch.ones(20, 3, dtype=torch.long)
    mask[::2, 2] = 0
    given = {"input_ids": IDS, "attention_mask": mask}
    for batch in with_held_out(batches_of(20, [given]), 0):
        rows = batch.inputs["input_ids"]
        assert torch.equal(batch.token_mask, mask[rows[:, 0] // 3].bool())
        for place, row in enumerate(rows):
            assert batch.sample_of_row(3 * place + 2, rows.numel()) == int(row[0]) // 3


def test_inputs_that_are_not_divided_into_samples_are_refused():
    given = {"input_ids": IDS, "pixel_values": torch.zeros(7, 2)}
    with pytest.raises(ValueError, match=r"calibration: expected inputs that their first dimension divides into samples"):
        with_held_out(batches_of(20, [given]), 0)


@pytest.mark.parametrize("held_out", [True, False])
def test_samples_that_are_all_padding_are_refused(held_out):
    """Nothing can be fitted on the one kind, or judged on the other."""
    drawn = torch.tensor([row in samples(with_held_out(batches_of(1), 0), True) for row in range(20)])
    mask = torch.ones(20, 3, dtype=torch.long)
    mask[drawn == held_out] = 0
    kind = "the 2 samples that are held out" if held_out else "those that are not held out"
    with pytest.raises(ValueError, match=f"calibration: expected tokens that are no padding, got none in {kind}"):
        with_held_out(batches_of(4, [{"input_ids": IDS, "attention_mask": mask}]), 0)


@pytest.mark.parametrize(("step", "near"), [(40, set()), (41 - RUN, set()), (40 - RUN, {2, 4}), ((40 - RUN) // 2, {1, 2, 4, 5})])
def test_windows_that_overlap_with_chosen_ones_are_found(generator, step, near):
    text = torch.randint(1000, (400,), generator=generator)
    windows = text.unfold(0, 40, step)[:7]  # each shares `40 - step` tokens with the next
    assert overlapping(batches_of(1, windows), [3]) == near
    assert overlapping(batches_of(3, windows), [1]) == ({0, 2} if near else set())  # windows 3, 4 and 5


def test_padding_and_short_windows_share_nothing(generator):
    ids, mask = torch.randint(1000, (2, 60), generator=generator), torch.ones(2, 60, dtype=torch.long)
    ids[:, 20:], mask[:, 20:] = 7, 0
    padded = [{"input_ids": row, "attention_mask": of} for row, of in zip(ids.split(1), mask.split(1), strict=True)]
    assert not overlapping(batches_of(1, padded), [0])
    assert overlapping(batches_of(1, ids), [0]) == {1}
    assert not overlapping(batches_of(1, IDS[:1].repeat(3, 1)), [0])
