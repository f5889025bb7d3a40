"""The schedule, and what a config refuses."""

import json

import pytest

from sparsekern import NM, Gradual, Magnitude, Random, SparseGPT, Unstructured


def test_the_cubic_schedule():
    method = Gradual(steps=4)
    assert [method.share(step) for step in range(1, 5)] == [1 - 0.75**3, 1 - 0.5**3, 1 - 0.25**3, 1.0]
    assert method.pattern_after(2, Unstructured(0.8)) == Unstructured(0.8 * 0.875)
    assert method.pattern_after(4, Unstructured(0.8)) == Unstructured(0.8)
    assert Gradual(steps=4, schedule="linear").share(1) == 0.25
    assert Gradual(steps=1).share(1) == 1.0


@pytest.mark.parametrize(
    "steps, pattern, expected",
    [
        (4, NM(2, 4), ["3:4", "3:4", "3:4", "2:4"]),  # 4 (1 - 0.5 s): 2.84, 2.25, 2.03, 2
        (4, NM(1, 8), ["4:8", "2:8", "2:8", "1:8"]),
        (2, NM(2, 4), ["3:4", "2:4"]),
        (1, NM(2, 4), ["2:4"]),
        (3, NM(3, 4), ["None", "None", "3:4"]),
    ],
)
def test_n_of_m_goes_by_its_n(steps, pattern, expected):
    method = Gradual(steps=steps)
    found = [method.pattern_after(step, pattern) for step in range(1, steps + 1)]
    assert [str(value) for value in found] == expected
    kept = [pattern.m if value is None else value.n for value in found]
    assert kept == sorted(kept, reverse=True)


def test_criteria_by_name_or_config():
    assert Gradual().criterion == Magnitude() and Gradual("random").criterion == Random()
    config = Gradual(criterion=Magnitude(scope="global"))
    assert config.settings()["criterion"] == {"name": "magnitude", "scope": "global"}
    assert json.loads(json.dumps(config.settings())) == config.settings()
    assert hash(config) == hash(Gradual(criterion=Magnitude(scope="global")))


def test_what_trains():
    assert Gradual().trains and Gradual(epochs=0, train_steps=3).trains
    assert not Gradual(epochs=0).trains and not Gradual(train_steps=0).trains


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"criterion": "wanda"}, ValueError, "Gradual.criterion: expected one of 'magnitude', 'random', 'structured', got 'wanda'"),
        ({"criterion": SparseGPT()}, TypeError, "Gradual.criterion: expected .* or a config of one, got SparseGPT"),
        ({"criterion": None}, TypeError, "Gradual.criterion: expected .* got None"),
        ({"steps": 0}, ValueError, "Gradual.steps: expected a whole number of at least 1, got 0"),
        ({"steps": 1.5}, ValueError, "Gradual.steps: expected a whole number .* got 1.5"),
        ({"schedule": "quartic"}, ValueError, "Gradual.schedule: expected one of 'cubic', 'linear', got 'quartic'"),
        ({"epochs": -1}, ValueError, "Gradual.epochs: expected a whole number of at least 0, got -1"),
        ({"train_steps": True}, ValueError, "Gradual.train_steps: expected a whole number of at least 0, or None, got True"),
        ({"batch_tokens": 0}, ValueError, "Gradual.batch_tokens: expected a whole number of at least 1, got 0"),
        ({"learning_rate": 0}, ValueError, "Gradual.learning_rate: expected a number above 0, got 0"),
        ({"learning_rate": float("nan")}, ValueError, "Gradual.learning_rate: expected a number above 0, got nan"),
        ({"warmup": 1.1}, ValueError, "Gradual.warmup: expected a number of at least 0 and at most 1, got 1.1"),
        ({"weight_decay": -1}, ValueError, "Gradual.weight_decay: expected a number of at least 0, got -1"),
        ({"clip": "much"}, ValueError, "Gradual.clip: expected a number above 0, got 'much'"),
    ],
)
def test_bad_settings(arguments, error, message):
    with pytest.raises(error, match=message):
        Gradual(**arguments)
