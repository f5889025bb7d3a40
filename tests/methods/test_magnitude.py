import pytest
import torch

import sparsekern
from baselines.textbook import textbook_magnitude
from sparsekern import NM, Magnitude, Unstructured
from sparsekern.methods.selection import global_kept_counts
from tests.models.families import tiny_model


def test_equals_the_textbook_over_the_matrix(layer):
    total = layer.weight.numel()
    expected, mask = textbook_magnitude(layer.weight, sparsity=(total // 2 - 0.5) / total)  # the textbook prunes one more
    solution = Magnitude().solve(layer.weight, None, Unstructured(0.5))
    assert torch.equal(Magnitude().mask_of(layer.weight, Unstructured(0.5)), mask)
    assert torch.equal(solution.weight, expected)
    assert int((~mask).sum()) == total // 2


def test_counts_each_row_by_itself(layer):
    solution = Magnitude(scope="row").solve(layer.weight, None, Unstructured(0.3))
    for row, mask in zip(layer.weight, solution.weight != 0, strict=True):
        assert int((~mask).sum()) == int(64 * 0.3)
        assert row[~mask].abs().max() < row[mask].abs().min()


@pytest.mark.parametrize("n, m", [(2, 4), (1, 8)])
def test_equals_the_textbook_for_n_of_m(layer, n, m):
    expected, mask = textbook_magnitude(layer.weight, n_zeros=m - n, m=m)
    solution = Magnitude().solve(layer.weight, None, NM(n, m))
    assert torch.equal(Magnitude().mask_of(layer.weight, NM(n, m)), mask)
    assert torch.equal(solution.weight, expected)


def test_ties_are_cut_exactly():
    weight = torch.ones(4, 8, dtype=torch.bfloat16)
    solution = Magnitude().solve(weight, None, Unstructured(0.5))
    assert int((solution.weight == 0).sum()) == 16
    assert (solution.weight != 0)[:2].all()  # of equal weights the lower index is kept


def test_refuses_an_unknown_scope():
    with pytest.raises(ValueError, match="Magnitude.scope: expected one of 'matrix', 'row', 'global', got 'block'"):
        Magnitude(scope="block")


def zeros_by_one_sort(model, names, sparsity):
    """Brute force: all the weights in one row, a stable sort, the last `floor(sparsity * count)` go."""
    weights = {name: model.get_submodule(name).weight.detach() for name in names}
    scores = torch.cat([weight.abs().flatten().double() for weight in weights.values()])
    gone = scores.sort(descending=True, stable=True).indices[len(scores) - int(len(scores) * sparsity) :]
    flat = torch.zeros(len(scores), dtype=torch.bool)
    flat[gone] = True
    parts = flat.split([weight.numel() for weight in weights.values()])
    return {name: part.view(weight.shape) for (name, weight), part in zip(weights.items(), parts, strict=True)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_one_threshold_over_all_linears(dtype, sparsity):
    model = tiny_model("llama", dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # full of ties, within linears and between them
            parameter.mul_(40).round_()
        model.model.layers[1].mlp.up_proj.weight.mul_(10)
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, module in model.named_modules() if ".layers." in name and isinstance(module, torch.nn.Linear)]
    expected = zeros_by_one_sort(model, names, sparsity)
    sparsekern.prune(model, Magnitude(scope="global"), sparsity, progress=False)
    for name, gone in expected.items():
        weight = dense[f"{name}.weight"]
        assert torch.equal(model.get_submodule(name).weight, weight.masked_fill(gone, 0)), name


def test_one_threshold_for_each_sparsity_asked_for():
    model = tiny_model("llama")
    patterns = {"*.q_proj": "2:4", "*.mlp.*": 0.75}
    report = sparsekern.prune(model, Magnitude(scope="global"), 0.25, patterns=patterns, progress=False)
    found = {layer.name: (layer.zeros, layer.shape[0] * layer.shape[1]) for layer in report.layers}
    for part, sparsity in (("q_proj", 0.5), ("mlp", 0.75), ("k_proj v_proj o_proj", 0.25)):
        chosen = [value for name, value in found.items() if any(word in name for word in part.split())]
        assert sum(zeros for zeros, _ in chosen) == int(sparsity * sum(total for _, total in chosen))
    assert {layer.pattern for layer in report.layers if "q_proj" in layer.name} == {"2:4"}


def test_counts_over_many_matrices_are_exact(generator):
    matrices = [torch.randn(n, 7, generator=generator).abs() ** 3 for n in (1, 40, 300)] + [torch.zeros(5, 5)]
    for sparsity in (0.01, 0.37, 0.999):
        counts = global_kept_counts([lambda m=m: m for m in matrices], sparsity)
        total = sum(m.numel() for m in matrices)
        threshold = torch.cat([m.flatten() for m in matrices]).sort(descending=True).values[sum(counts) - 1]
        assert sum(counts) == total - int(total * sparsity)
        for matrix, count in zip(matrices, counts, strict=True):
            assert (matrix > threshold).sum() <= count <= (matrix >= threshold).sum()


def test_a_threshold_that_leaves_nothing_of_a_linear():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.mul_(1e-6)
    message = "Magnitude.scope='global': a sparsity of 0.5 leaves nothing of model.layers.2.mlp.down_proj; ask for less"
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, Magnitude(scope="global"), 0.5, progress=False)
