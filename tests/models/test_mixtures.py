"""Experts cut out of a mixture: the folder is an ordinary model, with the logits of the dense one whose router avoids the others."""

import functools
from unittest import mock

import pytest
import torch
import transformers as tf

from sparsekern.models.mixtures import find_mixtures, plan_cut
from tests.models.families import tiny_ids, tiny_model
from tests.models.zoo import ZOO

EXPERTS = 8
ROUTED = {EXPERTS, EXPERTS + 2}  # outputs of a router
COUNT = {  # in the config
    "mixtral": "num_local_experts",
    "qwen2_moe": "num_experts",
    "qwen3_moe": "num_local_experts",
    "gpt_oss": "num_local_experts",
    "llama4": "num_local_experts",
    "deepseek_v3": "n_routed_experts",
    "glm4_moe": "n_routed_experts",
    "olmoe": "num_experts",
    "phimoe": "num_local_experts",
    "ernie4_5_moe": "moe_num_experts",
    "hunyuan_v1_moe": "num_experts",
    "minimax_m2": "num_local_experts",
    "granitemoe": "num_local_experts",
    "gemma4_moe": "num_experts",
    "nemotron_h": "n_routed_experts",
    "dbrx": "ffn_config.moe_num_experts",
    "longcat_flash": "n_routed_experts",  # and two choices more, which return their inputs
}
KEPT = [0, 2, 3, 5, 6, 7]  # of two groups of four, three each
IDS = tiny_ids(2, 12)


def dense(name: str):
    config = ZOO[name].config()
    *path, setting = COUNT[name].split(".")
    setattr(functools.reduce(getattr, path, config), setting, EXPERTS)
    torch.manual_seed(0)
    model = getattr(tf, ZOO[name].architecture)(config).eval()
    biases = [buffer for name, buffer in model.named_buffers() if name.endswith("bias")]
    for tensor in (*model.parameters(), *biases):
        tensor.data.add_(torch.randn_like(tensor) * 0.05)
    return model


def avoiding(model, owner: str, removed: list[int]) -> None:
    """Make the routers of a module never choose `removed`: their logits are minus infinity, and so are their correction biases."""
    for module in model.get_submodule(owner).modules():
        own = {**module._parameters, **module._buffers}
        sizes = {size for tensor in own.values() if tensor is not None and tensor.dim() < 3 for size in tensor.shape}
        if not sizes & ROUTED:
            continue
        for name, buffer in module._buffers.items():
            if buffer is not None and name.endswith("bias"):
                buffer[..., removed] = -torch.inf
        module.forward = _with_low_logits(module.forward, removed)


def _with_low_logits(forward, removed):
    linear = torch.nn.functional.linear

    def low(*args, **kwargs):
        output = linear(*args, **kwargs)
        if output.shape[-1] in ROUTED:
            output = output.clone()
            output[..., removed] = -torch.inf
        return output

    def wrapped(*args, **kwargs):
        with mock.patch("torch.nn.functional.linear", low):
            return forward(*args, **kwargs)

    return wrapped


def cut_out(model, kept=KEPT):
    mixtures = find_mixtures(model)
    cut = plan_cut(model, mixtures, len(kept))
    cut.apply({mixture.experts.name: torch.tensor(kept) for mixture in mixtures})
    return mixtures


@pytest.mark.parametrize("name", COUNT)
@torch.no_grad()
def test_the_folder_is_the_model_whose_router_avoids_the_removed_experts(name, tmp_path):
    smaller, masked = dense(name), dense(name)
    before = masked(IDS).logits
    mixtures = cut_out(smaller)
    for mixture in mixtures:
        avoiding(masked, mixture.owner, sorted(set(range(EXPERTS)) - set(KEPT)))
    expected = masked(IDS).logits
    assert (expected - before).norm() > 1e-4 * before.norm()  # the removed experts mattered
    torch.testing.assert_close(smaller(IDS).logits, expected, rtol=1e-4, atol=1e-5)
    smaller.save_pretrained(tmp_path)
    loaded, loading = getattr(tf, ZOO[name].architecture).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading.values())
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_rehearsal_changes_nothing_and_copies_no_weight():
    model = dense("mixtral")
    before = model(IDS).logits
    tensors = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    cut = plan_cut(model, find_mixtures(model), 6)
    with cut.rehearsed():
        assert model.config.num_local_experts == 6
        assert {len(mixture.experts.stacked("down_proj")) for mixture in cut.mixtures} == {6}
        assert {name: tensor.data_ptr() for name, tensor in model.state_dict().items()} == tensors
        assert not torch.equal(model(IDS).logits, before)
    assert model.config.num_local_experts == 8 and torch.equal(model(IDS).logits, before)


def test_a_config_inside_another_is_found():
    text = tf.Llama4TextConfig(**ZOO["llama4"].config().to_diff_dict())
    vision = tf.Llama4VisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8,
        projector_input_dim=16, projector_output_dim=16, vision_output_dim=16,
    )  # fmt: skip
    model = tf.Llama4ForConditionalGeneration(tf.Llama4Config(text_config=text, vision_config=vision, image_token_index=90))
    cut_out(model, kept=[0, 2])
    assert model.config.text_config.num_local_experts == 2


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_model("llama"), "expected a mixture of experts, .*, got LlamaForCausalLM, where none was found"),
        (ZOO["jetmoe"].model, "expected a mixture of experts, .*, got JetMoeForCausalLM, where none was found"),
    ],
)
def test_what_cannot_be_cut(model, message):
    with pytest.raises(ValueError, match=message):
        find_mixtures(model())


def test_layers_of_different_numbers_of_experts():
    model = dense("mixtral")
    other = tf.MixtralForCausalLM(ZOO["mixtral"].config())
    model.model.layers[1].mlp = other.model.layers[1].mlp
    message = "got 8 in model.layers.0.mlp.experts and 4 in model.layers.1.mlp.experts"
    with pytest.raises(ValueError, match=f"expected equally many experts in each layer, .*{message}"):
        find_mixtures(model)


def test_a_config_without_the_number():
    model = dense("mixtral")
    model.config.num_local_experts = 7
    with pytest.raises(ValueError, match="found no number in the config of MixtralForCausalLM that makes 8 experts 6"):
        plan_cut(model, find_mixtures(model), 6)


def test_what_depends_on_the_number_in_an_unknown_way():
    class Model(tf.MixtralForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[0].mlp.pairs = torch.nn.Parameter(torch.zeros(config.num_local_experts + 1, 3))

    model = Model(dense("mixtral").config)
    with pytest.raises(
        ValueError, match=r"layers.0.mlp.pairs depends on the number of experts in an unknown way: \(9, 3\) becomes \(7, 3\)"
    ):
        plan_cut(model, find_mixtures(model), 6)


def test_a_table_of_experts_is_refused():
    model = dense("mixtral")
    model.model.layers[1].mlp.register_buffer("table", torch.arange(8))
    with pytest.raises(ValueError, match="model.layers.1.mlp.table may hold indices of experts"):
        plan_cut(model, find_mixtures(model), 6)
