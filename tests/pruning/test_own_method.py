"""A method of the user's own: the documented lines work end to end, and an incomplete class is refused at the start."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import sparsekern
from sparsekern.methods import (
    BlockMethod,
    FeatureNorm,
    GradualMethod,
    Gram,
    GramImportance,
    LinearMethod,
    Method,
    RemovalMethod,
    SampleImportance,
    Solution,
    generator,
)
from sparsekern.ops import nm_mask, topk_mask
from sparsekern.pattern import NM, pruned_count
from sparsekern.pruning.checkpoint import Checkpoint
from tests import encoders
from tests.tiny import llama

IDS = torch.randint(320, (4, 32), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class NoisyWanda(LinearMethod):
    """Wanda with a share of noise, as a user might write it."""

    name: ClassVar[str] = "noisy-wanda"
    needs: ClassVar = FeatureNorm

    noise: float = 0.1

    def solve(self, weight, statistics, pattern):
        scores = weight.abs().float() * statistics.sum_squares.sqrt()
        scores *= 1 + self.noise * torch.rand(weight.shape, generator=generator())
        if isinstance(pattern, NM):
            mask = nm_mask(scores, pattern)
        else:
            mask = topk_mask(scores, scores.numel() - pruned_count(scores.numel(), pattern.sparsity))
        return Solution(weight.masked_fill(~mask, 0))


def pruned(method=None, model=None, **options):
    model = llama() if model is None else model
    report = sparsekern.prune(model, method or NoisyWanda(), "2:4", IDS, progress=False, **options)
    return model.state_dict(), report


def same(a, b) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_it_prunes_and_reports():
    weights, report = pruned()
    assert report.sparsity == pytest.approx(0.5) and report.settings["method"] == {"name": "noisy-wanda", "noise": 0.1}
    assert {layer.error for layer in report.layers} == {None}
    assert same(weights, pruned()[0]) and not same(weights, pruned(seed=1)[0])
    _, report = pruned(NoisyWanda(noise=0.0), report_error=True)
    wanda = sparsekern.prune(llama(), "wanda", "2:4", IDS, progress=False, report_error=True)
    assert [layer.error for layer in report.layers] == [layer.error for layer in wanda.layers]


def test_it_resumes_to_the_same_bits(tmp_path, monkeypatch):
    def interrupted(self, index, result, save=Checkpoint.save):
        save(self, index, result)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoint, "save", interrupted)
        pruned(out=tmp_path / "out")
    with pytest.raises(ValueError, match="belongs to another run, with another method"):
        pruned(NoisyWanda(noise=0.2), out=tmp_path / "out", resume=True)
    weights, report = pruned(out=tmp_path / "out", resume=True)
    assert report.resumed_blocks == 1 and same(weights, pruned()[0])
    assert "noisy-wanda" in json.dumps(json.loads((tmp_path / "out" / "report.json").read_text()))


def test_it_runs_inside_others_and_continually():
    assert pruned(sparsekern.SparseLLM(solver=NoisyWanda()))[1].sparsity == pytest.approx(0.5)
    model = llama()
    sparsekern.prune_continually(model, {"a": IDS, "b": IDS + 1}, NoisyWanda(noise=0.0), "2:4", progress=False)
    expected = llama()
    sparsekern.prune_continually(expected, {"a": IDS, "b": IDS + 1}, "wanda", "2:4", progress=False)
    assert same(model.state_dict(), expected.state_dict())


@pytest.mark.parametrize("needs", [FeatureNorm, Gram, SampleImportance, GramImportance, None])
def test_it_is_given_what_it_needs(needs):
    seen = []

    @dataclass(frozen=True)
    class Looks(NoisyWanda):
        def solve(self, weight, statistics, pattern):
            seen.append(type(statistics))
            return sparsekern.Magnitude().solve(weight, None, pattern)

    Looks.needs = needs
    sparsekern.prune(llama(), Looks(), "2:4", IDS if needs else None, progress=False)
    assert set(seen) == {type(None) if needs is None else needs}


def test_without_solve_it_is_refused_on_construction():
    @dataclass(frozen=True)
    class Empty(LinearMethod):
        name: ClassVar[str] = "empty"

    with pytest.raises(TypeError, match="Empty .*abstract method '?solve"):
        Empty()


def test_a_class_without_a_loop_is_refused_on_construction():
    @dataclass(frozen=True)
    class Loose(Method):
        name: ClassVar[str] = "loose"
        share: float = 0.5

    for make in (Loose, lambda: Loose(share=0.3), Method):
        with pytest.raises(
            TypeError, match="^method: expected a LinearMethod, .* or ExpertMethod, got (Loose|Method), which is none"
        ):
            make()


class Bare(Method):
    name = "bare"
    needs_data = False


class NoDataclass(LinearMethod):
    name = "plain"

    def solve(self, weight, statistics, pattern):
        return Solution(weight)


@dataclass(frozen=True)
class NoName(LinearMethod):
    def solve(self, weight, statistics, pattern):
        return Solution(weight)


@dataclass(frozen=True)
class UnknownNeeds(NoisyWanda):
    needs: ClassVar = "gram"


@dataclass(frozen=True)
class NormsTogether(BlockMethod):
    name: ClassVar[str] = "together"
    needs: ClassVar = FeatureNorm
    attention: str = "dense"

    def solve(self, weight, statistics, pattern):
        return Solution(weight)

    def solve_feed_forward(self, problem):
        raise AssertionError("it is refused before any work")


@dataclass(frozen=True)
class Untrained(GradualMethod):
    name: ClassVar[str] = "untrained"
    trains: ClassVar[bool] = False
    steps: int = 2

    def allocate(self, blocks, patterns):
        return dict(patterns)


@dataclass(frozen=True)
class Remover(RemovalMethod):
    name: ClassVar[str] = "remover"
    remove: float = 0.5


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            Bare(),
            "method: expected a LinearMethod, BlockMethod, GradualMethod, RemovalMethod or ExpertMethod, got Bare, which is none of them",
        ),
        (
            NormsTogether(),
            "method: expected NormsTogether.needs to be Gram, which solve_feed_forward is given, got <class .*FeatureNorm",
        ),
        (
            Untrained(),
            "method: expected Untrained to have chooser, pattern_after, epochs, .* which the loop of its base class reads",
        ),
        (Remover(), "method: expected Remover to have budget, objective, .* which the loop of its base class reads"),
        (NoDataclass(), "method: expected a dataclass, whose fields are its settings; got NoDataclass without @dataclass"),
        (NoName(), "method: expected NoName.name to be a word that reports call it by, got None"),
        (UnknownNeeds(), "method: expected UnknownNeeds.needs to be FeatureNorm, Gram, .* or None, got 'gram'"),
        (NoisyWanda, "method: expected a name or a config such as SparseGPT"),
    ],
)
def test_incomplete_classes_are_refused_before_any_work(method, message):
    model = llama()
    with pytest.raises(TypeError, match=message):
        pruned(method, model)
    assert same(model.state_dict(), llama().state_dict())


@pytest.mark.parametrize(
    ("returned", "error", "message"),
    [
        (lambda w: w, TypeError, "method: expected Returns.solve to return a Solution, got Tensor"),
        (lambda w: None, TypeError, "method: expected Returns.solve to return a Solution, got NoneType"),
        (
            lambda w: Solution(w.double()),
            ValueError,
            "Returns.solve: expected a weight of dtype torch.float32, got torch.float64",
        ),
        (lambda w: Solution(w[:1]), ValueError, "Returns.solve: expected a weight of shape"),
        (lambda w: Solution(w, w != 0), ValueError, r"Returns.solve: expected a row_error of shape \[32], got \[32, 32]"),
        (lambda w: Solution(w, 0.5), ValueError, r"Returns.solve: expected a row_error of shape \[32], got float"),
        (lambda w: Solution(w), ValueError, "expected a solution pruned to 2:4, got 0 zeros of 1,024 weights"),
        (lambda w: Solution(w.tril()), ValueError, "expected a solution pruned to 2:4, got 496 zeros of 1,024 weights"),
    ],
)
def test_a_wrong_result_names_the_method_and_changes_nothing(returned, error, message):
    @dataclass(frozen=True)
    class Returns(NoisyWanda):
        def solve(self, weight, statistics, pattern):
            return returned(weight)

    model = llama()
    with pytest.raises(error, match=message):
        pruned(Returns(), model)
    assert same(model.state_dict(), llama().state_dict())


@pytest.mark.parametrize(("base", "loop"), [(GradualMethod, "gradual"), (RemovalMethod, "removal")])
def test_what_a_loop_reads_of_a_method_is_listed(base, loop):
    source = (Path(sparsekern.__file__).parent / "pruning" / loop / "loop.py").read_text()
    read = set(re.findall(r"\bmethod\.(\w+)", source))
    assert read - {"trains", "needs_data", "allocate"} <= set(base.LOOP_READS)
    assert all(re.search(rf"\b{name}\b", source) for name in base.LOOP_READS)


def test_callables_choose_linears():
    asked = []

    def attention(name, module):
        asked.append((name, module))
        return "self_attn" in name

    model = llama()
    _, report = pruned("magnitude", model, include=attention)
    assert {layer.name.split(".")[3] for layer in report.layers} == {"self_attn"}
    assert all(model.get_submodule(name) is module for name, module in asked)
    _, report = pruned("magnitude", exclude=lambda name, module: module.out_features > 32)
    assert report.layers and all(layer.shape[0] <= 32 for layer in report.layers)
    _, report = pruned("magnitude", include=lambda name, module: True)
    assert "lm_head" not in {layer.name for layer in report.layers}  # outside the blocks: only by its whole name
    _, both = pruned("magnitude", include=["*", "lm_head"], exclude=lambda name, module: name != "lm_head")
    assert [layer.name for layer in both.layers] == ["lm_head"]


def raising(name, module):
    raise KeyError(name)


@pytest.mark.parametrize("argument", ["include", "exclude"])
@pytest.mark.parametrize(
    ("choice", "error", "message"),
    [
        (raising, ValueError, "the callable raised KeyError for model.layers.0.self_attn.q_proj: "),
        (lambda name: True, ValueError, "the callable raised TypeError for model.layers.0.self_attn.q_proj: .*takes 1 positional"),
        (lambda name, module: None, TypeError, "expected the callable to return True or False for model.layers.0.*, got None"),
    ],
)
def test_callables_that_fail_are_named(argument, choice, error, message):
    model = llama()
    with pytest.raises(error, match=f"{argument}: {message}"):
        pruned("magnitude", model, **{argument: choice})
    assert same(model.state_dict(), llama().state_dict())


def test_callables_that_leave_nothing():
    with pytest.raises(ValueError, match="together they leave no linear to prune"):
        pruned("magnitude", include=lambda name, module: False)
    with pytest.raises(ValueError, match="include: expected none, KPrune chooses among all heads and neurons"):
        sparsekern.prune(encoders.tiny("bert"), "kprune", calibration=IDS, include=lambda name, module: True)
