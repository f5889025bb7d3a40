import json

import pytest

from sparsekern import Magnitude, SparseGPT, Wanda
from sparsekern.methods import METHODS, resolve_method


def test_a_name_is_the_paper_s_defaults():
    assert resolve_method("sparsegpt") == SparseGPT(damping=0.01, block_size=128, scope="block", mask=None)
    assert resolve_method("wanda") == Wanda()
    assert resolve_method("magnitude") == Magnitude(scope="matrix")


def test_a_config_is_itself():
    config = SparseGPT(damping=0.1)
    assert resolve_method(config) is config


@pytest.mark.parametrize("name", METHODS)
def test_settings_go_through_json(name):
    settings = METHODS[name]().settings()
    assert settings["name"] == name
    assert json.loads(json.dumps(settings)) == settings


def test_unknown_method():
    names = ", ".join(sorted(METHODS))
    with pytest.raises(ValueError, match=f"method: expected one of {names} or a config .* got 'optimal'"):
        resolve_method("optimal")
    with pytest.raises(TypeError, match="method: expected a name or a config such as SparseGPT"):
        resolve_method(3)
