"""The dense model's hidden states beside those of the model that is pruned."""

import copy

import torch

from sparsekern.models import find_blocks, find_linears
from sparsekern.pruning.batches import as_batches
from sparsekern.pruning.blockwise.activations import Activations
from sparsekern.pruning.blockwise.dense_stream import DenseStream
from sparsekern.pruning.blockwise.observation import course_of
from tests.models.families import tiny_ids, tiny_model


@torch.no_grad()
def test_both_streams_are_those_of_their_models():
    """Blocks are changed one after another; the outputs of every block and batch, and the inputs of its linears, stay dense."""
    model, ids = tiny_model("llama"), tiny_ids(6, 16)
    dense = copy.deepcopy(model)
    batches = as_batches(ids, 4, ids.device, None)
    blocks = find_blocks(model)
    linears = [find_linears(block, blocks.block_name(index)) for index, block in enumerate(blocks.modules)]
    course = course_of(model, blocks, batches, linears)
    stream, own = DenseStream(model, batches, course), Activations(model, batches, course)
    expected = dense(ids, output_hidden_states=True, use_cache=False).hidden_states
    for index, found in enumerate(linears):
        stream.keep(found)
        assert torch.equal(torch.cat([stream.activations.hidden(number) for number in range(2)]), expected[index])
        changed = {linear.name: torch.randn_like(linear.weight) * 0.1 for linear in found}
        for linear in found:
            linear.weight.copy_(changed[linear.name])
        down = found[-1]
        inputs = torch.cat([inputs[down.name][0] for inputs in stream.inputs_of(index, [down], [down.name])])
        seen = []
        hook = dense.model.layers[index].mlp.down_proj.register_forward_pre_hook(
            lambda module, args, seen=seen: seen.append(args[0])
        )
        dense(ids)
        hook.remove()
        torch.testing.assert_close(inputs, seen[0])
        stream.advance(index)
        stream.advance(index)  # only once
        own.advance(index)
        assert all(torch.equal(linear.weight, changed[linear.name]) for linear in found)
        assert torch.equal(stream.dense(down), dense.model.layers[index].mlp.down_proj.weight)
    model.eval()
    last = model(ids, output_hidden_states=True, use_cache=False).hidden_states[-2]
    before_last = expected[-2]
    assert not torch.allclose(last, before_last, atol=1e-2)
    normed = dense.model.norm(torch.cat([stream.activations.hidden(number) for number in range(2)]))
    torch.testing.assert_close(normed, expected[-1])
    pruned = model.model.norm(torch.cat([own.hidden(number) for number in range(2)]))
    torch.testing.assert_close(pruned, model(ids, output_hidden_states=True, use_cache=False).hidden_states[-1])
