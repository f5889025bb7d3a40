"""Whole `prune` calls on models of random weights with the shape of LLaMA-7B, made on the device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

import sparsekern

from ..results import Row, seconds
from .device import synchronize
from .rows import DevicePlace

SECTION = "prune"
BLOCK_LINEARS = ((4096, 4096),) * 4 + ((4096, 11008),) * 2 + ((11008, 4096),)  # in, out


def llama(place: DevicePlace, blocks: int):
    """Return a model with the shape of LLaMA-7B and `blocks` blocks; its own initialisation draws the weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        vocab_size=place.size(32000, 320),
        hidden_size=place.size(4096, 64),
        intermediate_size=place.size(11008, 160),
        num_hidden_layers=place.size(blocks, 2),
        num_attention_heads=place.size(32, 4),
        num_key_value_heads=place.size(32, 4),
        max_position_embeddings=place.size(2048, 64),
    )
    torch.manual_seed(0)
    with torch.device(place.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def forward_flops(tokens: int, length: int, last_linear: bool) -> float:
    """Return the FLOPs of one block of LLaMA-7B: products and causal attention, with `last_linear` that of `down_proj` too."""
    products = sum(2 * columns * rows for columns, rows in BLOCK_LINEARS[: None if last_linear else -1])
    return tokens * (products + 2 * 4096 * length)


def floor_seconds(place: DevicePlace, blocks: int, tokens: int, length: int) -> float:
    """Return the least seconds: two forwards, four Gram matrices, four factors and seven sweeps a block, each at its unit's rate."""
    on_bf16 = forward_flops(tokens, length, False) + forward_flops(tokens, length, True) + tokens * (3 * 4096**2 + 11008**2)
    on_fp32 = (3 * 4096**3 + 11008**3) / 3 + sum(rows * columns**2 for columns, rows in BLOCK_LINEARS)
    return blocks * (on_bf16 / place.ceilings.bf16 + on_fp32 / place.ceilings.fp32)


@contextmanager
def _profiled(place: DevicePlace) -> Iterator[None]:
    """Print the kernels that take the most time, where that was asked for."""
    if not place.profile:
        yield
        return
    from torch.profiler import ProfilerActivity, profile

    on_device = place.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA] if on_device else [ProfilerActivity.CPU]) as seen:
        yield
    column = "self_device_time_total" if on_device else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=column, row_limit=40, max_name_column_width=90))


@dataclass(frozen=True)
class Run:
    """A benchmark of SparseGPT to 2:4 on `samples` of 2048 random tokens."""

    name: str
    blocks: int
    samples: int
    likely_seconds: float
    goal_seconds: float | None = None

    def rows(self, place: DevicePlace) -> Iterator[Row]:
        samples, length = place.size(self.samples, 4), place.size(2048, 64)
        model = llama(place, self.blocks)
        vocabulary = model.get_input_embeddings().num_embeddings
        ids = torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
        synchronize(place.device)
        if place.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        with _profiled(place):
            report = sparsekern.prune(model, "sparsegpt", "2:4", ids, progress=False)
            synchronize(place.device)
        taken = time.perf_counter() - start
        wrong = self._what_is_wrong(model, report)
        phases = {name: value for name, value in report.seconds.items() if name != "total"}
        floor = floor_seconds(place, self.blocks, samples * length, length)
        reached = [seconds(taken), *(f"{name} {value:.1f}" for name, value in phases.items()), f"floor {floor:.1f} s"]
        peak = torch.cuda.max_memory_allocated() if place.device.type == "cuda" else 0
        yield Row(
            SECTION,
            self.name,
            f"**failed**: {wrong}" if wrong else ", ".join(reached),
            goal=f"<= {self.goal_seconds:.0f} s" if self.goal_seconds else "",
            met=False if wrong else taken <= self.goal_seconds if self.goal_seconds else None,
            details={
                "seconds": taken,
                "phases": phases,
                "floor_seconds": floor,
                "peak_bytes": peak,
                "errors": {layer.name: layer.error for layer in report.layers},
                "layer_seconds": {layer.name: layer.seconds for layer in report.layers},
            },
        )

    @staticmethod
    def _what_is_wrong(model, report) -> str | None:
        for layer in report.layers:
            groups = model.get_submodule(layer.name).weight.unflatten(1, (-1, 4)) != 0
            if int(groups.sum(-1).max()) > 2:
                return f"{layer.name} is not 2:4"
            if layer.error is None or not 0 < layer.error < 0.5:
                return f"{layer.name} has an error of {layer.error}"
        return None


RUNS = (
    Run("LLaMA-7B shape, 4 of its 32 blocks, SparseGPT 2:4, 128 x 2048 tokens", 4, 128, 15),
    Run("LLaMA-7B shape, SparseGPT 2:4, 128 x 2048 tokens, the whole call", 32, 128, 40, goal_seconds=45.0),
)
