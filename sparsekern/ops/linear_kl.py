"""`linear_kl`: the divergence from a teacher's distribution over a vocabulary, and its gradient, without storing the logits."""

from __future__ import annotations

import torch

from .._checks import HALF_OR_FLOAT, check_finite, check_finite_number, check_tensor
from ._registry import define_op, sample

SCHEMA = "(Tensor x, Tensor head, Tensor teacher_x, Tensor teacher_head, float temperature=1.0) -> (Tensor kl, Tensor grad)"
CHUNK = 128  # tokens whose logits the reference stores at a time


def linear_kl(
    x: torch.Tensor, head: torch.Tensor, teacher_x: torch.Tensor, teacher_head: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `KL(teacher || student)` of each token, and its gradient for the student's hidden states.

    The student's logits are `x @ head^T`, the teacher's `teacher_x @ teacher_head^T`; both are divided by `temperature`. The logits of
    a few tokens are in memory at a time, so that memory depends neither on the vocabulary nor on the number of tokens. Neither head has a
    gradient. Where both heads are the same tensor, it is packed once.

    Args:
        x: `[tokens, features]` float32, bfloat16 or float16: the student's hidden states in front of its head.
        head: `[vocabulary, features]` of the dtype of `x`.
        teacher_x: `[tokens, teacher_features]` float32, bfloat16 or float16.
        teacher_head: `[vocabulary, teacher_features]` of the dtype of `teacher_x`.
        temperature: divisor of the logits, above 0.

    Returns:
        `kl`, `[tokens]` float32, in nats, and `grad`, `[tokens, features]` float32, the gradient of `kl.sum()` for `x`.

    Raises:
        TypeError: a wrong dtype or type.
        ValueError: a wrong shape or device, a temperature of at most 0, NaN or Inf, or logits that overflow float32.

    Source: Hinton et al., Distilling the Knowledge in a Neural Network, 2015, equation 1; its factor `temperature^2` is left out.
    """
    for prefix, hidden, weight in (("", x, head), ("teacher_", teacher_x, teacher_head)):
        check_tensor(f"{prefix}x", hidden, ndim=2, dtypes=HALF_OR_FLOAT, shape=(len(x) if prefix else None, None), device=x.device)
        shape = (len(head) if prefix else None, hidden.shape[1])
        check_tensor(f"{prefix}head", weight, ndim=2, dtypes=(hidden.dtype,), shape=shape, device=x.device)
        if not weight.numel():
            raise ValueError(f"{prefix}head: expected at least one word and one feature, got shape {tuple(weight.shape)}")
    check_finite_number("temperature", temperature)
    if temperature <= 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    kl, grad = _op(x, head, teacher_x, teacher_head, temperature)
    return kl, grad


def reference(
    x: torch.Tensor, head: torch.Tensor, teacher_x: torch.Tensor, teacher_head: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return divergence and gradient by plain softmaxes, for `CHUNK` tokens at a time."""
    kl, grad = x.new_empty(len(x), dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)
    for begin in range(0, len(x), CHUNK):
        part = slice(begin, begin + CHUNK)
        student = torch.log_softmax(x[part].float() @ head.float().T / temperature, 1)
        teacher = torch.log_softmax(teacher_x[part].float() @ teacher_head.float().T / temperature, 1)
        share = teacher.exp()
        kl[part] = (share * (teacher - student)).sum(1)
        grad[part] = (student.exp() - share) @ head.float() / temperature
    if not kl.isfinite().all():
        for name, value in (("x", x), ("head", head), ("teacher_x", teacher_x), ("teacher_head", teacher_head)):
            check_finite(name, value)
        raise ValueError("x, teacher_x: expected logits that float32 can hold, got an overflow")
    return kl, grad


def _fake(x, head, teacher_x, teacher_head, temperature=1.0):
    torch._check(x.dim() == 2 and teacher_x.dim() == 2 and x.shape[0] == teacher_x.shape[0])
    torch._check(head.dim() == 2 and teacher_head.dim() == 2 and head.shape[0] == teacher_head.shape[0])
    torch._check(x.shape[1] == head.shape[1] and teacher_x.shape[1] == teacher_head.shape[1])
    return x.new_empty(x.shape[0], dtype=torch.float32), x.new_empty(x.shape, dtype=torch.float32)


def _samples(generator: torch.Generator):
    for tokens, words, features, wide, dtype in (
        (5, 70, 24, 40, torch.float32),
        (37, 33, 17, 17, torch.bfloat16),
        (1, 600, 33, 9, torch.float16),
    ):
        x, head = (torch.randn(rows, features, generator=generator).to(dtype) for rows in (tokens, words))
        teacher_x, teacher_head = (torch.randn(rows, wide, generator=generator) for rows in (tokens, words))
        yield sample(x, head, teacher_x, teacher_head)
        yield sample(x, head, x * 0.5, head, 2.0)


_op = define_op("linear_kl", SCHEMA, reference=reference, fake=_fake, samples=_samples)
