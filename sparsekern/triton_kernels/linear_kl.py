"""`linear_kl` between products of cuBLAS: one program compares the logits of a token, and replaces them by their gradient.

Floor, on an H200: the three products. Beside them, two float32 logits a word are read twice and one result is written: 20 bytes, 1 MB a
token for 49,152 words, a quarter of a microsecond at 4.3 TB/s. The first read keeps running maxima and sums, which are rescaled where a
maximum rises; the second one comes from the L2 cache if the logits of all programs at work fit there.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

WORDS, WARPS = 2048, 8  # words of a step, warps of a program
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@triton.jit
def compare(student, teacher, kl, out, words, stride, scale, WORDS: tl.constexpr):
    """Store the divergence of a token, and the gradient of its logits.

    With logits `z`, divided by the temperature `1 / scale`, the gradient for the unscaled ones is `scale * (softmax(s) - softmax(t))`.
    """
    row = tl.program_id(0).to(tl.int64) * stride
    s_top, t_top = -float("inf"), -float("inf")
    s_sum, t_sum, difference = 0.0, 0.0, 0.0
    for first in range(0, words, WORDS):
        place = first + tl.arange(0, WORDS)
        inside = place < words
        s = tl.load(student + row + place, mask=inside, other=-float("inf")) * scale
        t = tl.load(teacher + row + place, mask=inside, other=-float("inf")) * scale
        s_new, t_new = tl.maximum(s_top, tl.max(s)), tl.maximum(t_top, tl.max(t))
        share = tl.exp(t - t_new)
        s_sum = s_sum * tl.exp(s_top - s_new) + tl.sum(tl.exp(s - s_new))
        shrunk = tl.exp(t_top - t_new)
        t_sum = t_sum * shrunk + tl.sum(share)
        difference = difference * shrunk + tl.sum(tl.where(inside, share * (t - s), 0.0))
        s_top, t_top = s_new, t_new
    tl.store(kl + tl.program_id(0), difference / t_sum - (t_top - s_top) + tl.log(s_sum) - tl.log(t_sum))
    for first in range(0, words, WORDS):
        place = first + tl.arange(0, WORDS)
        inside = place < words
        s = tl.load(student + row + place, mask=inside, other=-float("inf")) * scale
        t = tl.load(teacher + row + place, mask=inside, other=-float("inf")) * scale
        change = tl.exp(s - s_top) / s_sum - tl.exp(t - t_top) / t_sum
        tl.store(out + row + place, (scale * change).to(out.dtype.element_ty), mask=inside)


def compare_logits(student: torch.Tensor, teacher: torch.Tensor, out: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the divergence of each token, `[tokens]` float32, and write the gradient of the student's logits to `out`.

    Args:
        student: `[tokens, vocabulary]` float32, contiguous, not divided by the temperature.
        teacher: the same for the teacher.
        out: `[tokens, vocabulary]`, contiguous, of any floating dtype; it may be `student`.
        temperature: divisor of the logits.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    tokens, words = student.shape
    check_operand("teacher", teacher, student, (tokens, words))
    check_operand("out", out, student, (tokens, words), DTYPES)
    kl = student.new_empty(tokens)
    if tokens:
        with on_device_of(student):
            compare[(tokens,)](student, teacher, kl, out, words, words, 1 / temperature, WORDS=WORDS, num_warps=WARPS)
    return kl


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield the shipped configurations, the same for every device."""
    for name in DTYPES.values():
        pointers = dict.fromkeys(("student", "teacher", "kl"), "*fp32:16") | {"out": f"*{name}:16"}
        yield CompileCase(compare, {**pointers, "words": "i32:16", "stride": "i32:16", "scale": "fp32"}, {"WORDS": WORDS}, WARPS, 3)
