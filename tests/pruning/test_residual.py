"""Which linears write to the residual stream, by family."""

import pytest
import torch

from sparsekern.models import find_blocks, find_linears
from sparsekern.pruning.blockwise.residual import residual_readers, stream_read
from tests.models.families import tiny_ids, tiny_model

WRITERS = {
    "llama": {"self_attn.o_proj": "", "mlp.down_proj": "post_attention_layernorm"},
    "opt": {"self_attn.out_proj": "", "fc2": "final_layer_norm"},
    "gpt2": {"attn.c_proj": "", "mlp.c_proj": "ln_2"},
    "gemma2": {},  # outputs are normalised before they are added
    "phi": {},  # attention and network are added at once
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WRITERS)
@torch.no_grad()
def test_writers_and_where_the_stream_is_read(family, dtype):
    model, ids = tiny_model(family, dtype), tiny_ids(3, 16)
    blocks = find_blocks(model)
    block, name = blocks.modules[1], blocks.block_name(1)
    found = residual_readers(block, find_linears(block, name), lambda: model(ids))
    expected = {f"{name}.{linear}": block.get_submodule(reader) for linear, reader in WRITERS[family].items()}
    assert found == expected
    with stream_read(found) as streams:
        outputs = model(ids, output_hidden_states=True).hidden_states
    assert streams.keys() == expected.keys()
    if expected:
        first, _ = streams.values()
        assert torch.equal(first, outputs[1])
