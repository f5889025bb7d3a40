"""`gated_split` in Triton, and the search that `plain_split` shares: one program searches a block of entries in registers.

Floor, on an H200: an entry needs 9 activations of about 12 instructions and 2 special functions each, and as much again around them. That
is nearly 300 instructions; 8 of them are special functions at a quarter of the rate. bf16 [2048, 11008], 23 million entries, takes 0.2 ms,
twice the time of its bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from ._common import CompileCase, check_operand, on_device_of

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
ACTIVATIONS = ("relu", "silu", "gelu", "gelu_tanh")
ENTRIES, WARPS = 512, 4  # entries and warps of a program


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """Return the activation of `x` and its slope."""
    if ACTIVATION == "relu":
        value = tl.maximum(x, 0.0)
        slope = tl.where(x > 0, 1.0, 0.0)
    elif ACTIVATION == "silu":
        gate = 1 / (1 + tl.exp(-x))
        value = x * gate
        slope = gate * (1 + x * (1 - gate))
    elif ACTIVATION == "gelu_tanh":
        gate = 1 / (1 + tl.exp(-1.59576912 * (x + 0.044715 * x * x * x)))
        value = x * gate
        slope = gate + x * gate * (1 - gate) * (1.59576912 * (1 + 0.134145 * x * x))
    else:
        gate = 0.5 + 0.5 * tl.erf(x * 0.70710678)
        value = x * gate
        slope = gate + x * 0.39894228 * tl.exp(-0.5 * x * x)
    return value, slope


@triton.jit
def misfit(t, p, up, ratio, GATED: tl.constexpr):
    """Return `ratio * fit(t)` of csrc/cpu/split.h."""
    if GATED:
        miss = p - t * up
        value = ratio * miss * miss / (1 + ratio * t * t)
    else:
        value = ratio * (p - t) * (p - t)
    return value


@triton.jit
def consider(place, s, t, slope, objective, p, up, gate, ratio, GATED: tl.constexpr, ACTIVATION: tl.constexpr):
    """Move the entries to `place` where that lowers the objective; return the new state and where it was lowered."""
    value, slope_there = activate(place, ACTIVATION)
    there = misfit(value, p, up, ratio, GATED) + (place - gate) * (place - gate)
    better = there < objective
    s = tl.where(better, place, s)
    t = tl.where(better, value, t)
    slope = tl.where(better, slope_there, slope)
    return s, t, slope, tl.where(better, there, objective), better


@triton.jit
def split(
    activated, up, gate, start, z_out, s_out, entries, ratio, steps,
    GATED: tl.constexpr, ACTIVATION: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Minimize the objective of a block of entries and store its minimizer `s`, with `GATED` also `z`.

    Starts from `start`, the gate, the preimage that fits, and four fixed points; then takes `steps` damped Gauss-Newton steps.
    """
    place = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    inside = place < entries
    p = tl.load(activated + place, mask=inside, other=0.0).to(tl.float32)
    m = tl.load(gate + place, mask=inside, other=0.0).to(tl.float32)
    s = tl.load(start + place, mask=inside, other=0.0).to(tl.float32)
    u = p
    wanted = tl.maximum(p, 0.0)
    if GATED:
        u = tl.load(up + place, mask=inside, other=0.0).to(tl.float32)
        wanted = p / u
        wanted = tl.where(wanted > 0, wanted, 0.0)  # 0 / 0 is NaN, which is not above 0
    t, slope = activate(s, ACTIVATION)
    objective = misfit(t, p, u, ratio, GATED) + (s - m) * (s - m)
    s, t, slope, objective, better = consider(m, s, t, slope, objective, p, u, m, ratio, GATED, ACTIVATION)
    s, t, slope, objective, better = consider(wanted, s, t, slope, objective, p, u, m, ratio, GATED, ACTIVATION)
    for i in tl.static_range(4):
        there = m * 0 + (-1.25 if i == 0 else 0.0 if i == 1 else 1.0 if i == 2 else 3.0)
        s, t, slope, objective, better = consider(there, s, t, slope, objective, p, u, m, ratio, GATED, ACTIVATION)
    length = p * 0 + 1
    for _ in range(steps):
        if GATED:
            scale = 1 / (1 + ratio * t * t)
            z = (u + ratio * t * p) * scale
            gradient = -(p - t * u) * scale * z
            curvature = z * z * scale
        else:
            gradient = t - p
            curvature = p * 0 + 1
        move = s - m + ratio * gradient * slope
        move = length * move / (1 + ratio * curvature * slope * slope)
        s, t, slope, objective, better = consider(s - move, s, t, slope, objective, p, u, m, ratio, GATED, ACTIVATION)
        length = tl.where(better, tl.minimum(2 * length, 1.0), length / 4)
    s = tl.where(objective == objective, s, objective)
    tl.store(s_out + place, s.to(s_out.dtype.element_ty), mask=inside)
    if GATED:
        z = (u + ratio * t * p) / (1 + ratio * t * t)
        tl.store(z_out + place, z.to(z_out.dtype.element_ty), mask=inside)


def gated_split(
    activated: torch.Tensor,
    up: torch.Tensor,
    gate: torch.Tensor,
    start: torch.Tensor,
    activation: str = "silu",
    ratio: float = 1.0,
    steps: int = 4,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the op `gated_split` for tensors of one shape and dtype; see `sparsekern.ops.gated_split`.

    Raises:
        ValueError: shapes, dtypes or devices that do not match.
    """
    activated, up, gate, start = alike(activated, up, gate, start)
    z, s = torch.empty_like(activated), torch.empty_like(activated)
    launch(activated, up, gate, start, z, s, activation, ratio, steps)
    return z, s


def alike(activated: torch.Tensor, *others: torch.Tensor) -> list[torch.Tensor]:
    """Return all tensors contiguous; raise a `ValueError` if their shapes, dtypes or devices differ."""
    for other in others:
        check_operand("up, gate, preactivation, start", other, activated, tuple(activated.shape), (activated.dtype,))
    return [tensor.contiguous() for tensor in (activated, *others)]


def launch(
    activated: torch.Tensor,
    up: torch.Tensor | None,
    gate: torch.Tensor,
    start: torch.Tensor,
    z: torch.Tensor | None,
    s: torch.Tensor,
    activation: str,
    ratio: float,
    steps: int,
) -> None:
    """Launch `split` on contiguous tensors of one shape and dtype; without `up` and `z` for `plain_split`."""
    if activated.numel():
        with on_device_of(activated):
            split[(triton.cdiv(activated.numel(), ENTRIES),)](
                activated, up, gate, start, z, s, activated.numel(), ratio, steps,
                GATED=up is not None, ACTIVATION=activation, ENTRIES=ENTRIES, num_warps=WARPS,
            )  # fmt: skip


def compile_cases(capability: tuple[int, int]) -> Iterator[CompileCase]:
    """Yield each dtype, each activation and both forms once; their combinations need no other code."""
    for gated, dtype, activation in (
        (True, torch.bfloat16, "silu"),
        (True, torch.float16, "gelu_tanh"),
        (True, torch.float32, "gelu"),
        (True, torch.float32, "relu"),
        (False, torch.bfloat16, "gelu"),
    ):
        pointer = f"*{DTYPES[dtype]}:16"
        names = ("activated", "up", "gate", "start", "z_out", "s_out") if gated else ("activated", "gate", "start", "s_out")
        absent = {} if gated else {"up": None, "z_out": None}
        yield CompileCase(
            split,
            {**dict.fromkeys(names, pointer), "entries": "i32", "ratio": "fp32", "steps": "i32"},
            {**absent, "GATED": gated, "ACTIVATION": activation, "ENTRIES": ENTRIES},
            WARPS,
            3,
        )
