"""A LLaMA-shaped model of a billion random weights in 2:4 with 4-bit values: dense, packed, and as a GGUF file for llama.cpp.

The packed linears and those of the file hold the same numbers; the dense ones round them to bfloat16. The blocks are copies of one, each in
memory of its own, since speed does not depend on the values.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

import sparsekern
from sparsekern.layouts.nm_q4 import COLUMNS
from sparsekern.ops import nm_q4_pack, nm_q4_unpack
from sparsekern.runtime import SparseLinear

from .inputs import n_of_m
from .llama_cpp import quantise

FORMAT = "2:4-q4"
LINEARS = (
    *(f"self_attn.{name}_proj" for name in "qkvo"),
    *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
)


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
        for name in LINEARS:
            weight = block.get_submodule(name).weight
            weight.copy_(_with_four_bits(weight.float()))
    _repeat(model, block, sizes.blocks)
    return model


def packed_model(dense: nn.Module) -> nn.Module:
    """Return the model with packed linears. It shares everything else with the dense one."""
    shared = {id(tensor): tensor for tensor in (*dense.parameters(), *dense.buffers())}
    model = copy.deepcopy(dense, shared)
    block = model.model.layers[0]
    for name in LINEARS:
        parent, _, child = name.rpartition(".")
        block.get_submodule(parent)._modules[child] = SparseLinear.from_linear(block.get_submodule(name), FORMAT)
    _repeat(model, block, len(model.model.layers))
    return model


def with_head(packed: nn.Module) -> nn.Module:
    """Return a packed model whose head and embeddings have 8 bits. It shares everything else with the given one."""
    shared = {id(tensor): tensor for tensor in (*packed.parameters(), *packed.buffers())}
    return sparsekern.pack(copy.deepcopy(packed, shared), head="int8")


def write_gguf(packed: nn.Module, build: Path, file: Path) -> None:
    """Write the packed model for llama.cpp: its linears in Q4_0 without loss, the embeddings as `llama-quantize` stores them, in Q6_K.

    Raises:
        AssertionError: the file holds other types, or other numbers in the linears.
    """
    exported = sparsekern.export_gguf(packed, file.with_name("exported.gguf"))
    quantise(build, exported, file, "Q4_0")
    exported.unlink()
    check_file(packed, file)


def check_file(packed: Any, file: Path) -> None:
    """Raise AssertionError unless a file holds the linears of a packed model in Q4_0, and its embeddings in Q6_K."""
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    for name, tensor in tensors.items():
        wanted = "Q6_K" if name == "token_embd.weight" else "F32" if "norm" in name else "Q4_0"
        assert tensor.tensor_type.name == wanted, f"{name}: expected {wanted}, got {tensor.tensor_type.name}"
    for number in (0, len(packed.model.layers) - 1):
        stored = tensors[f"blk.{number}.ffn_down.weight"]
        found = torch.from_numpy(gguf.dequantize(stored.data, stored.tensor_type))
        layer = packed.model.layers[number].mlp.down_proj
        expected, _ = nm_q4_unpack(layer.tensors["blocks"], 2, 4, *layer.shape)
        assert torch.equal(found, expected), f"{stored.name}: expected the numbers of the packed linear"


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
