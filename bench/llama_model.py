"""A LLaMA-shaped model of a billion random weights in 2:4 with 4-bit values: dense, packed, and as a GGUF file for llama.cpp.

The packed linears and those of the file hold the same numbers; the dense ones round them to bfloat16. The blocks are copies of one, each in memory of its own, since speed does not depend on
the values.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from sparsekern.export.architectures import interleaved
from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.layouts.q4_0 import q4_0_rows
from sparsekern.layouts.q4_grid import grid_scales
from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.runtime import SparseLinear

from .inputs import n_of_m

FORMAT = "2:4-q4"
IN_GGUF = {  # names of the linears in a block's file
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model.

    Attributes:
        hidden: features between blocks.
        inner: neurons of a feed-forward network.
        blocks: number of blocks.
        heads: query heads.
        groups: key-value heads.
        vocabulary: tokens; their embeddings are the head too.
        positions: most tokens of a text.
    """

    hidden: int = 2048
    inner: int = 8192
    blocks: int = 16
    heads: int = 32
    groups: int = 8
    vocabulary: int = 32_000
    positions: int = 2048


def dense_model(sizes: Sizes) -> nn.Module:
    """Return the model in bfloat16, with 2:4 zeros and 4-bit values in the linears of its blocks."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        num_hidden_layers=1,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.groups,
        max_position_embeddings=sizes.positions,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    (block,) = model.model.layers
    with torch.no_grad():
        for name in IN_GGUF:
            weight = block.get_submodule(name).weight
            weight.copy_(_with_four_bits(weight.float()))
    _repeat(model, block, sizes.blocks)
    return model


def packed_model(dense: nn.Module) -> nn.Module:
    """Return the model with packed linears. It shares everything else with the dense one."""
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    model = copy.deepcopy(dense, shared)
    block = model.model.layers[0]
    for name in IN_GGUF:
        parent, _, child = name.rpartition(".")
        block.get_submodule(parent)._modules[child] = SparseLinear.from_linear(block.get_submodule(name), FORMAT)
    _repeat(model, block, len(model.model.layers))
    return model


def write_gguf(dense: nn.Module, sizes: Sizes, path: Path, head: tuple[int, Callable[[torch.Tensor], torch.Tensor]]) -> None:
    """Write the model for llama.cpp: linears of the blocks in Q4_0 without loss, norms in float32.

    Args:
        dense: the dense model.
        sizes: its sizes.
        path: the file.
        head: number of the type of the embeddings, and what turns a float32 matrix into its bytes `[rows, bytes]`.
    """
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(sizes.blocks)
    writer.add_context_length(sizes.positions)
    writer.add_embedding_length(sizes.hidden)
    writer.add_feed_forward_length(sizes.inner)
    writer.add_head_count(sizes.heads)
    writer.add_head_count_kv(sizes.groups)
    writer.add_layer_norm_rms_eps(dense.config.rms_norm_eps)
    writer.add_rope_dimension_count(sizes.hidden // sizes.heads)
    writer.add_vocab_size(sizes.vocabulary)
    writer.add_tokenizer_model("none")

    def add(name: str, tensor: torch.Tensor, kind: int | None = None) -> None:
        raw = None if kind is None else gguf.GGMLQuantizationType(kind)
        writer.add_tensor(f"{name}.weight", tensor.contiguous().numpy(), raw_dtype=raw)

    with torch.no_grad():
        kind, packed = head
        add("token_embd", packed(dense.model.embed_tokens.weight.float()), kind)
        add("output_norm", dense.model.norm.weight.float())
        stored = {own: _q4_0(dense.model.layers[0], name, sizes) for name, own in IN_GGUF.items()}  # of every block
        for index, block in enumerate(dense.model.layers):
            add(f"blk.{index}.attn_norm", block.input_layernorm.weight.float())
            add(f"blk.{index}.ffn_norm", block.post_attention_layernorm.weight.float())
            for own, rows in stored.items():
                add(f"blk.{index}.{own}", rows, gguf.GGMLQuantizationType.Q4_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _q4_0(block: nn.Module, name: str, sizes: Sizes) -> torch.Tensor:
    weight = block.get_submodule(name).weight
    scales = grid_scales(weight)
    assert scales is not None
    heads = {"self_attn.q_proj": sizes.heads, "self_attn.k_proj": sizes.groups}.get(name)
    if heads is not None:
        order = interleaved(len(weight), heads)
        weight, scales = weight[order], scales[order]
    return q4_0_rows(weight.float(), scales)


def _with_four_bits(weight: torch.Tensor) -> torch.Tensor:
    pruned = n_of_m(weight)
    scales = (pruned.view(len(weight), -1, COLUMNS).abs().amax(-1) / 7).half()
    return nm_q4_unpack(nm_q4_pack(pruned, scales, 2, 4), 2, 4, *weight.shape)[0]


def _repeat(model: nn.Module, block: nn.Module, count: int) -> None:
    """Make `count` copies of a block the blocks of a model."""
    model.model.layers = nn.ModuleList(copy.deepcopy(block) for _ in range(count))
    for index, own in enumerate(model.model.layers):
        own.self_attn.layer_idx = index
    model.config.num_hidden_layers = count
