"""Every family of the table in the documentation: loaded, pruned, saved and loaded again, against a plain oracle."""

from __future__ import annotations

import pytest
import transformers

import sparsekern
from tests.models.zoo import ZOO
from tests.models.zoo.checks import check_decisions, check_family
from tests.models.zoo.table import FILE, read_rows, written

ROWS = read_rows()


@pytest.mark.parametrize("name", ROWS)
def test_family_is_as_its_row_says(name, tmp_path):
    if not hasattr(transformers, ZOO[name].architecture):
        pytest.skip(f"transformers {transformers.__version__} has no {ZOO[name].architecture}")
    assert check_family(ZOO[name], tmp_path) == ROWS[name], "python -m tests.models.zoo writes the rows"


def test_every_family_has_a_row_as_the_program_writes_it():
    assert list(ROWS) == list(ZOO)
    assert FILE.read_text(encoding="utf-8") == written(ROWS)


def test_the_check_notices_what_is_wrong():
    """Decisions by other inputs, one decision that is wrong, and a linear that was forgotten."""
    family = ZOO["llama"]
    dense, samples = family.model(), family.samples()

    def pruned(method="wanda", **options):
        model = family.model()
        report = sparsekern.prune(model, method, "2:4", calibration=family.calibration(), progress=False, **options)
        return model, {layer.name for layer in report.layers}

    model, names = pruned()
    check_decisions(family, dense, model, names, samples)
    for other in (pruned("magnitude"), pruned(exclude=["*.o_proj"]), (family.model(), names)):
        with pytest.raises(AssertionError):
            check_decisions(family, dense, *other, samples)
    weight = model.model.layers[1].mlp.down_proj.weight.data
    weight[5, :4] = dense.model.layers[1].mlp.down_proj.weight.data[5, :4] * (weight[5, :4] == 0)
    with pytest.raises(AssertionError, match="down_proj: a weight was dropped"):
        check_decisions(family, dense, model, names, samples)
