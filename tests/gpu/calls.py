"""Parametrizations over every op and implementation on a CUDA device."""

from __future__ import annotations

import pytest

from sparsekern import backends
from sparsekern.ops._registry import OPS

DEVICE = "cuda"
# Ops whose output sizes and control flow do not depend on values, so that a CUDA graph can capture them.
CAPTURABLE = (
    "bitmask_experts_linear",
    "bitmask_linear",
    "bitmask_unpack",
    "cross_gram_",
    "feature_norm_",
    "gated_split",
    "gram_",
    "gram_symmetrize_",
    "head_neuron_scores",
    "linear_kl",
    "masked_adamw_",
    "nm_experts_linear",
    "nm_linear",
    "nm_mask",
    "nm_unpack",
    "obs_sweep",
    "plain_split",
    "semi_structured_pack",
    "semi_structured_prune_pack",
    "semi_structured_unpack",
    "sensitivity_",
    "topk_mask",
)

# An op for CUDA devices alone has no samples; tests/runtime/test_semi_structured.py is about it.
EVERYWHERE = [name for name, op in OPS.items() if not op.only_on_cuda]
IMPLEMENTED = [(op, known.name) for op in EVERYWHERE for known in backends.implementations(op)]
EVERY_IMPLEMENTATION = pytest.mark.parametrize(("name", "backend"), IMPLEMENTED, ids=lambda value: value, indirect=["backend"])
EVERY_CAPTURABLE = pytest.mark.parametrize(
    ("name", "backend"), [known for known in IMPLEMENTED if known[0] in CAPTURABLE], ids=lambda value: value, indirect=["backend"]
)
