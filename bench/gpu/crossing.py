"""The number of tokens from which cuSPARSELt multiplies a 2:4 layer fastest: the value that `cusparselt.FEWEST_TOKENS` should have."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.nn import functional

from sparsekern.runtime.cusparselt import FEWEST_TOKENS
from sparsekern.runtime.formats import NMPacked
from sparsekern.triton_kernels._packed_linear import MOST_TOKENS

from ..inputs import assert_close, n_of_m
from ..results import Row, seconds
from .cases import semi_structured
from .device import seconds_of
from .rows import SECTION, DevicePlace, failed

TOKENS = (17, 24, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 2048, 4096)
MOST_IN_PIECES = 64  # tokens for which 16 at a time, by the packed weight, are worth a look
PACKED, UNPACKED, COMPRESSED, DENSE = "packed, 16 tokens at a time", "unpacked, cuBLAS", "cuSPARSELt", "dense cuBLAS"

Product = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Sweep:
    """A benchmark of one row: the seconds of each way by number of tokens, and where they cross."""

    name: str
    rows_of_weight: int
    columns: int
    likely_seconds: float

    def rows(self, place: DevicePlace) -> Iterator[Row]:
        if place.device.type == "cuda" and not torch.backends.cusparselt.is_available():
            yield Row(SECTION, self.name, "not run: this PyTorch has no cuSPARSELt")
            return
        try:
            yield self._row(_measured(place, place.size(self.rows_of_weight, 64), place.size(self.columns, 128)))
        except Exception as error:
            yield failed(self.name, error)

    def _row(self, taken: Mapping[str, Mapping[int, float]]) -> Row:
        against = {
            tokens: min(taken[way][tokens] for way in (UNPACKED, PACKED) if tokens in taken[way]) for tokens in taken[UNPACKED]
        }
        first = crossing(taken[COMPRESSED], against)
        where = "at no number of tokens measured" if first is None else f"from **{first}** tokens on"
        most = max(against)
        reached = (
            f"cuSPARSELt wins {where} (FEWEST_TOKENS is {FEWEST_TOKENS}); with {most} it takes {seconds(taken[COMPRESSED][most])}, "
            f"unpacking and cuBLAS {seconds(taken[UNPACKED][most])}, the dense weight {seconds(taken[DENSE][most])}"
        )
        return Row(SECTION, self.name, reached, details={"crossing": first, "seconds": taken})


def crossing(ours: Mapping[int, float], against: Mapping[int, float]) -> int | None:
    """Return the least number of tokens from which `ours` is never slower; None if it is slower at the largest."""
    first = None
    for tokens in sorted(ours, reverse=True):
        if ours[tokens] > against[tokens]:
            break
        first = tokens
    return first


def _measured(place: DevicePlace, rows: int, columns: int) -> dict[str, dict[int, float]]:
    weight = n_of_m(place.randn(rows, columns, dtype=torch.bfloat16) / columns**0.5)
    ways = _ways(weight, place)
    taken: dict[str, dict[int, float]] = {way: {} for way in ways}
    for tokens in TOKENS[:4] if place.toy else TOKENS:
        x = place.randn(tokens, columns, dtype=torch.bfloat16)
        exact = x[:64].double() @ weight.double().T
        for way, products in ways.items():
            if way == PACKED and tokens > MOST_IN_PIECES:
                continue
            assert_close(products[0](x)[:64].double(), exact, 4e-3)
            taken[way][tokens] = seconds_of([lambda p=p, x=x: p(x) for p in products], place.device)
    return taken


def _ways(weight: torch.Tensor, place: DevicePlace) -> dict[str, list[Product]]:
    """Return the products by name; copies of the layer take turns, so that no call finds its weight in the L2."""
    fmt, shape = NMPacked(2, 4), tuple(weight.shape)
    tensors = fmt.pack(weight)
    copies = place.copies(sum(tensor.nbytes for tensor in tensors.values()))
    packed = [{name: tensor.clone() for name, tensor in tensors.items()} for _ in copies]
    return {
        PACKED: [lambda x, t=t: torch.cat([fmt.linear(few, t, shape) for few in x.split(MOST_TOKENS)]) for t in packed],
        UNPACKED: [lambda x, t=t: fmt.linear(x, t, shape) for t in packed],
        COMPRESSED: [semi_structured(weight, "cusparselt") for _ in copies],
        DENSE: [lambda x, w=w: functional.linear(x, w) for w in [weight.clone() for _ in copies]],
    }


SWEEPS = (
    Sweep("2:4 linear, 11008x4096 bf16: from how many tokens on cuSPARSELt wins", 11008, 4096, likely_seconds=16),
    Sweep("2:4 linear, 4096x4096 bf16: from how many tokens on cuSPARSELt wins", 4096, 4096, likely_seconds=16),
)
