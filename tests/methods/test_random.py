import pytest
import torch

import sparsekern
from sparsekern import NM, Random, Unstructured
from sparsekern.pruning import checkpoint
from tests.models.families import tiny_model


def prune(seed: int = 0, **arguments):
    model = tiny_model("llama")
    sparsekern.prune(model, "random", arguments.pop("pattern", 0.5), seed=seed, progress=False, **arguments)
    return model.state_dict()


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_exact_counts_and_untouched_survivors(layer):
    for scope, counts in (("matrix", None), ("row", 19)):
        solution = Random(scope=scope).solve(layer.weight, None, Unstructured(0.3))
        assert int((solution.weight == 0).sum()) == (int(24 * 64 * 0.3) if counts is None else 24 * counts)
        assert torch.equal(solution.weight, layer.weight * (solution.weight != 0))
    mask = Random().solve(layer.weight, None, NM(1, 4)).weight != 0
    assert (mask.unflatten(1, (-1, 4)).sum(-1) == 1).all()


def test_every_weight_is_as_likely_to_go():
    weight = torch.randn(8, 8)
    kept = sum((Random().solve(weight, None, Unstructured(0.5)).weight != 0).double() for _ in range(1000)) / 1000
    assert (kept - 0.5).abs().max() < 5 * (0.25 / 1000) ** 0.5  # five standard deviations


def test_zeros_go_first(layer):
    first = Random().solve(layer.weight, None, Unstructured(0.3))
    second = Random().solve(first.weight, None, Unstructured(0.6))
    assert not ((second.weight != 0) & (first.weight == 0)).any()
    assert int((second.weight == 0).sum()) == int(24 * 64 * 0.6)


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    assert same(prune(1), prune(1)) and not same(prune(1), prune(2))
    model, state = tiny_model("llama"), torch.get_rng_state()
    sparsekern.prune(model, "random", 0.5, progress=False)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_linear_s_draw_does_not_hang_on_the_others():
    alone, together = prune(include="*.2.mlp.up_proj"), prune()
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(alone[name], together[name])
    masks = [together[f"model.layers.{i}.mlp.up_proj.weight"] == 0 for i in range(2)]
    assert not torch.equal(*masks)


def test_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="Random.scope: expected one of 'matrix', 'row', got 'global'"):
        Random(scope="global")


def test_a_resumed_run_draws_the_same(tmp_path, monkeypatch):
    def interrupted(self, index, result, save=checkpoint.Checkpoint.save):
        save(self, index, result)
        if index == 0:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoint.Checkpoint, "save", interrupted)
        prune(3, out=tmp_path / "out")
    assert same(prune(3, out=tmp_path / "out", resume=True), prune(3))
