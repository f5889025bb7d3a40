"""What `prune` does with its arguments, on a tiny LLaMA (the families have their own file)."""

import copy

import pytest
import torch
from torch import nn

import sparsekern
from sparsekern import NM, Magnitude, SparseGPT, Unstructured
from tests.models.families import tiny_ids, tiny_model

QUIET = {"progress": False}


def zeros(weight: torch.Tensor) -> float:
    return float((weight == 0).float().mean())


@pytest.fixture
def model():
    return tiny_model("llama")


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
@pytest.mark.parametrize("pattern", ["2:4", "1:4", 0.5, "30%", NM(4, 8), Unstructured(0.25)])
def test_every_method_reaches_every_pattern(model, method, pattern):
    report = sparsekern.prune(model, method, pattern, tiny_ids(), **QUIET)
    expected = sparsekern.pattern.parse_pattern(pattern).sparsity
    for layer in report.layers:
        weight = model.get_submodule(layer.name).weight
        assert layer.sparsity == pytest.approx(expected, abs=0.03)
        assert layer.zeros == int((weight == 0).sum())
        assert layer.shape == tuple(weight.shape)
        if isinstance(pattern, NM) or pattern in ("2:4", "1:4"):
            n, m = (pattern.n, pattern.m) if isinstance(pattern, NM) else map(int, pattern.split(":"))
            assert ((weight != 0).unflatten(1, (-1, m)).sum(2) <= n).all()
    assert report.sparsity == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_half_precision_models_stay_half(method, dtype):
    model = tiny_model("llama", dtype)
    report = sparsekern.prune(model, method, "2:4", tiny_ids(), report_error=True, **QUIET)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert report.sparsity == 0.5
    assert all(0 < layer.error < 0.5 for layer in report.layers)


def test_magnitude_needs_no_data_and_runs_nothing(model):
    model.forward = None  # calling the model would fail
    report = sparsekern.prune(model, "magnitude", "2:4", **QUIET)
    assert report.sparsity == 0.5
    assert [layer.error for layer in report.layers] == [None] * 21
    assert report.calibration_tokens == 0


def test_errors_are_those_of_the_definition(model):
    """The first block's errors, from the Gram matrices of a plain forward."""
    dense, ids = copy.deepcopy(model), tiny_ids()
    inputs = {}
    names = ["self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj"]
    for name in names:
        module = dense.model.layers[0].get_submodule(name)
        module.register_forward_pre_hook(lambda module, args, name=name: inputs.setdefault(name, args[0]))
    with torch.no_grad():
        dense(ids)
    for method in ("magnitude", "wanda", "sparsegpt", "alps"):
        pruned = copy.deepcopy(model)
        report = sparsekern.prune(pruned, method, "2:4", ids, report_error=True, **QUIET)
        errors = {layer.name: layer.error for layer in report.layers}
        for name in names:
            x = inputs[name].flatten(0, 1).double()
            before, after = (m.model.layers[0].get_submodule(name).weight.detach().double() for m in (dense, pruned))
            expected = (x @ (after - before).T).square().sum() / (x @ before.T).square().sum()
            assert errors[f"model.layers.0.{name}"] == pytest.approx(float(expected), rel=1e-3)


def test_wanda_takes_no_gram_matrix_unless_asked(model, monkeypatch):
    from sparsekern.pruning.blockwise import statistics

    monkeypatch.setattr(statistics.Gram, "add", None)
    report = sparsekern.prune(model, "wanda", "2:4", tiny_ids(), **QUIET)
    assert {layer.error for layer in report.layers} == {None}


def test_query_key_value_share_one_factor(model, monkeypatch):
    from sparsekern import ops

    factored = []
    plain = ops.reverse_cholesky
    monkeypatch.setattr(ops, "reverse_cholesky", lambda gram, damping: factored.append(gram.shape[0]) or plain(gram, damping))
    sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), **QUIET)
    assert sorted(factored) == sorted([32, 32, 32, 48] * 3)  # q/k/v, o, gate/up, down


def test_the_last_linear_of_a_block_runs_once_and_the_head_never(model, monkeypatch):
    calls = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(lambda module, args, output, name=name: calls.append((name, args[0].shape[0])))
    sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(6, 16), batch_size=2, **QUIET)
    whole = [name for name, samples in calls if samples == 2]  # that of the sample that is watched first is not counted
    assert whole.count("lm_head") == 0
    for index, block in enumerate(("model.layers.0", "model.layers.1", "model.layers.2")):
        last = index == 2
        assert whole.count(f"{block}.mlp.up_proj") == (3 if last else 6)  # three batches, two passes
        assert whole.count(f"{block}.mlp.down_proj") == (0 if last else 3)  # only in the second pass


def test_batches_come_in_any_form(model):
    ids = tiny_ids(8, 16)
    forms = [
        {"calibration": ids, "batch_size": 2},
        {"calibration": (part for part in ids.split(2))},
        {"calibration": [{"input_ids": part} for part in ids.split(2)]},
        {"calibration": [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in ids.split(2)]},
        {"calibration": [{"input_ids": part, "labels": part} for part in ids.split(2)]},
        {"calibration": ids.int(), "batch_size": 2},
    ]
    results = []
    for form in forms:
        pruned = copy.deepcopy(model)
        report = sparsekern.prune(pruned, "sparsegpt", "2:4", **form, **QUIET)
        assert report.calibration_tokens == 128
        results.append(torch.cat([parameter.flatten() for parameter in pruned.parameters()]))
    assert all(torch.equal(result, results[0]) for result in results)


def test_is_deterministic_and_leaves_the_generator_alone(model):
    torch.manual_seed(7)
    expected = torch.rand(3)
    results = []
    for _ in range(2):
        pruned = copy.deepcopy(model)
        torch.manual_seed(7)
        sparsekern.prune(pruned, "sparsegpt", 0.5, tiny_ids(), **QUIET)
        assert torch.equal(torch.rand(3), expected)
        results.append(pruned.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


def test_modes_hooks_and_forwards_are_put_back(model):
    model.train()
    model.model.layers[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), **QUIET)
    assert {name: module.training for name, module in model.named_modules()} == modes
    for module in model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert "forward" not in module.__dict__
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_everything_is_put_back_after_a_failure(model, monkeypatch):
    model.train()
    before = copy.deepcopy(model.state_dict())

    def fail(*args):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(SparseGPT, "solve", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), **QUIET)
    assert all(module.training for module in model.modules())
    assert all(not module._forward_pre_hooks and "forward" not in module.__dict__ for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_include_exclude_and_patterns(model):
    report = sparsekern.prune(
        model,
        "magnitude",
        "2:4",
        include=["*.mlp.*", "*.q_proj"],
        exclude="model.layers.1.*",
        patterns={"*.0.mlp.up_proj": None, "*.up_proj": "1:4", "*.mlp.*": 0.25},
        **QUIET,
    )
    assert {layer.name: layer.pattern for layer in report.layers} == {
        "model.layers.0.self_attn.q_proj": "2:4",
        "model.layers.0.mlp.gate_proj": "0.25",
        "model.layers.0.mlp.down_proj": "0.25",
        "model.layers.2.self_attn.q_proj": "2:4",
        "model.layers.2.mlp.gate_proj": "0.25",
        "model.layers.2.mlp.up_proj": "1:4",
        "model.layers.2.mlp.down_proj": "0.25",
    }
    assert zeros(model.model.layers[0].mlp.up_proj.weight) == 0
    assert zeros(model.model.layers[2].mlp.up_proj.weight) == 0.75
    assert zeros(model.model.layers[1].mlp.gate_proj.weight) == 0


def test_blocks_left_dense_are_still_run(model):
    """Pruning only the last block after a dense one equals pruning it alone in a model cut in two."""
    ids, pruned = tiny_ids(), copy.deepcopy(model)
    sparsekern.prune(pruned, "sparsegpt", "2:4", ids, include="model.layers.1.*", **QUIET)
    seen = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    x = seen[0].flatten(0, 1)
    factor = sparsekern.ops.reverse_cholesky(x.T @ x)
    expected, _, _ = sparsekern.ops.obs_sweep(model.model.layers[1].mlp.down_proj.weight.detach(), factor, "2:4")
    torch.testing.assert_close(pruned.model.layers[1].mlp.down_proj.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_lm_head_is_pruned_where_it_is_named(model):
    ids, before = tiny_ids(), model.lm_head.weight.clone()
    report = sparsekern.prune(model, "sparsegpt", "2:4", ids, include=["*", "lm_head"], batch_size=3, **QUIET)
    assert report.layers[-1].name == "lm_head"
    assert len(report.layers) == 22
    with torch.no_grad():
        x = model.model(ids).last_hidden_state.flatten(0, 1)
    expected, _, _ = sparsekern.ops.obs_sweep(before.detach(), sparsekern.ops.reverse_cholesky(x.T @ x), "2:4")
    torch.testing.assert_close(model.lm_head.weight.detach(), expected, rtol=1e-3, atol=1e-4)


def test_lm_head_alone(model):
    report = sparsekern.prune(model, "wanda", 0.5, tiny_ids(), include="lm_head", **QUIET)
    assert [layer.name for layer in report.layers] == ["lm_head"]
    assert zeros(model.lm_head.weight) == 0.5
    assert zeros(model.model.layers[0].mlp.up_proj.weight) == 0


def test_a_tied_head_is_refused_and_ties_stay(model):
    tied = tiny_model("llama_tied")
    with pytest.raises(ValueError, match="lm_head: its weight is tied to model.embed_tokens.weight"):
        sparsekern.prune(tied, "magnitude", include="lm_head", **QUIET)
    sparsekern.prune(tied, "magnitude", **QUIET)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert zeros(tied.lm_head.weight) < 0.02  # the padding token's row


def test_one_linear_called_twice_is_solved_once_from_all_its_inputs(model):
    """Up and gate made one module: both calls count."""
    model.model.layers[0].mlp.up_proj = model.model.layers[0].mlp.gate_proj
    report = sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), **QUIET)
    assert len(report.layers) == 20
    assert zeros(model.model.layers[0].mlp.up_proj.weight) == 0.5


def test_two_linears_with_one_weight_are_solved_once(model):
    block = model.model.layers[1].mlp
    block.up_proj.weight = block.gate_proj.weight
    report = sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), **QUIET)
    assert "model.layers.1.mlp.up_proj" not in {layer.name for layer in report.layers}
    assert block.up_proj.weight is block.gate_proj.weight
    assert zeros(block.up_proj.weight) == 0.5


def test_eager_attention_gives_the_same(model):
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    for candidate in (model, eager):
        sparsekern.prune(candidate, "wanda", "2:4", tiny_ids(), **QUIET)
    for name, value in model.state_dict().items():
        assert torch.equal(value, eager.state_dict()[name]), name


def test_progress_bar_names_layer_error_and_time(model, capfd):
    sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids())
    shown = capfd.readouterr().err
    assert "21/21" in shown and "model.layers.2.mlp.down_proj error " in shown and "s]" in shown


def test_quiet_says_nothing(model, capfd):
    sparsekern.prune(model, Magnitude(), "2:4", **QUIET)
    assert capfd.readouterr() == ("", "")


def test_freed_memory_is_kept_only_during_a_run(monkeypatch):
    """Large tensors freed within stay with the process and fault no pages in again."""
    import platform
    import resource

    from sparsekern.pruning.host_memory import freed_memory_kept

    def faults() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(8):
            torch.ones(4 << 20)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with freed_memory_kept():
        faults()
        again = faults()
    if platform.libc_ver()[0] == "glibc":
        assert again < 1000  # one tensor of 16 MB is 4096 pages
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with freed_memory_kept():
        assert torch.ones(8).sum() == 8
