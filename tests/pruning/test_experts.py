"""Experts of mixtures: every method, weighting, budget and policy, against a plain oracle."""

import copy
import weakref

import pytest
import torch
import transformers as tf
from torch import nn

import sparsekern
from sparsekern.methods import Gram
from sparsekern.pruning.blockwise import experts as blockwise_experts
from sparsekern.pruning.checkpoint import Checkpoint
from tests.models.families import LLAMA_LIKE, tiny_ids
from tests.models.test_experts import tiny_mixture
from tests.pruning.expert_oracle import fused_modules, magnitude, matrix, oracle, sparsegpt, wanda
from tests.pruning.test_blocks_that_cannot_be_followed import Toy
from tests.pruning.test_families import padded_batch

QUIET = {"progress": False}
FEW = "ignore:.*(calibration tokens for|router gates):sparsekern.SparsekernWarning"
pytestmark = pytest.mark.filterwarnings(FEW)


BLOCKS = {"dbrx": "transformer.blocks"}
KINDS = ("mixtral", "qwen3_moe", "gpt_oss", "llama4", "dbrx", "deepseek_v3")


TIES = 2e-3  # share of the zeros that may be elsewhere: rounding decides between weights whose costs differ in the last bits alone


def assert_same(model, expected) -> None:
    """Up to the first tie, values are compared one by one. What is behind it has other inputs, and is compared as a whole."""
    is_behind_a_tie = False
    for (name, found), wanted in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        tied = (found == 0) != (wanted == 0)
        assert tied.float().mean() <= TIES, name
        if is_behind_a_tie := is_behind_a_tie or bool(tied.any()):
            same = (
                ~tied if tied.dim() < 2 else ~(tied.any(-1, keepdim=True) | tied.any(-2, keepdim=True))
            )  # outputs are rows or columns
            assert (found - wanted)[same].norm() <= 5e-3 * wanted.norm(), name
        else:
            torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_every_expert_is_pruned_by_its_own_tokens(kind):
    model, ids = tiny_mixture(kind), tiny_ids(8, 16)
    expected = copy.deepcopy(model)
    grams = oracle(expected, [{"input_ids": sample[None]} for sample in ids], sparsegpt, BLOCKS.get(kind, "model.layers"))
    report = sparsekern.prune(model, "sparsegpt", "2:4", ids, batch_size=5, **QUIET)
    assert {layer.name for layer in report.layers} == set(grams)
    assert_same(model, expected)
    assert report.sparsity == 0.5
    assert model(ids[:2]).logits.isfinite().all()


@pytest.mark.parametrize("kind", ("mixtral", "llama4"))
def test_padding_reaches_no_expert(kind):
    model = tiny_mixture(kind)
    samples = [sample[:length] for sample, length in zip(tiny_ids(12), 2 * (16, 9, 12, 16, 5, 14), strict=True)]
    expected = copy.deepcopy(model)
    oracle(expected, [{"input_ids": sample[None]} for sample in samples], sparsegpt)
    batches = [padded_batch(samples[:5], "left"), padded_batch(samples[5:], "left")]
    report = sparsekern.prune(model, "sparsegpt", "2:4", batches, **QUIET)
    assert report.calibration_tokens == sum(map(len, samples))
    assert_same(model, expected)


def few_routed(model, expert: int = 3):
    """Make the first layer's router never choose one expert, so that no token reaches it."""
    gate = model.model.layers[0].mlp.gate
    first = gate.register_forward_hook(lambda module, args, output: (output[0], output[1], output[2] % expert))
    return first


@pytest.mark.parametrize("kind", ("mixtral", "gpt_oss"))
def test_routing_weights_scale_the_tokens(kind):
    model, ids = tiny_mixture(kind), tiny_ids(8, 12)
    expected = copy.deepcopy(model)
    oracle(expected, [{"input_ids": sample[None]} for sample in ids], wanda, weighting="routing")
    sparsekern.prune(model, "wanda", "2:4", ids, weighting="routing", **QUIET)
    assert_same(model, expected)
    equal = tiny_mixture(kind)
    sparsekern.prune(equal, "wanda", "2:4", ids, **QUIET)
    assert any(not torch.equal(a == 0, b == 0) for a, b in zip(equal.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("unseen", ("magnitude", "dense"))
def test_experts_without_tokens_follow_the_policy_and_are_named_once(unseen):
    model = tiny_mixture("mixtral")
    dense = matrix(model.model.layers[0].mlp.experts, 3, "down_proj").clone()
    few_routed(model)
    with pytest.warns(sparsekern.SparsekernWarning) as said:
        report = sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(), unseen=unseen, **QUIET)
    (message,) = [str(warning.message) for warning in said if "no calibration token reached" in str(warning.message)]
    assert "model.layers.0.mlp.experts.3.gate_proj" in message and "(shown once)" in message
    found = matrix(model.model.layers[0].mlp.experts, 3, "down_proj")
    assert torch.equal(found, dense if unseen == "dense" else magnitude(dense))
    layers = {layer.name: layer for layer in report.layers}
    assert layers["model.layers.0.mlp.experts.3.down_proj"].pattern == ("dense" if unseen == "dense" else "2:4")
    assert layers["model.layers.0.mlp.experts.3.down_proj"].error is None
    assert layers["model.layers.0.mlp.experts.2.down_proj"].error > 0


def test_an_expert_without_tokens_can_be_an_error_before_its_block_is_changed():
    model = tiny_mixture("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    few_routed(model)
    with pytest.raises(ValueError, match=r"unseen: no calibration token reached model.layers.0.mlp.experts.3.gate_proj, .*up_proj"):
        sparsekern.prune(model, "wanda", "2:4", tiny_ids(), unseen="error", **QUIET)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_budget_bounds_the_statistics_and_changes_no_bit(monkeypatch):
    """The peak of live Gram matrices follows the budget, not the number of experts."""

    def run(experts: int, budget: int):
        config = tf.MixtralConfig(**{**LLAMA_LIKE, "num_hidden_layers": 1}, num_experts_per_tok=4, num_local_experts=experts)
        torch.manual_seed(0)
        model = tf.AutoModelForCausalLM.from_config(config).eval()
        live: dict[int, int] = {}
        peak = [0]
        plain = Gram.__init__

        def counted(self, features, device):
            plain(self, features, device)
            live[id(self)] = 2 * 4 * features**2  # with its factor
            weakref.finalize(self, live.pop, id(self))
            peak[0] = max(peak[0], sum(live.values()))

        with monkeypatch.context() as patch:
            patch.setattr(Gram, "__init__", counted)
            patch.setattr(blockwise_experts, "EXPERT_BYTES", budget)
            report = sparsekern.prune(model, "sparsegpt", "2:4", tiny_ids(4, 8), **QUIET)
        return model, peak[0], [layer.error for layer in report.layers]

    expert = 2 * 4 * (32**2 + 48**2)
    attention = 2 * 4 * 3 * 32**2  # two sets of linears, and a copy while they are told apart
    small, at_small, errors = run(32, 3 * expert)
    large, at_large, at_once = run(32, 100 * expert)
    _, of_few, _ = run(8, 3 * expert)
    assert at_small == of_few <= 3 * expert + attention
    assert at_large >= 30 * expert
    assert errors == at_once
    assert all(torch.equal(a, b) for a, b in zip(small.parameters(), large.parameters(), strict=True))


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, monkeypatch):
    ids, whole = tiny_ids(4, 12), tiny_mixture("qwen3_moe")
    sparsekern.prune(whole, "sparsegpt", "2:4", ids, out=tmp_path / "whole", unseen="dense", **QUIET)
    save = Checkpoint.save

    def killed(self, index, result):
        save(self, index, result)
        if index == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        sparsekern.prune(tiny_mixture("qwen3_moe"), "sparsegpt", "2:4", ids, out=tmp_path / "cut", unseen="dense", **QUIET)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another run, with another unseen"):
        sparsekern.prune(tiny_mixture("qwen3_moe"), "sparsegpt", "2:4", ids, out=tmp_path / "cut", resume=True, **QUIET)
    resumed = tiny_mixture("qwen3_moe")
    report = sparsekern.prune(resumed, "sparsegpt", "2:4", ids, out=tmp_path / "cut", resume=True, unseen="dense", **QUIET)
    assert report.resumed_blocks == 2
    loaded = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other) and torch.equal(value, loaded.state_dict()[name]), name


def test_globs_choose_single_matrices():
    model = tiny_mixture("gpt_oss")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = sparsekern.prune(
        model,
        "wanda",
        "2:4",
        tiny_ids(4, 12),
        include="*.experts.*",
        exclude=["*.experts.[023].*", "*.up_proj"],
        patterns={"*.1.mlp.*": None, "*.down_proj": "1:4"},
        **QUIET,
    )
    names = {f"model.layers.{layer}.mlp.experts.1.{part}" for layer in (0, 2) for part in ("gate_proj", "down_proj")}
    assert {layer.name: layer.pattern for layer in report.layers} == {n: "1:4" if "down" in n else "2:4" for n in names}
    for name, value in model.state_dict().items():
        changed = (value != before[name]).nonzero()
        assert (len(changed) > 0) == (name.endswith(("gate_up_proj", "down_proj")) and ".1.mlp" not in name), name
        assert (changed[:, 0] == 1).all()
        assert not name.endswith("gate_up_proj") or (changed[:, 2] % 2 == 0).all()  # the gate's columns alone


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"include": "*.experts.9.*"}, r"include: '\*.experts.9.\*' matches no linear"),
        ({"pattern": "2:5"}, "model.layers.0.self_attn.q_proj: "),
        ({"include": "*.down_proj", "pattern": "3:5"}, "model.layers.0.mlp.experts.0.down_proj: "),
        ({"weighting": "gate"}, "weighting: expected one of 'equal', 'routing', got 'gate'"),
        ({"unseen": "drop"}, "unseen: expected one of 'magnitude', 'dense', 'error', got 'drop'"),
        ({"method": "magnitude", "weighting": "routing"}, "weighting: expected 'equal' for Magnitude"),
        ({"include": "*.self_attn.*", "weighting": "routing"}, "weighting: 'routing' expected fused experts, found no experts"),
    ],
)
def test_bad_input_is_refused_before_any_work(options, message):
    model = tiny_mixture("mixtral")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, **{"method": "wanda", "calibration": tiny_ids(2, 8), **QUIET, **options})
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_value_that_is_not_finite_is_located_by_expert_and_sample():
    model, ids = tiny_mixture("mixtral"), tiny_ids(6, 8)
    seen = []
    handle = model.model.layers[0].mlp.experts.register_forward_pre_hook(lambda module, args: seen.append(args[1]))
    model(ids)
    handle.remove()
    sample = int((seen[0] == 2).any(1).view(6, 8).any(1).nonzero()[0])  # the first that expert 2 sees a token of
    matrix(model.model.layers[0].mlp.experts, 2, "up_proj").fill_(3e38)
    with pytest.raises(ValueError, match=rf"experts.2.down_proj: its input is -?(inf|nan) in calibration sample {sample} "):
        sparsekern.prune(model, "wanda", "2:4", ids, batch_size=4, **QUIET)


def test_a_module_that_computes_something_else_is_refused():
    model = tiny_mixture("mixtral")
    model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(ValueError, match=r"layers.1.mlp.experts \(MixtralExperts\) computes something else"):
        sparsekern.prune(model, "wanda", "2:4", tiny_ids(2, 8), **QUIET)


def test_an_expert_that_a_dataset_misses_keeps_its_earlier_statistics(tmp_path):
    first, second = tiny_ids(6, 12, seed=2), tiny_ids(6, 12, seed=3)
    model = tiny_mixture("mixtral")
    options = {"method": "wanda", "pattern": "2:4", "state": tmp_path, **QUIET}
    sparsekern.prune_continually(model, {"first": first}, **options)
    alone = copy.deepcopy(model.model.layers[0].mlp.experts)
    handle = few_routed(model)
    sparsekern.prune_continually(model, {"second": second}, **options)
    handle.remove()
    now, dense = model.model.layers[0].mlp.experts, tiny_mixture("mixtral").model.layers[0].mlp.experts
    assert all(torch.equal(matrix(now, 3, part), matrix(alone, 3, part)) for part in ("gate_proj", "up_proj", "down_proj"))
    assert not torch.equal(matrix(alone, 3, "down_proj") == 0, magnitude(matrix(dense, 3, "down_proj")) == 0)
    assert not torch.equal(matrix(now, 2, "down_proj"), matrix(alone, 2, "down_proj"))


@pytest.mark.parametrize("kind", ("mixtral", "gpt_oss", "dbrx"))
def test_training_keeps_the_zeros_of_experts(kind):
    model, ids = tiny_mixture(kind), tiny_ids(2, 8)
    report = sparsekern.prune(model, "magnitude", "2:4", exclude="*.experts.1.up_proj", **QUIET)
    zeros = {name: value == 0 for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    with sparsekern.keep_sparsity(model) as keeper:
        assert set(keeper.names) == {layer.name for layer in report.layers} and keeper.sparsity == 0.5
        for _ in range(2):
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    free = matrix(dict(model.named_modules())[next(n for n in fused_modules(model))], 1, "up_proj")
    assert (free != 0).all()
    for name, parameter in model.named_parameters():
        if "experts" in name and not name.endswith("bias"):
            assert torch.equal(parameter == 0, zeros[name]) and (parameter.grad[zeros[name]] == 0).all(), name


def test_gradual_pruning_trains_the_experts_that_stay():
    model, ids = tiny_mixture("qwen3_moe"), tiny_ids(4, 8)
    before = model.model.layers[0].mlp.experts.down_proj.detach().clone()
    report = sparsekern.prune(model, sparsekern.Gradual(steps=2, train_steps=1), "2:4", ids, **QUIET)
    after = model.model.layers[0].mlp.experts.down_proj
    assert report.sparsity == 0.5 and (after == 0).float().mean() == 0.5
    assert not torch.equal(after[after != 0], before[after != 0])


def test_structured_pruning_cuts_neurons_of_experts():
    model = tiny_mixture("gpt_oss")
    sparsekern.prune(model, sparsekern.Structured(units="neurons"), 0.5, **QUIET)
    for module in fused_modules(model).values():
        for expert in range(4):
            gone = (matrix(module, expert, "down_proj") == 0).all(0)
            assert int(gone.sum()) == 24
            assert all(torch.equal((matrix(module, expert, part) == 0).all(1), gone) for part in ("gate_proj", "up_proj"))


def test_sparsellm_solves_experts_one_matrix_at_a_time():
    model, ids = tiny_mixture("mixtral"), tiny_ids(4, 12)
    alone = copy.deepcopy(model)
    sparsekern.prune(model, sparsekern.SparseLLM(iterations=2), "2:4", ids, **QUIET)
    sparsekern.prune(alone, "sparsegpt", "2:4", ids, **QUIET)
    assert_same(model, alone)


def test_experts_with_linears_of_their_own(tmp_path):
    """Switch and NLLB hold a dictionary of modules: the same policy."""

    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 4)
            self.experts = nn.ModuleDict(
                {f"expert_{i}": nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for i in range(4)}
            )

        def forward(self, x):
            rows = x.reshape(-1, 8)
            chosen = self.router(rows)[:, :3].argmax(1)  # never the last
            out = rows.clone()
            for i, expert in enumerate(self.experts.values()):
                if (seen := chosen == i).any():
                    out[seen] += expert(rows[seen])
            return out.view_as(x)

    torch.manual_seed(0)
    model = Toy([Listed(), Listed()])
    dense = copy.deepcopy(model)
    last = "layers.0.experts.expert_3"
    ids = torch.randint(0, 16, (16, 8), generator=torch.Generator().manual_seed(1))
    with pytest.raises(ValueError, match=f"unseen: no calibration token reached {last}.0, {last}.2"):
        sparsekern.prune(model, "wanda", "2:4", ids, unseen="error", **QUIET)
    with pytest.raises(ValueError, match="weighting: 'routing' expected fused experts, found layers.0.experts.expert_0.0, "):
        sparsekern.prune(model, "wanda", "2:4", ids, weighting="routing", **QUIET)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), dense.parameters(), strict=True))
    with pytest.warns(sparsekern.SparsekernWarning, match=f"no calibration token reached {last}.0, {last}.2, .* by magnitude"):
        report = sparsekern.prune(model, "wanda", "2:4", ids, **QUIET)
    assert report.sparsity == 0.5 and len(report.layers) == 16
    assert report.model_parameters == sum(p.numel() for p in model.parameters())
    others = report.model_parameters - sum(layer.shape[0] * layer.shape[1] for layer in report.layers)
    assert others and report.model_sparsity == 0.5 * (1 - others / report.model_parameters)
    for layer, before in zip(model.layers, dense.layers, strict=True):
        assert torch.equal(layer.router.weight, before.router.weight)
        for found, own in ((layer.experts.expert_3[i].weight, before.experts.expert_3[i].weight) for i in (0, 2)):
            assert torch.equal(found, magnitude(own))
