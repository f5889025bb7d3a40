"""Removal of experts that are modules of their own: scores and logits against what a plain forward shows."""

import pytest
import torch
import transformers as tf
from torch import nn

import sparsekern
from sparsekern import ExpertPruning
from tests.models.families import LLAMA_LIKE, tiny_ids
from tests.models.test_mixtures import avoiding
from tests.models.zoo import ZOO

COUNT, CHOSEN, WIDTH = 8, 2, 32
IDS = tiny_ids(3, 12)
MASK = (torch.arange(12) < torch.tensor([12, 7, 10])[:, None]).long()


class Mixture(nn.Module):
    """Mixtral's mixture as it was before its experts were fused."""

    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(WIDTH, config.num_local_experts, bias=False)
        made = (nn.Sequential(nn.Linear(WIDTH, 24), nn.SiLU(), nn.Linear(24, WIDTH)) for _ in range(config.num_local_experts))
        self.experts = nn.ModuleList(made)

    def forward(self, hidden):
        x = hidden.reshape(-1, WIDTH)
        weights, chosen = self.gate(x).softmax(1).topk(CHOSEN, 1)
        weights = weights / weights.sum(1, keepdim=True)
        total = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows, place = torch.where(chosen == number)
            total.index_add_(0, rows, expert(x[rows]) * weights[rows, place, None])
        return self.finished(total).view_as(hidden)

    def finished(self, total):
        return total


class Listed(tf.LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[1:]:
            layer.mlp = Mixture(config)


def listed():
    torch.manual_seed(0)
    return Listed(tf.LlamaConfig(**LLAMA_LIKE, num_local_experts=COUNT)).eval()


def switch():
    config = ZOO["switch_transformers"].config()
    config.num_experts = COUNT
    torch.manual_seed(0)
    model = tf.SwitchTransformersForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def batches(model) -> list[dict[str, torch.Tensor]]:
    decoded = {"decoder_input_ids": IDS.flip(1)} if model.config.is_encoder_decoder else {}
    return [{"input_ids": IDS, "attention_mask": MASK, **decoded}]


@torch.no_grad()
def plain_scores(model, name: str) -> list[float]:
    """REAP's scores of a mixture in float64, token by token, from the inputs of its module in a plain forward."""
    owner, seen = model.double().get_submodule(name), []
    owner.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model(**batches(model)[0])
    real = MASK if "decoder" not in name else torch.ones_like(MASK)
    found: list[list[float]] = [[] for _ in range(COUNT)]
    for x in seen[0].reshape(-1, WIDTH)[real.flatten().bool()]:
        router = owner.router.classifier if hasattr(owner, "router") else owner.gate
        share = (router.weight.double() @ x).softmax(0)
        highest = share.topk(1 if hasattr(owner, "router") else CHOSEN)
        scale = 1 if hasattr(owner, "router") else highest.values.sum()
        for weight, number in zip(highest.values / scale, highest.indices.tolist(), strict=True):
            expert = list(owner.experts.children())[number]
            found[number].append(float(weight * expert(x[None]).norm()))
    return [sum(scores) / max(len(scores), 1) for scores in found]


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
@pytest.mark.parametrize("make", [listed, switch])
def test_the_folder_is_the_model_whose_router_avoids_the_removed_experts(make, tmp_path):
    model, masked = make(), make()
    report = sparsekern.prune(model, ExpertPruning(), calibration=batches(model), progress=False, out=tmp_path / "out")
    assert report.experts == (COUNT, 6) and len(report.layers) == 2
    for layer in report.layers:
        owner = layer.name.rpartition(".")[0]
        assert layer.scores == pytest.approx(plain_scores(make(), owner), rel=1e-4)
        avoiding(masked, owner, layer.removed)
    loaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values())
    with torch.no_grad():
        expected, before = masked(**batches(model)[0]).logits, make()(**batches(model)[0]).logits
        assert (expected - before).norm() > 1e-4 * before.norm()  # the removed experts mattered
        for smaller in (model, loaded.eval()):
            torch.testing.assert_close(smaller(**batches(model)[0]).logits, expected, rtol=1e-4, atol=1e-5)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.filterwarnings("ignore::sparsekern.SparsekernWarning")  # of few tokens
def test_another_method_prunes_what_is_left():
    model = listed()
    report = sparsekern.prune(model, ExpertPruning(), "2:4", batches(model), then="wanda", progress=False)
    assert "model.layers.2.mlp.experts.5.2" in {layer.name for layer in report.then.layers}
    assert report.then.sparsity == 0.5


class Normed(Mixture):
    def finished(self, total):
        return nn.functional.layer_norm(total, (WIDTH,))


class Twice(Mixture):
    def forward(self, hidden):
        return super().forward(torch.cat((hidden, hidden), 1))[:, : hidden.shape[1]]


def replaced(kind):
    model = listed()
    for layer in model.model.layers[1:]:
        layer.mlp.__class__ = kind
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replaced(Normed), "more is done with the outputs of model.layers.1.mlp.experts than to scale and add them"),
        (
            lambda: replaced(Twice),
            "which tokens expert . of model.layers.1.mlp.experts is called with cannot be told|more than once",
        ),
        (ZOO["nllb_moe"].model, "model.encoder.layers.1.ffn.experts hands a token to expert 0 more than once"),
    ],
)
def test_what_has_no_scores_is_refused_before_the_work(make, message):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forwards = {name for name, module in model.named_modules() if "forward" in vars(module)}
    with pytest.raises(ValueError, match=message):
        sparsekern.prune(model, ExpertPruning(remove=0.5), calibration=batches(model), progress=False)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert forwards == {name for name, module in model.named_modules() if "forward" in vars(module)}


def test_a_token_that_needs_more_experts_than_are_left():
    with pytest.raises(ValueError, match="expected to leave at least 2 experts .* model.layers.1.mlp.experts, got 1"):
        sparsekern.prune(model := listed(), ExpertPruning(remove=0.9), calibration=batches(model), progress=False)


def test_a_streamed_model_is_refused(tmp_path):
    switch().save_pretrained(tmp_path / "switch")
    model = sparsekern.load(tmp_path / "switch", device="cpu", stream=True)
    with pytest.raises(ValueError, match="a streamed one, whose experts are modules of their own"):
        sparsekern.prune(model, ExpertPruning(), calibration=batches(model), progress=False, out=tmp_path / "out")
