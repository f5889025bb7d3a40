"""Calibration windows that a model writes itself: `self:200k` stands for 200,000 tokens of its own samples.

Each window begins with a random token. Four likely tokens follow, so that the text becomes one that the model knows; the rest is drawn
from the model's distribution. Or a window goes on with a passage of a text that is given. The windows are kept in a cache under the digest of everything that they depend on.
"""

from __future__ import annotations

import hashlib
import inspect
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._files import write_atomically
from ..models.evaluation import evaluation_mode
from ..models.fingerprint import model_fingerprint
from ..models.limits import vocabulary
from ..models.streaming import refuse_streamed
from .sources import own_tokens

GREEDY = 4  # tokens that are the most likely ones, behind the first
TOGETHER = 32  # windows that are written at once, whatever the machine: the numbers drawn depend on it
CACHE = "SPARSEKERN_CACHE"
VERSION = 1  # raised whenever other windows are written for the same arguments


def own_windows(
    model: nn.Module, source: str, *, samples: int | None, length: int, seed: int, progress: bool = False
) -> torch.Tensor:
    """Return windows that `model` writes, or those that it wrote before.

    Args:
        model: the dense causal language model, in memory.
        source: the number of tokens, such as `"self:200k"`.
        samples: number of windows; None takes all that the tokens make.
        length: tokens in a window.
        seed: seed of all random numbers.
        progress: show a progress bar.

    Returns:
        `[windows, length]` int64.

    Raises:
        ValueError: the tokens make no window or fewer than `samples`; the model is streamed, or predicts no next tokens.
    """
    _check_writes(model)
    windows = own_tokens(source) // length
    wanted = windows if samples is None else samples
    if not 0 < wanted <= windows:
        raise ValueError(
            f"calibration: {source} makes {windows} windows of {length} tokens, expected {max(wanted, 1)} or more of them"
        )
    return _kept(model, torch.empty(wanted, 0, dtype=torch.int64, device="cpu"), length, seed, progress)


def continued(model: nn.Module, passages: torch.Tensor, *, length: int, seed: int, progress: bool = False) -> torch.Tensor:
    """Return windows that `model` writes behind passages of a text, or those that it wrote before.

    Args:
        model: the dense causal language model, in memory.
        passages: `[windows, tokens]` int64, the first tokens of each window.
        length: tokens in a window.
        seed: seed of all random numbers.
        progress: show a progress bar.

    Returns:
        `[windows, length]` int64.

    Raises:
        ValueError: the model is streamed, or predicts no next tokens.
    """
    _check_writes(model)
    return _kept(model, passages.cpu(), length, seed, progress)


def _kept(model: nn.Module, given: torch.Tensor, length: int, seed: int, progress: bool) -> torch.Tensor:
    """Return the windows that begin with `given`, `[windows, tokens]`, from the cache if they are there."""
    from safetensors.torch import save

    path = _place(model, given, length, seed)
    found = _cached(path, (len(given), length))
    if found is None:
        found = torch.cat([*_written(model, given, length, seed, progress)])
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save({"ids": found}))
    return found


def _check_writes(model: nn.Module) -> None:
    refuse_streamed(model, "which would be read once for each token that it writes")
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False) or not getattr(model, "can_generate", lambda: False)():
        raise ValueError(f"calibration: expected a text for {type(model).__name__}, which predicts no next tokens to write its own")


def _place(model: nn.Module, given: torch.Tensor, length: int, seed: int) -> Path:
    """Return the file of the windows, named by a digest of all that they depend on."""
    parts: tuple[object, ...] = (VERSION, model_fingerprint(model), len(given), length, seed, TOGETHER, GREEDY, torch.__version__)
    if given.numel():
        parts += (tuple(given.shape), hashlib.sha256(given.contiguous().numpy().tobytes()).hexdigest())
    digest = hashlib.sha256(repr(parts).encode()).hexdigest()
    folder = os.environ.get(CACHE) or Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "sparsekern"
    return Path(folder) / f"self-{digest[:32]}.safetensors"


def _cached(path: Path, shape: tuple[int, int]) -> torch.Tensor | None:
    """Return the windows of a file; None where there is no such file, or a damaged one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.exists():
        return None
    try:
        ids = load_file(path)["ids"]
    except (SafetensorError, KeyError):
        return None
    return ids if ids.dtype == torch.int64 and tuple(ids.shape) == shape else None


def _written(model: nn.Module, given: torch.Tensor, length: int, seed: int, progress: bool) -> Iterator[torch.Tensor]:
    """Yield the windows, `TOGETHER` of them at a time."""
    from tqdm import tqdm

    bar = tqdm(total=len(given), disable=not progress, unit="window", desc="writing", dynamic_ncols=True)
    with torch.no_grad(), evaluation_mode(model), bar:
        for begin in range(0, len(given), TOGETHER):
            generator = torch.Generator(device="cpu").manual_seed(zlib.crc32(f"{seed} self {begin}".encode()))
            part = given[begin : begin + TOGETHER]
            yield _write(model, part, length, generator)
            bar.update(len(part))


def _write(model: Any, given: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    known = vocabulary(model)
    assert known is not None
    device = next(model.parameters()).device
    special = torch.tensor(sorted(_special(model, known)), dtype=torch.int64, device=device)
    first = torch.ones(known).index_fill_(0, special.cpu(), 0)
    ids = list(given.unbind(1)) or [torch.multinomial(first, len(given), replacement=True, generator=generator)]
    new, cache = torch.stack(ids, 1), None
    greedy = 0 if given.shape[1] else GREEDY
    takes = inspect.signature(model.forward).parameters
    keyword = "cache" if "cache" in takes else "past_key_values"  # transformers 5.24 has renamed the argument
    last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
    while len(ids) < length:
        for piece in new.split(new.shape[1] if last else 1, 1):  # the logits of a whole passage may be large
            output = model(input_ids=piece.to(device), use_cache=True, **{keyword: cache}, **last)
            cache = output.past_key_values
        logits = output.logits[:, -1].float().index_fill_(1, special, -torch.inf)
        if len(ids) <= greedy:
            ids.append(logits.argmax(1).cpu())
        else:
            ids.append(torch.multinomial(logits.softmax(1).cpu(), 1, generator=generator)[:, 0])
        new = ids[-1][:, None]
    return torch.stack(ids, 1)


def _special(model: Any, known: int) -> set[int]:
    """Return the ids that end or fill a text, which no window holds."""
    found: set[int] = set()
    for config in (model.config, getattr(model, "generation_config", None)):
        for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
            value = getattr(config, name, None)
            found.update(value if isinstance(value, (list, tuple)) else [value] if isinstance(value, int) else [])
    return {token for token in found if 0 <= token < known}
