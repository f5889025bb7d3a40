"""Prune one linear with the ops alone: Gram matrix, factor, sweep, packing, product."""

import torch

from sparsekern import ops

torch.manual_seed(0)
tokens, in_features, out_features = 2048, 512, 256
weight = torch.randn(out_features, in_features)
inputs = torch.randn(tokens, in_features) @ torch.randn(in_features, in_features) / 20  # correlated, as activations are

gram = torch.zeros(in_features, in_features)
for batch in inputs.split(512):
    ops.gram_(gram, batch)  # the lower triangle of X^T X
ops.gram_symmetrize_(gram)
factor = ops.reverse_cholesky(gram, damping=0.01)
pruned, mask, row_error = ops.obs_sweep(weight, factor, pattern="2:4")

naive = weight.masked_fill(~ops.nm_mask(weight.abs(), "2:4"), 0)
energy = (inputs @ weight.T).square().sum()
for name, candidate in (("magnitude", naive), ("SparseGPT", pruned)):
    error = (inputs @ (candidate - weight).T).square().sum() / energy
    print(f"{name}: relative output error {error:.4f}, {float((candidate == 0).float().mean()):.0%} zeros")

packed = ops.bitmask_pack(pruned.bfloat16())
x = inputs[:1].bfloat16()
difference = ops.bitmask_linear(x, **packed) - torch.nn.functional.linear(x, pruned.bfloat16())
print(f"packed product differs from the dense one by at most {float(difference.abs().max()):.3f}")
