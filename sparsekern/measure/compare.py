"""Size, memory and speed of a packed model on this machine, compared with the dense model."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from ..models.limits import positions
from ..reports.plots import Bar, bars
from ..runtime.packable import find_packables
from ..runtime.packing import weight_bytes
from .generate import generate, random_prompt
from .resident import resident_of, why_unknown

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Relative difference of logits above which two models are not the same. It allows some tens of roundings, which a deep model sums.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 1e-1}

# Each measurement: its label in the table, its label in the plot, and the divisor of the table.
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
    """The measurements of one model.

    Attributes:
        disk: bytes of the tensors in files, without headers.
        memory: bytes of the tensors in memory.
        prefill: tokens of the prompt per second.
        decode: generated tokens per second.
        resident: resident bytes of a process that has loaded the model and generated, None if unknown.
        peak: peak resident bytes of that process, None if unknown.
        started: resident bytes of that process before it loaded the model, None if unknown.
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
    """A comparison of a dense and a packed model, measured in turns.

    Attributes:
        dense: measurements of the dense model.
        packed: measurements of the packed model.
        logits: norm of the difference of their logits on the prompt, relative to the norm of the dense ones.
        same_tokens: number of generated tokens that agree before the first difference.
        tokens: number of generated tokens.
        prompt_length: tokens of the prompt.
        threads: number of threads of torch.
        resident_unknown: the reason why the resident memory is unknown, empty if it is known.
    """

    dense: Measured
    packed: Measured
    logits: float
    same_tokens: int
    tokens: int
    prompt_length: int
    threads: int
    resident_unknown: str = NOT_ASKED

    def to_dict(self) -> dict[str, object]:
        """Return the comparison as nested dictionaries for JSON."""
        return asdict(self)

    @property
    def ratios(self) -> dict[str, float]:
        """Ratio of the packed model to the dense model, for each known measurement."""
        pairs = ((name, getattr(self.packed, name), getattr(self.dense, name)) for name in ROWS)
        return {name: packed / dense for name, packed, dense in pairs if packed is not None and dense}

    def __str__(self) -> str:
        rows = [("", "dense", "packed", "packed / dense")]
        for name, ratio in self.ratios.items():
            label, _, unit = ROWS[name]
            dense, packed = (f"{getattr(of, name) / unit:,.1f}" for of in (self.dense, self.packed))
            rows.append((label, dense, packed, f"{ratio:.2f}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [f"{row[0]:<{widths[0]}}  " + "  ".join(f"{row[i]:>{widths[i]}}" for i in (1, 2, 3)) for row in rows]
        lines.append(
            f"prompt of {self.prompt_length} tokens, {self.tokens} generated, {self.threads} threads; logits differ by {self.logits:.1e}, "
            f"the first {self.same_tokens} tokens generated are the same"
        )
        if not self.resident_unknown:
            started = " and ".join(f"{of.started / 1e6:,.1f}" for of in (self.dense, self.packed) if of.started is not None)
            lines.append(f"resident memory is that of one process for each model, {started} MB of it before the model was loaded")
        elif self.resident_unknown != NOT_ASKED:
            lines.append(f"resident memory is unknown: {self.resident_unknown}")
        return "\n".join(lines)

    def to_svg(self) -> str:
        """Return an SVG plot of the ratios as bars."""
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
    """Check that two models are equal, then time them in turns and take medians.

    Args:
        dense: a transformers causal language model.
        packed: the same model packed, on the same device.
        prompt_length: tokens of the prompt, drawn at random with a fixed seed.
        tokens: number of tokens to generate, one at a time, with a key-value cache.
        rounds: rounds of timing, after one warm-up round.
        resident: also measure the resident memory of one process for each model, which saves each model to a temporary folder.
        trust_remote_code: let that process run the model's own code.

    Returns:
        The measurements of both models.

    Raises:
        ValueError: a model does not generate, a count is below 1, the tokens exceed the model's positions, packed weights differ from
            the dense ones, logits differ by more than rounding, or `tokens` is too small to be timed.
        RuntimeError: the process whose memory is measured failed.
    """
    can_generate = getattr(dense, "can_generate", None)
    both = getattr(getattr(dense, "config", None), "is_encoder_decoder", False)  # whose prompt would be read, not continued
    if both or not (callable(can_generate) and can_generate()):
        raise ValueError(f"dense: expected a causal language model of transformers, got {type(dense).__name__}")
    for name, value in (("prompt_length", prompt_length), ("tokens", tokens), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")
    limit = positions(dense)
    if limit is not None and prompt_length + tokens + 1 > limit:
        raise ValueError(f"prompt_length, tokens: expected at most {limit - 1} together, one less than the positions of this model")
    prompt = random_prompt(dense, prompt_length)
    _check_weights(dense, packed)
    difference = _logit_difference(dense, packed, prompt)
    unknown = why_unknown() if resident else NOT_ASKED
    if not unknown:
        of_processes = [
            resident_of(model, prompt_length=prompt_length, tokens=tokens, trust_remote_code=trust_remote_code)
            for model in (dense, packed)
        ]
    generated = [generate(model, prompt, tokens + 1) for model in (dense, packed)]  # also a warm-up
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
                f"tokens: expected more than {tokens}: decoding them is below the resolution of the timing; increase tokens or rounds"
            )
        measured.append(Measured(saved_bytes(model), weight_bytes(model), prompt_length / first, tokens / rest))
    if not unknown:
        measured = [
            replace(of, resident=found.after, peak=found.peak, started=found.before)
            for of, found in zip(measured, of_processes, strict=True)
        ]
    of_dense, of_packed = measured
    return Comparison(of_dense, of_packed, difference, int(same), tokens, prompt_length, torch.get_num_threads(), unknown)


def saved_bytes(model: nn.Module) -> int:
    """Return the bytes of a model's tensors in files. Tied tensors count once."""
    tensors = {tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in model.state_dict().values()}
    return sum(tensors.values())


def _check_weights(dense: nn.Module, packed: nn.Module) -> None:
    """Raise `ValueError` unless each packed weight equals the dense one.

    Logits are not a substitute: rounding can change them as much as a wrong layer does.
    """
    of_dense = find_packables(dense)
    for name, known in find_packables(packed, only_packed=True).items():
        if not torch.equal(known.dense, of_dense[name].dense):
            raise ValueError(f"packed: the weight of {name} differs from that of the dense model")


def _logits(model: nn.Module, prompt: torch.Tensor) -> torch.Tensor:
    """Return the logits of the prompt and of one more token that runs alone, as in decoding."""
    many = model(input_ids=prompt, use_cache=True)
    one = model(input_ids=prompt[:, -1:], past_key_values=many.past_key_values, use_cache=True)
    return torch.cat((many.logits, one.logits), dim=1).float()


def _logit_difference(dense: nn.Module, packed: nn.Module, prompt: torch.Tensor) -> float:
    expected, found = (_logits(model, prompt) for model in (dense, packed))
    difference = float((found - expected).norm() / expected.norm())
    tolerance = TOLERANCE[cast("PreTrainedModel", dense).dtype]
    if not difference <= tolerance:
        raise ValueError(
            f"packed: its logits differ from the dense model's by {difference:.2g} of their norm; rounding explains {tolerance}"
        )
    return difference


def _timed(model: nn.Module, prompt: torch.Tensor, tokens: int) -> float:
    start = time.perf_counter()
    generate(model, prompt, tokens)
    if prompt.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start
