"""`mixed_precision=True` of what trains a float32 model: it multiplies in bfloat16, and all that it keeps is float32."""

from dataclasses import replace

import pytest
import torch

import sparsekern
from sparsekern import BlockTuning, Distill, Gradual
from tests.models.families import tiny_ids, tiny_model

from .unfinished import QUIET

TUNE = BlockTuning(passes=3, batch_tokens=32, learning_rate=1e-3)
DISTILL = Distill(steps=6, batch_tokens=64, learning_rate=3e-4)
GRADUAL = Gradual(steps=1, train_steps=4, batch_tokens=64, learning_rate=1e-3)


def pruned(settings, mixed: bool):
    """A model that `settings` trained, its report, and the dtypes of a linear's outputs while it was trained and while it was judged."""
    model, seen = tiny_model("llama"), {True: set(), False: set()}
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: seen[torch.is_grad_enabled()].add(output.dtype)
    )
    settings = replace(settings, mixed_precision=mixed)
    name = {BlockTuning: "tune", Distill: "distill"}.get(type(settings))
    method, arguments = ("wanda", {name: settings}) if name else (settings, {})
    report = sparsekern.prune(model, method, "2:4", tiny_ids(24, 16), **arguments, **QUIET)
    handle.remove()
    return model, report, seen


@pytest.mark.parametrize("settings", [TUNE, DISTILL, GRADUAL], ids=["tune", "distill", "gradual"])
def test_it_trains_in_bfloat16_on_float32_weights(settings):
    (exact, report, _), (model, mixed_report, seen) = (pruned(settings, mixed) for mixed in (False, True))
    assert seen[True] == {torch.bfloat16} and seen[False] <= {torch.float32}  # judged as the model computes afterwards
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    dense = dict(tiny_model("llama").named_parameters())
    moved = apart = 0.0
    for (name, value), of_float32 in zip(model.named_parameters(), exact.parameters(), strict=True):
        moved += float((of_float32 - dense[name]).detach().square().sum())
        apart += float((value - of_float32).detach().square().sum())
        if value.dim() == 2 and "layers" in name:
            assert float((value == 0).float().mean()) == 0.5
    assert 0 < apart < 0.02 * moved
    for found, of_mixed in zip(report.tuning + report.distillation, mixed_report.tuning + mixed_report.distillation, strict=True):
        for key in ("after", "kl"):
            if key in found:
                assert of_mixed[key] == pytest.approx(found[key], rel=0.02)


@pytest.mark.parametrize("settings", [BlockTuning, Distill, Gradual])
def test_it_is_a_switch(settings):
    with pytest.raises(ValueError, match=f"{settings.__name__}.mixed_precision: expected"):
        settings(mixed_precision="bf16")
