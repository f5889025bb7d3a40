"""The tensors of a GGUF file: their names, types and bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.sparse import SparseSemiStructuredTensor

from ..layouts.q4_0 import BLOCK_COLUMNS, q4_0_rows
from ..layouts.q4_grid import telling_scales
from ..layouts.q8_0 import check_scales, held_by_float16, q8_0_rows
from ..models.linears import is_conv1d
from ..ops import nm_q4_unpack
from ..runtime import SparseLinear
from ..runtime.formats import Int8, NMQ4Packed
from ..runtime.int8_embedding import Int8Embedding
from ..runtime.packed_weight import PackedWeight
from .architectures import Architecture, interleaved, rotary_divisors

if TYPE_CHECKING:
    import numpy

AUTO, Q4_0, Q8_0 = "auto", "q4_0", "q8_0"
TYPES = (AUTO, "f32", "f16", "bf16", Q8_0, Q4_0)
OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
OUTSIDE = ("token_embd.weight", "output.weight")  # the embedding and the head

Source = torch.Tensor | SparseLinear | Int8Embedding


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: its name in the file.
        shape: of the weight.
        kind: its type, one of `TYPES` but `"auto"`.
        source: where the weight is.
        order: the order of its rows, None where they stay as they are.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    source: Source
    order: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor in the file."""
        from gguf import GGML_QUANT_SIZES

        weights, size = GGML_QUANT_SIZES[type_of(self.kind)]
        return torch.Size(self.shape).numel() // weights * size

    def data(self) -> numpy.ndarray:
        """Return the tensor as `gguf.GGUFWriter` takes it: float16, float32, or the bytes of each row.

        Raises:
            ValueError: a weight is too large for float16.
        """
        if (eight := _eight_bits(self.source)) is not None and self.kind == Q8_0:
            values, row_scales = eight if self.order is None else (eight[0][self.order], eight[1][self.order])
            return q8_0_rows(values.cpu(), row_scales.cpu()).numpy()
        grid = _grid(self.source) if self.kind == Q4_0 else None
        weight, scales = grid if grid is not None else (_dense(self.source), None)
        if self.order is not None:
            weight, scales = weight[self.order], None if scales is None else scales[self.order]
        weight = weight.cpu()
        if self.kind == "f16":
            half = weight.half()
            if (half.isinf() & ~weight.isinf()).any():
                raise ValueError(
                    f"type: expected 'f32' or 'bf16' for weights above {torch.finfo(torch.float16).max:,.0f} ({self.name})"
                )
            return half.numpy()
        if self.kind == "f32":
            return weight.float().numpy()
        if self.kind == "bf16":
            return weight.bfloat16().contiguous().view(torch.uint8).numpy()
        if scales is not None:
            return q4_0_rows(weight, scales.cpu()).numpy()
        from gguf import quantize

        rounded: numpy.ndarray = quantize(weight.float().contiguous().numpy(), type_of(self.kind))
        return rounded


def type_of(kind: str) -> Any:
    """Return the `gguf.GGMLQuantizationType` of a name."""
    from gguf import GGMLQuantizationType

    return GGMLQuantizationType[kind.upper()]


def tensors_of(model: nn.Module, architecture: Architecture, type: str) -> list[Stored]:
    """Return the tensors of a model in the order of the file.

    Args:
        model: a model of this family, dense or packed.
        architecture: the family.
        type: see `export_gguf`.

    Raises:
        ValueError: the family has no such weight in llama.cpp.
    """
    from gguf import MODEL_ARCH_NAMES, get_tensor_name_map

    config: Any = model.config
    number = next(key for key, name in MODEL_ARCH_NAMES.items() if name == architecture.name)
    names = get_tensor_name_map(number, config.num_hidden_layers)
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads} if architecture.interleaves else {}
    found = []
    for own_name, shape, source in named_weights(model):
        name = names.get_name(own_name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ValueError(
                f"model: expected the weights of a causal {config.model_type}, got {own_name}, which llama.cpp does not read"
            )
        part = name.split(".")[-2]
        order = interleaved(shape[0], heads[part]) if part in heads else None
        found.append(Stored(name, shape, _kind(name, shape, source, type), source, order))
    if (divisors := rotary_divisors(config)) is not None:
        found.append(Stored("rope_freqs.weight", tuple(divisors.shape), "f32", divisors))
    return found


def named_weights(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...], Source]]:
    """Yield name, shape and place of each weight; of shared ones the first, and of packed ones the name that they have when dense."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, PackedWeight) and not module.owns_tensors:
            pass  # the embeddings hold its weight
        elif isinstance(module, (SparseLinear, Int8Embedding)):
            yield f"{name}.weight", module.shape, module
        elif isinstance(getattr(module, "weight", None), SparseSemiStructuredTensor):
            raise ValueError(f"model: expected dense or packed weights, got a {type(module.weight).__name__} in {name}")
        elif isinstance(module, PackedWeight) or is_conv1d(module):
            raise ValueError(f"model: expected plain linears, got {name}, a {type(module).__name__}")
        for own_name, parameter in module.named_parameters(recurse=False):
            inside = isinstance(module, PackedWeight) and own_name != "bias"
            if not inside and id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{name}.{own_name}", tuple(parameter.shape), parameter.detach()


def _kind(name: str, shape: tuple[int, ...], source: Source, type: str) -> str:
    """Return the type of a weight in the file. Vectors are float32, which llama.cpp expects."""
    if len(shape) != 2:
        return "f32"
    whole = shape[1] % BLOCK_COLUMNS == 0
    if whole and _eight_bits(source) is not None:
        return Q8_0
    if whole and _has_4_bits(source):
        return Q4_0
    if type == AUTO or (type in (Q4_0, Q8_0) and not whole):
        return OF_DTYPE[source.dtype]
    return Q8_0 if type == Q4_0 and name in OUTSIDE else type


def _dense(source: Source) -> torch.Tensor:
    return source if isinstance(source, torch.Tensor) else source.dense_weight()


def _eight_bits(source: Source) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return values and scales of a weight of 8 bits; None for another."""
    if isinstance(source, torch.Tensor) or not isinstance(source.layout, Int8):
        return None
    return source.tensors["values"], source.tensors["scales"]


def rounded_rows(tensors: Sequence[Stored]) -> int:
    """Return the number of rows of 8-bit values that the file does not hold as they are, since their scales are no numbers of float16.

    Raises:
        ValueError: a scale is beyond float16.
    """
    rows = 0
    for tensor in tensors:
        if tensor.kind == Q8_0 and (found := _eight_bits(tensor.source)) is not None:
            try:
                check_scales(found[1])
            except ValueError as error:
                raise ValueError(f"model: {tensor.name}: {error}") from error
            rows += int((~held_by_float16(found[1])).sum())
    return rows


def _has_4_bits(source: Source) -> bool:
    return (isinstance(source, SparseLinear) and isinstance(source.layout, NMQ4Packed)) or _grid(source) is not None


def _grid(source: Source) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return a matrix of 4 bits with its scales; None where it has others."""
    if isinstance(source, SparseLinear) and isinstance(layout := source.layout, NMQ4Packed):
        return nm_q4_unpack(source.tensors["blocks"], layout.n, layout.m, *source.shape)
    weight = _dense(source)
    scales = telling_scales(weight)
    return None if scales is None else (weight, scales)
