"""Fused experts of every layout: their matrices are views, and their outputs are those of the model's own forward."""

import warnings
from types import SimpleNamespace

import pytest
import torch
import transformers as tf

import sparsekern
from sparsekern.models.expert_checks import unknown_experts, verified
from sparsekern.models.expert_layouts import find_experts
from sparsekern.models.experts import DOWN, GATE, UP, watched
from tests.models.families import COMMON, LLAMA_LIKE, tiny_ids

TOP2 = dict(num_experts_per_tok=2)
MIXTURES = {
    "mixtral": lambda: tf.MixtralConfig(**LLAMA_LIKE, **TOP2, num_local_experts=4),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**LLAMA_LIKE, **TOP2, num_experts=4, moe_intermediate_size=16),
    "deepseek_v3": lambda: tf.DeepseekV3Config(
        **{**LLAMA_LIKE, "num_key_value_heads": 4},
        **TOP2,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "gpt_oss": lambda: tf.GptOssConfig(**LLAMA_LIKE, **TOP2, num_local_experts=4, sliding_window=8),
    "llama4": lambda: tf.Llama4TextConfig(
        **LLAMA_LIKE, num_experts_per_tok=1, num_local_experts=4, intermediate_size_mlp=48, interleave_moe_layer_step=1
    ),
    "dbrx": lambda: tf.DbrxConfig(
        **COMMON,
        d_model=32,
        n_heads=4,
        n_layers=2,
        max_seq_len=64,
        attn_config=dict(kv_n_heads=2, clip_qkv=8, rope_theta=10000.0),
        ffn_config=dict(ffn_hidden_size=16, moe_num_experts=4, moe_top_k=2, hidden_size=32),
    ),
}


def tiny_mixture(kind):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(MIXTURES[kind](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize("kind", MIXTURES)
def test_outputs_are_those_of_the_models_own_experts(kind):
    model = tiny_mixture(kind)
    found = find_experts(model)
    ours, theirs = {}, {}

    def visit(experts, call):
        output = torch.zeros_like(call.hidden)
        for expert, (rows, weights) in enumerate(call.by_expert(experts.count)):
            output.index_add_(0, rows, experts.output(expert, call.hidden[rows]) * weights[:, None])
        ours[experts.name] = output

    handles = [
        experts.module.register_forward_hook(lambda module, args, output, name=experts.name: theirs.update({name: output}))
        for experts in found
    ]
    with torch.no_grad(), watched(found, visit):
        model(tiny_ids(2, 8))
    for handle in handles:
        handle.remove()
    dense = getattr(model.config, "first_k_dense_replace", 0)
    assert len(found) == model.config.num_hidden_layers - dense and set(ours) == set(theirs) == {experts.name for experts in found}
    for name, output in ours.items():
        torch.testing.assert_close(output, theirs[name].reshape(output.shape), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MIXTURES)
def test_writing_to_a_matrix_writes_to_the_model(kind):
    model = tiny_mixture(kind)
    experts = find_experts(model)[0]
    for part in experts.parts:
        before = {other: experts.weight(2, other).clone() for other in experts.parts}
        neighbours = experts.stacked(part)[[0, 1, 3]].clone()
        linear = experts.linear(2, part)
        linear.weight.fill_(1.5)
        assert torch.equal(find_experts(model)[0].weight(2, part), torch.full_like(before[part], 1.5))
        assert torch.equal(experts.stacked(part)[[0, 1, 3]], neighbours)
        assert all(torch.equal(experts.weight(2, other), before[other]) for other in experts.parts if other != part)
        linear.weight.copy_(before[part])
    shapes = {part: tuple(experts.weight(0, part).shape) for part in experts.parts}
    assert shapes[GATE] == shapes[UP] == shapes[DOWN][::-1]


def test_gate_and_up_of_interleaved_rows_are_told_apart():
    model = tiny_mixture("gpt_oss")
    experts = find_experts(model)[0]
    stored = experts.module.gate_up_proj
    assert torch.equal(experts.weight(1, GATE), stored[1].T[0::2]) and torch.equal(experts.weight(1, UP), stored[1].T[1::2])
    assert torch.equal(experts.bias(1, UP), experts.module.gate_up_proj_bias[1, 1::2])


def test_a_number_that_is_no_expert_routes_nowhere():
    from sparsekern.models.experts import ExpertsCall

    index = torch.tensor([[1, 4], [0, 1], [-1, 0]])
    weights = torch.tensor([[0.5, 9.0], [0.25, 0.75], [9.0, 1.0]])
    routed = ExpertsCall(torch.zeros(3, 2), index, weights, 3).by_expert(3)
    assert [(rows.tolist(), own.tolist()) for rows, own in routed] == [([1, 2], [0.25, 1.0]), ([0, 1], [0.5, 0.75]), ([], [])]


@pytest.mark.parametrize("limit", (None, 0.2))
def test_experts_without_the_decorator_are_read_as_they_compute(limit):
    from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    sizes = SimpleNamespace(
        hidden_size=8, hidden_act="silu", expert_ffn_hidden_size=4, moe_intermediate_size=4, n_routed_experts=3, num_local_experts=3
    )
    sizes.zero_expert_num = 2
    step, longcat = Step3p7Experts(sizes, swiglu_limit=limit), LongcatFlashExperts(sizes)
    generator = torch.Generator().manual_seed(0)
    for module, experts in ((step, 3), (longcat, 5)):  # the last two of LongCat return their inputs
        for parameter in module.parameters():
            parameter.data = torch.randn(parameter.shape, generator=generator)
        found = find_experts(torch.nn.ModuleDict({"experts": module}), "mlp")
        assert [experts.name for experts in found] == ["mlp.experts"] and found[0].count == 3
        index = torch.randint(0, experts, (16, 2), generator=generator)
        calls = torch.randn(16, 8, generator=generator), index, torch.rand(16, 2, generator=generator)
        with torch.no_grad(), verified(found):
            module(*calls)
        module.act_fn = torch.nn.ReLU()  # read at each call, so still the same function
        with torch.no_grad(), verified(found):
            module(*calls)
        module.register_forward_hook(lambda module, args, output: (output, None))
        with torch.no_grad(), verified(found), pytest.raises(ValueError, match="model: mlp.experts .* computes something else"):
            module(*calls)


def test_unknown_experts_are_told_from_convolutions_and_known_ones():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    block = torch.nn.ModuleDict({"mlp": JetMoeParallelExperts(2, 4, 4), "experts": torch.nn.ModuleList([torch.nn.Conv1d(4, 4, 3)])})
    block["moe"] = find_experts(tiny_mixture("dbrx"))[0].module
    assert list(unknown_experts(block, "layers.0")) == ["layers.0.mlp"]


def test_a_network_with_one_neuron_left_is_no_gate():
    from sparsekern.models import find_linears
    from sparsekern.models.gates import find_gates

    block = torch.nn.ModuleDict(
        {
            "q": torch.nn.Linear(32, 32),
            "ffn": torch.nn.Sequential(torch.nn.Linear(32, 1), torch.nn.Linear(1, 32)),
            "shared_gate": torch.nn.Linear(32, 1),
            "mix": torch.nn.ModuleDict({"router": torch.nn.Linear(32, 4), "predict": torch.nn.Linear(4, 16)}),
            "heads": torch.nn.Linear(32, 4),
        }
    )
    found = find_gates(block, find_linears(block, "layers.0"), "layers.0")
    assert [linear.name for linear in found] == ["layers.0.shared_gate", "layers.0.mix.router", "layers.0.mix.predict"]


def test_routers_without_a_linear_are_said_to_stay_dense():
    model = tiny_mixture("qwen3_moe")
    with pytest.warns(sparsekern.SparsekernWarning, match="model.layers.0.mlp.gate.*stay dense; they are not linear layers"):
        sparsekern.prune(model, "magnitude", "2:4", progress=False)
    assert all((layer.mlp.gate.weight != 0).all() for layer in model.model.layers)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsekern.prune(model, "magnitude", "2:4", include=["lm_head"], progress=False)
