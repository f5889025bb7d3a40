"""`moefy`: the mixture computes what its neurons compute in the dense model, and plain transformers loads it."""

import copy

import pytest
import torch
import transformers as tf

import sparsekern
from tests.models.families import LLAMA_LIKE, tiny_ids, tiny_model

IDS = tiny_ids()
SHAPES = {
    "llama": {},
    "tied": {"tie_word_embeddings": True},
    "gelu": {"hidden_act": "gelu_pytorch_tanh"},
    "rope": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
}
OTHERS = {
    "qwen2": lambda: tf.Qwen2Config(**LLAMA_LIKE),
    "qwen3": lambda: tf.Qwen3Config(**LLAMA_LIKE),
    "mistral": lambda: tf.MistralConfig(**LLAMA_LIKE, sliding_window=None),
}


def dense(shape: str = "llama", dtype: torch.dtype = torch.float32):
    config = OTHERS[shape]() if shape in OTHERS else tf.LlamaConfig(**LLAMA_LIKE, **SHAPES[shape])
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


def moefied(model, experts=6, top_k=2, **options):
    return sparsekern.moefy(model, experts, top_k, **{"calibration": IDS, "progress": False} | options)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).double().norm() / expected.double().norm())


@pytest.mark.parametrize("shape", [*SHAPES, *OTHERS])
@torch.no_grad()
def test_with_all_experts_active_the_folder_is_the_dense_model(shape, tmp_path):
    model = dense(shape)
    moefied(model).save_pretrained(tmp_path)
    loaded, loading = tf.AutoModelForCausalLM.from_pretrained(tmp_path, num_experts_per_tok=5, output_loading_info=True)
    assert not any(loading.values())
    assert off(loaded(IDS).logits, model(IDS).logits) < 1e-3


@pytest.mark.parametrize("shared", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_a_layer_adds_the_neurons_of_the_chosen_experts(shared):
    model = dense()
    mixture = moefied(model, shared=shared)
    network, mixed = model.model.layers[1].mlp, mixture.model.layers[1].mlp
    x = torch.randn(7, 32)
    hidden = network.act_fn(network.gate_proj(x)) * network.up_proj(x)
    gates = torch.cat((mixed.experts.gate_up_proj[:, :8].flatten(0, 1), mixed.shared_experts.gate_proj.weight))
    place = [int((network.gate_proj.weight == row).all(1).nonzero()) for row in gates]
    assert sorted(place) == list(range(48))  # every neuron is in one expert
    chosen = mixed.gate(x)[2]
    expected = torch.zeros(7, 32)
    for token in range(7):
        neurons = [n for e in chosen[token].tolist() for n in place[8 * e : 8 * e + 8]] + place[48 - 8 * shared :][: 8 * shared]
        assert len(set(neurons)) == 8 * (2 + shared)
        expected[token] = network.down_proj.weight[:, neurons] @ hidden[token, neurons]
    assert off(mixed(x[None])[0], expected) < 2e-3


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@torch.no_grad()
def test_the_router_prefers_experts_of_large_activations():
    model = dense()
    mixture = moefied(model, experts=12, top_k=3, shared=0)
    inputs = {}
    for layer in model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, args: inputs.__setitem__(module, args[0].flatten(0, 1)))
    model(IDS)
    for layer, mixed in zip(model.model.layers, mixture.model.layers, strict=True):
        x, network, experts = inputs[layer.mlp], layer.mlp, mixed.mlp.experts
        norms = network.down_proj.weight.norm(dim=0)
        sums = torch.zeros(len(x), 12)
        for expert in range(12):
            for row in experts.gate_up_proj[expert, :4]:
                neuron = int((network.gate_proj.weight == row).all(1).nonzero())
                value = network.act_fn(x @ network.gate_proj.weight[neuron]) * (x @ network.up_proj.weight[neuron])
                sums[:, expert] += value.abs() * norms[neuron]
        chosen = sums.gather(1, mixed.mlp.gate(x)[2]).mean()
        best = sums.topk(3).values.mean()
        assert chosen - sums.mean() > 0.5 * (best - sums.mean())  # half the way from chance to the best choice


def test_the_seed_decides_and_the_model_is_unchanged():
    model = dense()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (moefied(model, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_padding_is_left_out():
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[:, 12:] = 0
    other = torch.where(mask.bool(), ids, (ids + 7) % 90 + 3)
    first, second = (moefied(dense(), calibration=[{"input_ids": i, "attention_mask": mask}]).state_dict() for i in (ids, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_in_bfloat16_the_router_stays_in_float32(tmp_path):
    mixture = moefied(dense(dtype=torch.bfloat16))
    sparsekern.save(mixture, tmp_path / "out")
    loaded = sparsekern.load(tmp_path / "out")
    router = loaded.model.layers[0].mlp.gate
    assert loaded.dtype == torch.bfloat16 and router.weight.dtype == torch.float32
    assert torch.equal(router.weight, mixture.model.layers[0].mlp.gate.weight)
    assert float(router.weight.detach().abs().max()) < 0.01


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"experts": 7}, "experts: expected a divisor of 48, the neurons of each feed-forward network, got 7"),
        ({"experts": 16}, "experts: expected experts of a multiple of 4 neurons, as grouped products need, got 3"),
        ({"experts": 1, "shared": 0, "top_k": 1}, "experts: expected at least 2, got 1"),
        ({"experts": 0}, "experts: expected at least 1, got 0"),
        ({"top_k": 6}, "top_k: expected at most 5, the experts besides 1 shared ones, got 6"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"shared": -1}, "shared: expected a whole number of at least 0, got -1"),
        ({"calibration": "text.txt"}, "tokenizer: expected the model's tokenizer"),
        ({"seed": -1}, "seed: expected a whole number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        moefied(dense(), **arguments)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("gpt2", "expected a decoder with rotary positions and a gated feed-forward network, such as Llama, got GPT2LMHeadModel"),
        ("phi", "expected a decoder of Llama's shape, got PhiForCausalLM without model.layers.0.mlp.down_proj.weight"),
        (
            "gemma2",
            "expected a decoder of Llama's shape, got Gemma2ForCausalLM with model.layers.0.post_feedforward_layernorm.weight",
        ),
        ("mistral", "expected full attention in every layer, got MistralForCausalLM with a window of 4 tokens"),
        ("gemma", "a mixture with all weights of this GemmaForCausalLM differs from it by .*% of the logits"),
    ],
)
def test_models_of_another_shape_are_refused(family, message):
    with pytest.raises(ValueError, match=message):
        moefied(tiny_model(family))


def test_a_type_that_is_no_number_or_no_model():
    with pytest.raises(TypeError, match="experts: expected a whole number of at least 1, got '4'"):
        moefied(dense(), experts="4")
    with pytest.raises(TypeError, match="model: expected a transformers model"):
        moefied("llama")
