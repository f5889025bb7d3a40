"""What settings need of a run: each pair that does not go together is refused, in a sentence that names both."""

import re
from dataclasses import replace

import pytest

from sparsekern import ALPS, COPAL, BlockTuning, Distill, ExpertPruning, Gradual, KPrune, SparseLLM, Structured, Wanda
from sparsekern.pruning.needs import SETTINGS, Run, check_settings, without_unmet
from sparsekern.pruning.quality import PRESETS, Preset

ALONE = {name: setting.neutral for name, setting in SETTINGS.items()}
VALUES = {"correction": "dense", "tune": BlockTuning(), "distill": Distill(), "allocation": "fisher", "values": "int4"}
SHOWN = {"correction": "'dense'", "tune": "BlockTuning", "distill": "Distill", "allocation": "'fisher'", "values": "'int4'"}
STREAMED = "for a streamed model, whose blocks are not in memory together (load it without stream=True)"
NO_TOKENS = "for a model that predicts no next tokens"
PARTS = "for sums in 4 parts (several processes, or leaves; run one)"
REFUSED = [
    ("correction", Run(SparseLLM()), "for SparseLLM, which does not solve one linear at a time"),
    ("correction", Run(KPrune()), "for KPrune, which does not solve one linear at a time"),
    ("correction", Run(COPAL()), "for COPAL, whose statistic is of a weight and its inputs together"),
    ("tune", Run(Gradual()), "for Gradual, which leaves no masks block by block"),
    ("tune", Run(ExpertPruning()), "for ExpertPruning, which leaves no masks block by block"),
    ("distill", Run(KPrune()), "for KPrune, which leaves no masks block by block"),
    ("distill", Run(Wanda(), is_second=True), "for Wanda behind the removal of experts, which leaves no dense model"),
    ("distill", Run(Wanda(), predicts=False), NO_TOKENS),
    ("distill", Run(Wanda(), is_streamed=True), STREAMED),
    ("allocation", Run(Structured()), "for Structured, which does not prune each linear to a share"),
    ("allocation", Run(Gradual()), "for Gradual, which does not prune each linear to a share"),
    ("allocation", Run(ALPS(), predicts=False), NO_TOKENS),
    ("values", Run(Wanda(), leaves=4), PARTS),
]


@pytest.mark.parametrize(("name", "run", "reason"), REFUSED)
def test_what_a_run_cannot_give_is_refused(name, run, reason):
    check_settings(ALONE, run)
    with pytest.raises(ValueError, match=f"^{name}: expected {SETTINGS[name].neutral!r} {re.escape(reason)}.*, got {SHOWN[name]}$"):
        check_settings({**ALONE, name: VALUES[name]}, run)


def test_every_need_is_tested():
    tried = {(name, need) for name, run, _ in REFUSED for need in SETTINGS[name].needs if not need.met(run)}
    assert tried == {(name, need) for name, setting in SETTINGS.items() for need in setting.needs}
    assert SETTINGS.keys() == VALUES.keys()


@pytest.mark.parametrize("run", [Run(Wanda(), is_streamed=True), Run(ALPS(), leaves=4), Run(Wanda(), is_second=True)])
def test_what_works_block_by_block_needs_neither_memory_nor_a_single_process(run):
    check_settings({**ALONE, "correction": "dense", "tune": BlockTuning(), "allocation": "fisher"}, run)


def test_several_processes_distill():
    check_settings({**ALONE, "distill": Distill()}, Run(ALPS(), leaves=4))


def test_a_quality_goes_without_what_the_run_cannot_give():
    best = PRESETS["best"]
    assert without_unmet(best, Preset(), Run(ALPS())) == (best, [])
    found, reasons = without_unmet(best, Preset(), Run(ALPS(), is_streamed=True))
    assert found == replace(best, distill=None) and reasons == [f"distill {STREAMED}"]
    asked = Preset(distill=Distill())
    assert without_unmet(best, asked, Run(ALPS(), predicts=False)) == (
        replace(best, allocation="uniform"),
        [f"allocation {NO_TOKENS}"],
    )


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("correction", "late", ValueError, "correction: expected one of 'none', 'sequential', 'dense', got 'late'"),
        ("allocation", "best", ValueError, "allocation: expected one of 'uniform', 'fisher', 'mixed', got 'best'"),
        ("values", "int3", ValueError, "values: expected one of None, 'int4', got 'int3'"),
        ("tune", True, TypeError, r"tune: expected a config such as BlockTuning\(\), or None, got True"),
        ("distill", BlockTuning(), TypeError, r"distill: expected a config such as Distill\(\), or None, got BlockTuning"),
    ],
)
def test_other_values_are_refused(name, value, error, message):
    with pytest.raises(error, match=message):
        check_settings({**ALONE, name: value}, Run(Wanda()))


@pytest.mark.parametrize(
    ("run", "reason"),
    [(Run(Wanda(), leaves=2), "for sums in 2 parts"), (Run(Wanda(), is_streamed=True), "for a streamed model, whose blocks")],
)
def test_two_blocks_are_tuned_together_in_one_part_in_memory(run, reason):
    check_settings({**ALONE, "tune": BlockTuning()}, run)
    with pytest.raises(ValueError, match=f"^BlockTuning.blocks: expected 1 {reason}.*, got 2$"):
        check_settings({**ALONE, "tune": BlockTuning(blocks=2)}, run)
