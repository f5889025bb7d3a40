"""`prune` on a device does what it does on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch

import sparsekern
from tests.tiny import llama

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning"),  # of few tokens
]


@pytest.fixture
def ids(generator):
    return torch.randint(320, (12, 48), generator=generator)


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["2:4", 0.5])
def test_as_on_the_cpu(ids, method, pattern):
    there = copy.deepcopy(here := llama()).cuda()
    expected = sparsekern.prune(here, method, pattern, ids, progress=False)
    report = sparsekern.prune(there, method, pattern, ids, progress=False)
    assert report.sparsity == expected.sparsity
    for got, want in zip(report.layers, expected.layers, strict=True):
        assert (got.name, got.zeros) == (want.name, want.zeros)
        if want.error is not None:
            assert got.error == pytest.approx(want.error, rel=0.05)
    first = [layer.name for layer in expected.layers[:7]]  # later blocks see what rounding has decided in the ones before
    for name in first:
        got, want = there.get_submodule(name).weight.cpu(), here.get_submodule(name).weight
        same = (got == 0) == (want == 0)
        assert same.float().mean() > 0.99
        rows = same.all(1)
        torch.testing.assert_close(got[rows], want[rows], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(ids, dtype):
    report = sparsekern.prune(llama().to("cuda", dtype), "sparsegpt", "2:4", ids, progress=False)
    assert report.sparsity == 0.5 and all(0 < layer.error < 0.5 for layer in report.layers)


def test_padding_and_batches_do_not_matter(ids):
    mask = torch.ones_like(ids)
    mask[:, 40:] = 0
    padded = [{"input_ids": i, "attention_mask": m} for i, m in zip(ids.split(5), mask.split(5), strict=True)]
    models = [llama().cuda() for _ in range(2)]
    sparsekern.prune(models[0], "sparsegpt", "2:4", padded, progress=False)
    sparsekern.prune(models[1], "sparsegpt", "2:4", ids[:, :40], progress=False)
    one, other = (model.model.layers[0].self_attn.q_proj.weight for model in models)
    assert ((one == 0) == (other == 0)).float().mean() > 0.99


def test_a_nan_is_named(ids):
    model = llama().cuda()
    with torch.no_grad():
        model.get_input_embeddings().weight[int(ids[7, 3])] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.\w_proj: its input is nan in calibration sample"):
        sparsekern.prune(model, "sparsegpt", "2:4", ids, progress=False)


def test_the_phases_add_up(ids):
    report = sparsekern.prune(llama().cuda(), "sparsegpt", "2:4", ids, progress=False)
    phases = [seconds for name, seconds in report.seconds.items() if name != "total"]
    assert {"capture", "forward", "statistics", "solve"} <= report.seconds.keys()
    assert 0 < sum(phases) <= 1.05 * report.seconds["total"]


def test_perplexity_and_a_saved_model(ids, tmp_path):
    model = llama().cuda()
    sparsekern.prune(model, "magnitude", "2:4", progress=False)
    there = sparsekern.perplexity(model, ids.flatten(), length=48)
    sparsekern.save(model, tmp_path / "saved")
    assert there == pytest.approx(
        sparsekern.perplexity(sparsekern.load(tmp_path / "saved", device="cpu"), ids.flatten(), length=48), rel=1e-4
    )


def test_a_killed_run_goes_on(ids, tmp_path, monkeypatch):
    from sparsekern.pruning.blockwise.loop import BlockLoop

    whole, part = llama().cuda(), llama().cuda()
    sparsekern.prune(whole, "sparsegpt", "2:4", ids, progress=False)
    plain = BlockLoop._prune_block

    def killed(run, index, linears):
        if index == 2:
            raise KeyboardInterrupt
        plain(run, index, linears)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(BlockLoop, "_prune_block", killed)
        sparsekern.prune(part, "sparsegpt", "2:4", ids, out=tmp_path / "out", progress=False)
    resumed = llama().cuda()
    sparsekern.prune(resumed, "sparsegpt", "2:4", ids, out=tmp_path / "out", resume=True, progress=False)
    for (name, got), want in zip(resumed.state_dict().items(), whole.state_dict().values(), strict=True):
        assert torch.equal(got, want), name
