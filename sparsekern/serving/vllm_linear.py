"""Linears of vLLM with packed weights. Only vLLM's process imports this module.

vLLM fuses linears that read the same tensor, and gives each rank its slice of rows or columns. Its own loaders know where each part
of a checkpoint goes. So each packed part is unpacked into a dense weight by them, one linear at a time, and the whole is packed again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from vllm import __version__ as vllm_version
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.linear import LinearBase, LinearMethodBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

from ..models.units import recorded_units
from ..runtime.formats import Q4, format_of
from ..runtime.hf_config import METHOD, PackedLayer
from ..runtime.packed_weight import DTYPES
from ..runtime.packing import PACKED, smallest
from ..runtime.sparse_linear import SparseLinear
from .served import CONTEXT, check_version, layers_of

QKV = ("q", "k", "v")  # what vLLM's loaders call the parts of a fused query, key and value
READ_BY_ATTENTION = "kv_b_proj"  # whose dense weight multi-head latent attention takes apart


class PackedConfig(QuantizationConfig):  # type: ignore[misc]  # vLLM is not there when types are checked
    """The quantization method `"sparsekern"` for one model.

    Attributes:
        layers: packed layers of the checkpoint by name. Of a dense checkpoint there are none; its linears are packed after loading.
    """

    def __init__(self, layers: dict[str, PackedLayer] | None = None) -> None:
        super().__init__()
        check_version(vllm_version)
        self.layers = dict(layers or {})
        self._linears: list[PackedLinear | DenseLinear] = []
        self._checked, self._served = False, None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Return the config for the `quantization_config` in a model's `config.json`.

        Raises:
            ValueError: another version of the layouts, an entry that cannot be read safely, or packed experts.
        """
        return cls(layers_of(config))

    @classmethod
    def get_name(cls) -> str:
        """Return `"sparsekern"`."""
        return METHOD

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        """Return the dtypes that a packed weight may have."""
        return list(DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        """Return 80, the least compute capability of the Triton kernels."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return nothing: all is in `config.json`, and a dense checkpoint needs no file."""
        return []

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Raise `ValueError` for an encoder whose heads and neurons were cut, whose sizes vLLM does not know."""
        if recorded_units(hf_config) is not None:
            raise ValueError(
                f"{CONTEXT}: expected a model whose layers have equal sizes, got {model_name!r}, whose heads and neurons were cut"
            )

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give the packed layers the names that they have in vLLM's model."""
        self.layers = hf_to_vllm_mapper.apply_dict(self.layers)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """Return what loads a layer's weight and multiplies by it, or None for layers other than linears."""
        packed = {part: self.layers[part] for part in self._parts(prefix) if part in self.layers}
        if not packed and not isinstance(layer, LinearBase):
            return None
        if not isinstance(layer, (LinearBase, ParallelLMHead)):
            raise ValueError(f"{CONTEXT}: expected a linear or a head, got {prefix}, a packed {type(layer).__name__}")
        self._served = get_current_vllm_config()
        method = PackedLinear(self, prefix, self._parts(prefix)) if packed else DenseLinear(self, prefix)
        self._linears.append(method)
        return method

    def check_loaded(self) -> None:
        """Raise `ValueError` unless each packed layer of the checkpoint was loaded, or, of a dense one, a linear is still to be packed.

        vLLM's loaders of some models leave out what they do not know, so this is found here. Layers of other pipeline stages are
        not looked for.
        """
        if self._checked:
            return
        self._checked = True
        loaders = [linear for linear in self._linears if isinstance(linear, PackedLinear)]
        lost = [part for linear in loaders for part in linear.missing()]
        if not is_one_of_stages():
            lost += sorted(self.layers.keys() - {part for linear in loaders for part in linear.parts})
        if lost:
            raise ValueError(f"{CONTEXT}: {len(lost)} layers of the checkpoint did not arrive, {lost[0]} among them")

    def check_packed(self) -> None:
        """Raise `ValueError` if all linears of a dense checkpoint were looked at, and none got smaller."""
        if not self.layers and not any(linear.packed or linear.waits for linear in self._linears):
            raise ValueError(
                f"{CONTEXT}: expected a model with zeros, got one in which none of {len(self._linears)} linears gets smaller packed; "
                "serve it without --quantization"
            )

    def note(self, prefix: str, sparse: SparseLinear | None) -> None:
        """Add the format of a linear to the key of vLLM's cache of compiled models, since each format calls other ops."""
        further = getattr(self._served, "additional_config", None)
        if isinstance(further, dict):
            further.setdefault(METHOD, {})[prefix] = None if sparse is None else sparse.format

    def _parts(self, prefix: str) -> list[str]:
        """Return the names in the checkpoint of the linears that one of vLLM's holds."""
        path, dot, own = prefix.rpartition(".")
        return [prefix] if prefix in self.layers else [f"{path}{dot}{name}" for name in self.packed_modules_mapping.get(own, [own])]


class DenseLinear(UnquantizedLinearMethod):  # type: ignore[misc]
    """A linear whose weight arrives dense. Of a checkpoint without packed layers it is packed after loading if that saves memory.

    Attributes:
        packed: whether it was packed.
        waits: whether it has not been looked at.
    """

    def __init__(self, config: PackedConfig, prefix: str) -> None:
        super().__init__()
        self.config, self.prefix, self.packed, self.waits = config, prefix, False, True

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight, or prepare it for vLLM's own product."""
        self.config.check_loaded()
        if not self.config.layers:
            layer.sparse = packed_form(self.prefix, layer.weight.data, layer.weight.dtype)
            self.packed, self.waits = layer.sparse is not None, False
            self.config.note(self.prefix, layer.sparse)
            self.config.check_packed()
        if self.packed:
            del layer.weight
        else:
            super().process_weights_after_loading(layer)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute `x @ weight.T + bias`."""
        return multiply(layer.sparse, x, bias) if self.packed else super().apply(layer, x, bias)


class PackedLinear(LinearMethodBase):  # type: ignore[misc]
    """A linear, or several that vLLM has fused, of which some arrive packed.

    Attributes:
        parts: names in the checkpoint of the linears that are fused.
        packed: whether the weight is packed. A fused one that would not get smaller is dense.
    """

    waits = False

    def __init__(self, config: PackedConfig, prefix: str, parts: list[str]) -> None:
        self.prefix, self.parts, self.packed = prefix, parts, False
        self._described = {part: config.layers[part] for part in parts if part in config.layers}
        self._config = config
        self._held: dict[str, dict[str, torch.Tensor]] = {part: {} for part in self._described}
        self._arrived: set[str] = set()
        self._whole: Any = None
        self._result: SparseLinear | nn.Parameter | None = None

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **attributes: Any,
    ) -> None:
        """Register empty parameters under the names of the packed tensors, whose loaders take what arrives."""
        shape = (sum(output_partition_sizes), input_size_per_partition)
        self._dtype = params_dtype
        four_bits = any(known.format.endswith(Q4) for known in self._described.values())
        exact = torch.float32 if four_bits else params_dtype  # in which the scales of 4-bit values are found again
        self._make_whole = partial(_dense_weight, shape, exact, {**attributes, "weight_loader": weight_loader})
        expected = {name: spec.dtype for known in self._described.values() for name, spec in known.tensors().items()}
        if len(self._described) < len(self.parts):
            expected["weight"] = params_dtype
        for name, dtype in expected.items():
            place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            anything: Any = place  # a tensor has no such attribute for the type checker
            anything.weight_loader = partial(self._receive, name)
            layer.register_parameter(name, place)
        self._places = list(expected)

    def missing(self) -> list[str]:
        """Return the parts that have not arrived."""
        return [part for part in self.parts if part not in self._arrived]

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put the packed weight in the place of the parameters that received its parts.

        Raises:
            ValueError: a packed layer of the model did not arrive.
        """
        self._config.check_loaded()
        for name in self._places:
            delattr(layer, name)
        sparse = self._result if isinstance(self._result, SparseLinear) else None
        self.packed = sparse is not None
        self._config.note(self.prefix, sparse)
        if self.packed:
            layer.sparse = sparse
        else:
            layer.weight = self._result
        self._result = None

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """Compute `x @ weight.T + bias`."""
        return multiply(layer.sparse, x, bias) if self.packed else nn.functional.linear(x, layer.weight, bias)

    def _receive(self, name: str, place: nn.Parameter, tensor: torch.Tensor, shard: str | int | None = None) -> None:
        """Take a tensor of the checkpoint. Once a part is complete, vLLM's loader puts it in its place in the whole weight."""
        part = self._part(shard)
        if name != "weight":
            known = self._described[part]
            held = self._held[part]
            held[name] = tensor.to(place.device)
            if held.keys() != known.tensors().keys():
                return
            tensor = _unpacked(part, known, self._held.pop(part))
        if self._whole is None:
            self._whole = self._make_whole(place.device)
        weight = self._whole.weight
        weight.weight_loader(weight, tensor.to(weight.dtype), *(() if shard is None else (shard,)))
        self._arrived.add(part)
        if not self.missing():
            self._finish(weight.data)

    def _finish(self, weight: torch.Tensor) -> None:
        """Pack the whole weight, so that only one is dense at a time."""
        formats = {known.format for known in self._described.values()}
        common = formats.pop() if len(formats) == 1 and len(self._described) == len(self.parts) else PACKED
        sparse = packed_form(self.prefix, weight, self._dtype, common)
        self._result = sparse or nn.Parameter(weight.to(self._dtype), requires_grad=False)
        self._whole = None

    def _part(self, shard: str | int | None) -> str:
        """Return the name in the checkpoint of the part that vLLM calls `shard`."""
        place = 0 if shard is None else QKV.index(shard) if shard in QKV else shard
        if not isinstance(place, int) or place >= len(self.parts) or (shard is None and len(self.parts) > 1):
            raise ValueError(f"{CONTEXT}: expected one of the {len(self.parts)} parts of {self.prefix}, got {shard!r}")
        return self.parts[place]


def packed_form(prefix: str, weight: torch.Tensor, dtype: torch.dtype, format: str = PACKED) -> SparseLinear | None:
    """Return a weight `[out_features, in_features]` packed in `format`, else in the smallest one; None if dense is smaller.

    Args:
        prefix: name of the linear.
        weight: the weight, in float32 if its values may be of 4 bits, else in `dtype`.
        dtype: dtype of the linear.
        format: the format.
    """
    if prefix.endswith(READ_BY_ATTENTION):
        return None
    best = smallest(weight, format)
    if best is None or not best.endswith(Q4):
        weight = weight.to(dtype)
        best = smallest(weight, format) or smallest(weight)
    if best is None:
        return None
    return SparseLinear(best, (weight.shape[0], weight.shape[1]), format_of(best).pack(weight), dtype=dtype).eval()


def multiply(sparse: SparseLinear, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Compute `x @ weight.T + bias` with a bias that is not the layer's own, since other ranks may add theirs."""
    return sparse.layout.linear(x, sparse.tensors, sparse.shape, bias)


def is_one_of_stages() -> bool:
    """Return whether this process holds one of several pipeline stages."""
    from vllm.distributed import get_pp_group

    return bool(get_pp_group().world_size > 1)


def _dense_weight(shape: tuple[int, int], dtype: torch.dtype, attributes: dict[str, Any], device: torch.device) -> nn.Module:
    """Return a module with an empty dense weight that vLLM's loaders fill."""
    whole = nn.Module()
    weight: Any = nn.Parameter(torch.zeros(shape, dtype=dtype, device=device), requires_grad=False)
    for name, value in {"output_dim": 0, "input_dim": 1, **attributes}.items():
        setattr(weight, name, value)
    whole.weight = weight
    return whole


def _unpacked(part: str, known: PackedLayer, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    layout = format_of(known.format)
    try:
        layout.check(tensors, known.shape, known.dtype)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{part}.{error}") from error
    return layout.unpack(tensors, known.shape, torch.float32 if known.format.endswith(Q4) else known.dtype)
