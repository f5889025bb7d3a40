"""What packing gains on this machine: size, memory, prefill and decode of a model, packed against dense."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn

from ..models.linears import linear_weight
from ..reports.plots import Bar, bars
from ..runtime.packing import weight_bytes
from ..runtime.sparse_linear import SparseLinear
from .generate import generate, random_prompt
from .resident import resident_of, why_unknown

# Relative difference of logits above which the two are not the same model: some tens of roundings, as a deep model adds them up.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# What is compared, as the table and the plot name it, and by what the table divides it.
ROWS = {
    "disk": ("weights on disk, MB", "size on disk", 1e6),
    "memory": ("weights in memory, MB", "memory of weights", 1e6),
    "resident": ("resident memory, MB", "resident memory", 1e6),
    "peak": ("peak resident memory, MB", "peak resident memory", 1e6),
    "prefill": ("prefill, tokens/s", "prefill speed", 1),
    "decode": ("decode, tokens/s", "decode speed", 1),
}
NOT_ASKED = "not asked for"


@dataclass(frozen=True)
class Measured:
    """One model: bytes of its weights in files (headers left out) and in memory, tokens a second of a prompt and of what follows.

    `resident` and `peak` are bytes of a process that has loaded it and generated, `started` what that had before; None: not known.
    """

    disk: int
    memory: int
    prefill: float
    decode: float
    resident: int | None = None
    peak: int | None = None
    started: int | None = None


@dataclass(frozen=True)
class Comparison:
    """`logits` is the norm of their difference on the prompt, relative to the dense ones'; `same_tokens` how many of the `tokens`
    generated are the same before the first that is not; `resident_unknown` why the resident memory is not known, if it is not."""

    dense: Measured
    packed: Measured
    logits: float
    same_tokens: int
    tokens: int
    prompt_length: int
    threads: int
    resident_unknown: str = NOT_ASKED

    def to_dict(self) -> dict[str, object]:
        return asdict(self)

    @property
    def ratios(self) -> dict[str, float]:
        """Packed over dense."""
        pairs = ((name, getattr(self.packed, name), getattr(self.dense, name)) for name in ROWS)
        return {name: packed / dense for name, packed, dense in pairs if packed is not None and dense}

    def __str__(self) -> str:
        rows = [("", "dense", "packed", "packed / dense")]
        for name, ratio in self.ratios.items():
            label, _, unit = ROWS[name]
            rows.append((label, *(f"{getattr(of, name) / unit:,.1f}" for of in (self.dense, self.packed)), f"{ratio:.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) for row in rows]
        lines.append(
            f"prompt of {self.prompt_length} tokens, {self.tokens} generated, {self.threads} threads; logits differ by {self.logits:.1e}, "
            f"the first {self.same_tokens} tokens generated are the same"
        )
        if not self.resident_unknown:
            started = " and ".join(f"{of.started / 1e6:,.1f}" for of in (self.dense, self.packed))
            lines.append(f"resident memory is of a process of its own for each model, {started} MB of it before that was loaded")
        elif self.resident_unknown != NOT_ASKED:
            lines.append(f"resident memory is not known: {self.resident_unknown}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """Bars of packed relative to dense."""
        rows = [Bar("dense", 1.0, "1", "#9aa4ae")]
        return bars(rows + [Bar(ROWS[name][1], ratio, f"{ratio:.2f}") for name, ratio in self.ratios.items()])


@torch.no_grad()
def compare(
    dense: nn.Module,
    packed: nn.Module,
    *,
    prompt_length: int = 128,
    tokens: int = 32,
    rounds: int = 3,
    resident: bool = False,
    trust_remote_code: bool = False,
) -> Comparison:
    """Check that two models are the same, then time them in turns; the medians are taken.

    Args:
        dense, packed: the same transformers causal language model twice, on one device.
        prompt_length: tokens of the prompt, drawn at random with a fixed seed.
        tokens: to generate after it, one at a time, with a key-value cache.
        rounds: of timing, after one to warm up.
        resident: measure the resident memory of a process for each model besides, which takes saving each to a temporary folder.
        trust_remote_code: let that process run code that the model has brought along.

    Raises:
        ValueError: a model that does not generate; counts below 1, or more tokens than the model has positions; packed weights that
            are not the dense ones, or logits that differ by more than rounding; tokens too few to be timed.
        RuntimeError: the process that was to tell its memory did not get to its end.
    """
    if not (callable(getattr(dense, "can_generate", None)) and dense.can_generate()):
        raise ValueError(f"dense: expected a causal language model of transformers, which generates; got {type(dense).__name__}")
    for name, value in (("prompt_length", prompt_length), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    positions = getattr(dense.config, "max_position_embeddings", None)
    if positions is not None and prompt_length + tokens + 1 > positions:
        raise ValueError(f"prompt_length, tokens: expected at most {positions - 1} together, the positions of this model but one")
    prompt = random_prompt(dense, prompt_length)
    _check_weights(dense, packed)
    difference = _logit_difference(dense, packed, prompt)
    unknown = why_unknown() if resident else NOT_ASKED
    if not unknown:
        options = {"prompt_length": prompt_length, "tokens": tokens, "trust_remote_code": trust_remote_code}
        of_processes = [resident_of(model, **options) for model in (dense, packed)]
    generated = [generate(model, prompt, tokens + 1) for model in (dense, packed)]  # a warm-up too
    same = (generated[0] == generated[1]).long().cumprod(0)[:tokens].sum()
    seconds: dict[tuple[int, int], list[float]] = {}
    for _ in range(rounds):
        for which, model in enumerate((dense, packed)):
            for count in (1, tokens + 1):
                seconds.setdefault((which, count), []).append(_timed(model, prompt, count))
    median = {key: statistics.median(taken) for key, taken in seconds.items()}
    measured = []
    for which, model in enumerate((dense, packed)):
        first, rest = median[which, 1], median[which, tokens + 1] - median[which, 1]
        if rest <= 0:
            raise ValueError(
                f"tokens: {tokens} take no longer than what the clock is unsure of; generate more, or take more rounds"
            )
        measured.append(Measured(saved_bytes(model), weight_bytes(model), prompt_length / first, tokens / rest))
    if not unknown:
        measured = [
            replace(of, resident=found.after, peak=found.peak, started=found.before)
            for of, found in zip(measured, of_processes, strict=True)
        ]
    return Comparison(*measured, difference, int(same), tokens, prompt_length, torch.get_num_threads(), unknown)


def saved_bytes(model: nn.Module) -> int:
    """The bytes of a model's tensors in files; tied ones are stored once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(tensors.values())


def _check_weights(dense: nn.Module, packed: nn.Module) -> None:
    """Rounding moves logits about as far as one bad layer of many does, so the weights themselves are compared, layer by layer."""
    for name, layer in packed.named_modules():
        if isinstance(layer, SparseLinear) and not torch.equal(layer.dense_weight(), linear_weight(dense.get_submodule(name))):
            raise ValueError(f"packed: the weight of {name} is not that of the dense model")


def _logits(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Of all tokens of the prompt, and of one more that is run by itself, as decoding does."""
    many = model(input_ids=prompt, use_cache=True)
    one = model(input_ids=prompt[:, -1:], past_key_values=many.past_key_values, use_cache=True)
    return torch.cat((many.logits, one.logits), dim=1).float()


def _logit_difference(dense: nn.Module, packed: nn.Module, prompt: torch.Tensor) -> float:
    expected, found = (_logits(model, prompt) for model in (dense, packed))
    difference = float((found - expected).norm() / expected.norm())
    if not difference <= TOLERANCE[dense.dtype]:
        raise ValueError(
            f"packed: its logits differ from the dense model's by {difference:.2g} of their norm; rounding explains {TOLERANCE[dense.dtype]}"
        )
    return difference


def _timed(model: nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    generate(model, prompt, tokens)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
