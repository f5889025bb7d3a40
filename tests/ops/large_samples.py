"""One call of each op that is large enough for threads to share: most of the samples that the ops bring are one thread's work.

Each is about as small as its kernel's grain allows. tests/native/test_shared_work.py checks that the work is really shared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from sparsekern import ops
from sparsekern.layouts.int8_rows import quantize_rows
from sparsekern.layouts.nm_q4 import nearest_multiple
from sparsekern.layouts.packed_experts import join_bitmask_experts
from sparsekern.ops._registry import Sample, sample
from sparsekern.ops.obs_quantize import problem


def randn(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=generator).to(dtype)


def gram_matrix(generator: torch.Generator, features: int) -> torch.Tensor:
    x = randn(generator, features + 40, features)
    return x.T @ x + torch.eye(features)


def semi_sparse(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    """Return a 2:4 matrix in bfloat16."""
    weight = randn(generator, rows, columns, dtype=torch.bfloat16)
    return weight.masked_fill(~ops.nm_mask(weight, "2:4"), 0)


def admm_step(generator: torch.Generator) -> Sample:
    offset, dual, weight = (randn(generator, 8, 4104) for _ in range(3))
    return sample(offset, dual, dual > 0, weight, k=8 * 2052, scope="matrix")


def bitmask_linear(generator: torch.Generator) -> Sample:
    weight = semi_sparse(generator, 96, 1024)
    return sample(randn(generator, 40, 1024, dtype=torch.bfloat16), *ops.bitmask_pack(weight).values())


def experts_of(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """Return inputs, a choice that names one expert for many tokens and the others for few, and the experts."""
    experts = torch.zeros(48, 1, dtype=torch.int64)
    experts[:6, 0] = torch.arange(6) % 3
    return randn(generator, 48, 1024, dtype=torch.bfloat16), experts, [semi_sparse(generator, 96, 1024) for _ in range(3)]


def bitmask_experts_linear(generator: torch.Generator) -> Sample:
    x, experts, weights = experts_of(generator)
    packed = join_bitmask_experts([ops.bitmask_pack(weight) for weight in weights], (96, 1024), x.dtype)
    return sample(x, experts, *packed.values())


def nm_experts_linear(generator: torch.Generator) -> Sample:
    x, experts, weights = experts_of(generator)
    packed = [ops.nm_pack(weight, 2, 4) for weight in weights]
    return sample(x, experts, *(torch.stack([own[name] for own in packed]) for name in ("values", "codes")), 2, 4)


def nm_linear(generator: torch.Generator) -> Sample:
    weight = semi_sparse(generator, 96, 1024)
    return sample(randn(generator, 40, 1024, dtype=torch.bfloat16), *ops.nm_pack(weight, 2, 4).values(), 2, 4)


def linear_kl(generator: torch.Generator) -> Sample:
    head = randn(generator, 1100, 64)
    return sample(randn(generator, 70, 64), head, randn(generator, 70, 64), head)


def masked_adamw(generator: torch.Generator) -> Sample:
    weight, grad, mean = (randn(generator, 80, 512) for _ in range(3))
    return sample(weight, grad, mean, mean**2, step=2, lr=0.1, mask=grad > 0)


def nm_q4_blocks(generator: torch.Generator, rows: int, columns: int) -> torch.Tensor:
    return ops.nm_q4_pack(semi_sparse(generator, rows, columns), torch.full((rows, columns // 64), 0.25).half(), 2, 4)


def nm_q4_linear(generator: torch.Generator) -> Sample:
    return sample(randn(generator, 24, 1024, dtype=torch.bfloat16), nm_q4_blocks(generator, 96, 1024), 2, 4, 96)


def int8_linear(generator: torch.Generator) -> Sample:
    return sample(randn(generator, 40, 1024, dtype=torch.bfloat16), *quantize_rows(randn(generator, 96, 1024)))


def q4_scales(generator: torch.Generator) -> Sample:
    return sample(randn(generator, 24, 1024), torch.rand(1024, generator=generator))


def quantize_descent(generator: torch.Generator) -> Sample:
    target, hessian, mask, scales = problem(64, 128, generator)
    weight = nearest_multiple(target, scales.float().repeat_interleave(64, 1)) * mask
    return sample(weight, (weight - target) @ hessian, hessian, mask, scales, 2)


def obs_quantize(generator: torch.Generator) -> Sample:
    weight, hessian, mask, scales = problem(160, 96, generator)
    return sample(weight, torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1).contiguous(), mask, scales)


def masked_lstsq(generator: torch.Generator) -> Sample:
    weight = randn(generator, 160, 96)
    return sample(weight, gram_matrix(generator, 96), weight > 0)


def obs_sweep(generator: torch.Generator) -> Sample:
    factor = torch.linalg.cholesky(gram_matrix(generator, 96).flip(0, 1)).flip(0, 1).contiguous()
    return sample(randn(generator, 160, 96), factor, sparsity=0.5, scope="matrix", block_size=32)


def gated_split(generator: torch.Generator) -> Sample:
    return sample(*(randn(generator, 24, 1024) for _ in range(4)), "silu", 0.5, 4)


def plain_split(generator: torch.Generator) -> Sample:
    return sample(*(randn(generator, 24, 1024) for _ in range(3)), "gelu_tanh", 0.5, 4)


LARGE: dict[str, Callable[[torch.Generator], Sample]] = {
    "admm_step_": admm_step,
    "bitmask_experts_linear": bitmask_experts_linear,
    "bitmask_linear": bitmask_linear,
    "bitmask_pack": lambda g: sample(semi_sparse(g, 256, 512)),
    "bitmask_unpack": lambda g: sample(*ops.bitmask_pack(semi_sparse(g, 512, 512)).values(), 512),
    "feature_norm_": lambda g: sample(torch.zeros(512), randn(g, 600, 512)),
    "gated_split": gated_split,
    "gram_": lambda g: sample(torch.zeros(320, 320), randn(g, 64, 320, dtype=torch.bfloat16)),
    "gram_inverse": lambda g: sample(gram_matrix(g, 200)),
    "gram_solve": lambda g: sample(gram_matrix(g, 200), randn(g, 100, 200)),
    "gram_symmetrize_": lambda g: sample(randn(g, 600, 600)),
    "int8_linear": int8_linear,
    "linear_kl": linear_kl,
    "masked_adamw_": masked_adamw,
    "masked_lstsq": masked_lstsq,
    "nm_experts_linear": nm_experts_linear,
    "nm_linear": nm_linear,
    "nm_mask": lambda g: sample(randn(g, 256, 512).round(), 2, 4),
    "nm_pack": lambda g: sample(semi_sparse(g, 256, 512), 2, 4),
    "nm_q4_linear": nm_q4_linear,
    "nm_q4_pack": lambda g: sample(semi_sparse(g, 256, 512), torch.full((256, 8), 0.25).half(), 2, 4),
    "nm_q4_unpack": lambda g: sample(nm_q4_blocks(g, 256, 512), 2, 4, 256, 512),
    "nm_unpack": lambda g: sample(*ops.nm_pack(semi_sparse(g, 512, 512), 2, 4).values(), 2, 4, 512),
    "obs_quantize": obs_quantize,
    "obs_sweep": obs_sweep,
    "plain_split": plain_split,
    "q4_scales": q4_scales,
    "quantize_descent_": quantize_descent,
    "reverse_cholesky": lambda g: sample(gram_matrix(g, 200)),
    "semi_structured_pack": lambda g: sample(semi_sparse(g, 256, 512)),
    "semi_structured_prune_pack": lambda g: sample(randn(g, 256, 512, dtype=torch.bfloat16)),
    "semi_structured_unpack": lambda g: sample(*ops.semi_structured_pack(semi_sparse(g, 512, 512))),
    "topk_mask": lambda g: sample(randn(g, 256, 512).round(), 40000, scope="matrix"),
}
