"""A method's settings on the command line: every one can be given, and its help says how."""

import re

import pytest

from sparsekern import ALPS, BlockTuning, Distill, Gradual, KPrune, Magnitude, SparseGPT, SparseLLM, Structured, Wanda
from sparsekern.cli import main
from sparsekern.cli.parser import make_parser
from sparsekern.cli.settings import configured, methods_of, training_of
from sparsekern.methods import METHODS, settings_of
from sparsekern.pattern import parse_pattern


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (("sparsegpt", "mask=wanda", "scope=row"), SparseGPT(mask="wanda", scope="row")),
        (("sparsegpt", "mask=none"), SparseGPT()),
        (("alps", "rho=3", "max_iterations=9"), ALPS(rho=3.0, max_iterations=9)),
        (("kprune", "remove=0.3", "tune_bias=false", "lam_rep=1e-2"), KPrune(remove=0.3, tune_bias=False, lam_rep=0.01)),
        (("gradual", "criterion.scope=global", "clip=2"), Gradual(Magnitude(scope="global"), clip=2.0)),
        (("gradual", "criterion=structured", "criterion.units=heads"), Gradual(Structured(units="heads"))),
        (("gradual", "criterion.units=heads", "criterion=structured"), Gradual(Structured(units="heads"))),
        (("gradual", "train_steps=none", "schedule=linear"), Gradual(schedule="linear")),
        (
            ("sparsellm", "solver=alps", "solver.rho=1", "damping=0.1", "solver.damping=0.2", "keep=last"),
            SparseLLM(ALPS(rho=1.0, damping=0.2), damping=0.1, keep="last"),
        ),
        (("wanda",), Wanda()),
    ],
)
def test_every_setting_can_be_given(arguments, expected):
    method, *settings = arguments
    given = [word for setting in settings for word in ("--set", setting)]
    options = make_parser().parse_args(["prune", "model", "--out", "out", "--method", method, *given])
    assert configured(options.method, options.set) == expected


@pytest.mark.parametrize("method", METHODS)
def test_every_setting_is_read_from_what_help_shows_as_its_default(method, capsys, monkeypatch):
    """Each value that `--help-method` prints goes through `--set`, so that the help of no setting can be wrong about it."""
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--help-method", method])
    assert stopped.value.code == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith(f"{method}: ")
    rules = settings_of(METHODS[method])
    defaults = re.findall(r"\(default: (\S+)\)", printed)
    assert len(defaults) == len(rules) and (rules or printed.endswith(f"{method} has no settings."))
    assert all(f"{name} {' '.join(rule.help.split())}" in printed for name, rule in rules.items())
    assert configured(method, list(zip(rules, defaults, strict=True))) == METHODS[method]()
    assert ("NAME=VALUE gives a setting of the" in printed) == (method in ("gradual", "sparsellm"))


def tuning(*words):
    return make_parser().parse_args(["prune", "model", "--out", "out", *words])


def test_settings_of_tuning_are_its_own():
    options = tuning("--tune", "--set", "tune.passes=2", "--set", "damping=0.1", "--set", "tune.clip=3")
    assert training_of(options) == (BlockTuning(passes=2, clip=3.0), None)
    assert methods_of(options)[0] == SparseGPT(damping=0.1)
    assert training_of(tuning()) == (None, None)
    assert training_of(tuning("--distill", "30", "--set", "distill.clip=2")) == (None, Distill(steps=30, clip=2.0))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "tune.passes=2"), "--set: expected --tune, which has the setting tune.passes"),
        (("--set", "distill.clip=2"), "--set: expected --distill, which has the setting distill.clip"),
        (("--distill", "9", "--set", "distill.steps=8"), "--set: distill.steps is given twice"),
        (("--tune", "--set", "tune.passes=0"), "BlockTuning.passes: expected a whole number of at least 1, got 0"),
        (("--tune", "--set", "tune.passes=x"), "--set tune.passes: expected a whole number of at least 1, got 'x'"),
        (("--tune", "--set", "tune.speed=1"), "--set: --tune has no setting 'speed', only learning_rate, passes"),
        (("--tune", "--set", "tune.clip=1", "--set", "tune.clip=2"), "--set: tune.clip is given twice"),
    ],
)
def test_bad_settings_of_tuning_are_named(words, message):
    with pytest.raises(ValueError, match=message):
        methods_of(tuning(*words))


@pytest.mark.parametrize(("glob", "pattern"), [("*.up_proj", "2:4"), ("*.a=b", "0.5"), ("[=]", "dense")])
def test_a_glob_may_hold_an_equals_sign(glob, pattern):
    options = make_parser().parse_args(["prune", "model", "--out", "out", "--pattern-for", f"{glob}={pattern}"])
    assert options.pattern_for == [(glob, None if pattern == "dense" else parse_pattern(pattern))]


def test_the_common_options_are_one_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as stopped:
        main(["prune", "--help"])
    printed = capsys.readouterr().out
    assert stopped.value.code == 0 and len(printed.splitlines()) <= 47 and max(map(len, printed.splitlines())) <= 80
    assert all(name in printed for name in METHODS)
