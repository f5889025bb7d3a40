"""The quantizer that lets transformers load and save packed models.

`registration` and the functions that handle a transformers model import this module, after transformers itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, cast

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.linears import is_conv1d, is_plain_linear, is_unread
from ..models.streaming import stream_of
from ..models.units import check_units, cut_to_size, is_sized, recorded_units
from .formats import INT8
from .hf_config import METHOD, PackedLayer, check_entries, check_headers, describe, names_of, parse_layers, version_of
from .int8_head import tie
from .packable import Packable, PackableExperts, find_packables
from .packed_weight import DTYPES, PackedWeight
from .sparse_experts import PREFIX, SparseExperts, pack_experts

if TYPE_CHECKING:  # transformers imports this module before it defines the class
    from transformers import PreTrainedModel


class SparsekernConfig(QuantizationConfigMixin):
    """The `quantization_config` of a packed model in `config.json`.

    Attributes:
        layers: entry of each packed layer by name.
        version: version of the layouts.
        quant_method: `"sparsekern"`.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, object]] | None = None,
        version: int = 1,
        quant_method: str = METHOD,
        **unknown: object,
    ) -> None:
        check_entries(version, unknown)
        parse_layers(layers)
        self.version, self.layers = version_of(layers), layers
        self.quant_method = METHOD  # type: ignore[assignment]  # transformers' enum lists only its own methods


class SparsekernQuantizer(HfQuantizer):
    """A loader of packed and of cut models.

    It cuts a model to the sizes in its config, puts empty packed layers on the meta device, lets transformers load into them, and
    checks the loaded tensors.

    Attributes:
        unpack: `sparsekern.unpack`.
        quantization_config: the config of the packed model.
        dtype: dtype that the model is loaded in, None for its own.
        renamed: whether tensors may have other names in the files than in the model.
        files: file name of each packed tensor.
    """

    unpack: ClassVar[Callable[[nn.Module], nn.Module]]  # set by `registration`, since `packing` imports this module
    quantization_config: SparsekernConfig
    dtype: torch.dtype | None = None
    renamed: bool = False
    files: dict[str, str]

    def validate_environment(self, *args: object, **kwargs: object) -> None:
        """Raise `ValueError` unless the model is packed already."""
        if not self.pre_quantized:
            raise ValueError(
                "quantization_config: expected that of a packed folder; to pack a model, load and prune it, then call sparsekern.pack"
            )

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:  # type: ignore[override]  # transformers passes None on
        """Return `dtype`; raise `ValueError` unless it can be packed."""
        if dtype is not None and dtype not in DTYPES:
            found = str(dtype).removeprefix("torch.")
            raise ValueError(
                f"dtype: expected float32, bfloat16 or float16 for a packed model, got {found}; unpack the model for other dtypes"
            )
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        from transformers.conversion_mapping import get_model_conversion_mapping

        layers, files = parse_layers(self.quantization_config.layers), kwargs.get("checkpoint_files") or []
        self.renamed = not files or bool(get_model_conversion_mapping(model, add_legacy=False))
        self.files = check_headers(files, layers, prefix=model.base_model_prefix, renamed=self.renamed)
        if (units := recorded_units(model.config)) is not None and not is_sized(model):
            check_units(model.config, getattr(model.config, "name_or_path", "") or "config.json")
            cut_to_size(model, units)
        known = find_packables(model)
        for name, layer in layers.items():
            if len(layer.shape) == 2:
                _make_place(model, name, layer)
            else:
                _make_place_of_experts(model, name, layer, known)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        for name, layer in model.named_modules():
            if isinstance(layer, PackedWeight):
                if any(map(is_unread, layer.tensors.values())):
                    self._check_dtype_of_unread(name, layer)
                    continue  # it is checked when its block is read
                if layer.device.type == "meta":
                    raise ValueError(
                        f"device_map: expected one without offloading, which packed models do not support, got one that offloads {name}"
                    )
                self._check_loaded(name, layer)
                self._check(name, layer)
                layer.freeze()
                if self.dtype is not None:
                    layer.to(self.dtype)
        _keep_conversions(model)
        if not self.quantization_config.layers:  # a model that was only cut to size is an ordinary model
            self.remove_quantization_config(model)
        return model

    def check_block(self, block: nn.Module, name: str) -> None:
        """Check the packed layers of a streamed model's block, which has been read.

        Raises:
            ValueError: a packed tensor is damaged.
        """
        for own, layer in block.named_modules(prefix=name):
            if isinstance(layer, PackedWeight):
                self._check(own, layer)
                layer.freeze()
                if self.dtype is not None:
                    layer.to(self.dtype)

    def _check_dtype_of_unread(self, name: str, layer: PackedWeight) -> None:
        if self.dtype is not None and self.dtype.itemsize != layer.dtype.itemsize:
            kinds = [str(dtype).removeprefix("torch.") for dtype in (layer.dtype, self.dtype)]
            raise ValueError(f"dtype: expected {kinds[0]} for a streamed model that is packed, as {name} is stored, got {kinds[1]}")

    def _check_loaded(self, name: str, layer: PackedWeight) -> None:
        """Raise `ValueError` if a tensor was not read from a file but only allocated by transformers.

        If tensors may be renamed, the headers do not reveal missing ones.
        """
        missing = [part for part, tensor in layer.tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if self.renamed and missing:
            files = ", ".join(sorted(set(self.files.values()))) or "state_dict"
            raise ValueError(f"{files}: {name}.{missing[0]}: is missing")

    def _check(self, name: str, layer: PackedWeight) -> None:
        try:
            layer.check()
        except (TypeError, ValueError) as error:
            file = self.files.get(f"{name}.{str(error).partition(':')[0]}") or next(iter(self.files.values()), "state_dict")
            raise ValueError(f"{file}: {name}.{error}") from error

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args: object) -> tuple[dict | None, dict[str, str]]:
        """Leave the state dict to `save_pretrained`, after describing the current layers in the config."""
        streamed = stream_of(model) is not None  # whose weights are not saved by transformers
        if not streamed:
            layers = describe(model)
            self.quantization_config.layers, self.quantization_config.version = layers, version_of(layers)
        model.config.quantization_config = self.quantization_config
        return ({} if streamed else None), {}

    def _dequantize(self, model: PreTrainedModel, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        dense = type(self).unpack(model).to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)
        return cast("PreTrainedModel", dense)

    def is_serializable(self, *args: object, **kwargs: object) -> bool:
        """Return True: packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether packed weights can be trained: they cannot."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether `torch.compile` takes packed models."""
        return True


def _keep_conversions(model: PreTrainedModel) -> None:
    """Keep transformers' conversions of experts that were not used since the experts are packed: an unpacked model is saved by them."""
    from transformers.conversion_mapping import get_model_conversion_mapping

    dense = [name.replace(f".{PREFIX}", ".") for name, layer in model.named_modules() if isinstance(layer, SparseExperts)]
    known: list[Any] | None = vars(model).get("_weight_conversions")
    if not dense or known is None:
        return
    for conversion in get_model_conversion_mapping(model, add_legacy=False):
        patterns = [entry.source_patterns for entry in known]
        if conversion.source_patterns in patterns or not hasattr(conversion, "operations"):
            continue
        back = conversion.reverse_transform()
        if any(back.rename_source_key(name)[1] is not None for name in dense):
            known.append(conversion)


def mark(model: PreTrainedModel, layers: dict[str, dict[str, object]] | None = None) -> None:
    """Mark a model as packed for transformers, by the description of its packed layers or of those of its files."""
    quantizer = SparsekernQuantizer(SparsekernConfig(describe(model) if layers is None else layers))
    model.config.quantization_config = quantizer.quantization_config
    marks: Any = model  # nn.Module types every attribute that is set here as a tensor or a module
    marks.hf_quantizer, marks.is_quantized, marks.quantization_method = quantizer, True, METHOD


def unmark(model: PreTrainedModel) -> None:
    """Remove the marks of `mark`, if there are any."""
    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SparsekernQuantizer):
        quantizer.remove_quantization_config(model)


def check_unmarked(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that another program has quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, SparsekernQuantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"model: expected one in floating point, got one quantised by {getattr(method, 'value', method)}")


def _make_place(model: PreTrainedModel, name: str, layer: PackedLayer) -> None:
    """Replace a linear by an empty packed layer.

    Raises:
        ValueError: the model has no such linear, or its weight is tied or has another shape.
    """
    where = f"config.json: quantization_config.layers[{name!r}]"
    found = _submodule(model, name)
    if found is None:
        if type(model).__name__ in (model.config.architectures or ()):
            raise ValueError(f"{where}: {type(model).__name__} has no such layer")
        return  # another class of the family, without this layer
    parent, child, linear = found
    if type(linear) is nn.Embedding and layer.format == INT8:
        _make_place_of_embedding(model, name, layer, (parent, child))
        return
    if not is_plain_linear(linear):
        raise ValueError(f"{where}: expected the name of a linear layer, got that of a {type(linear).__name__}")
    conv1d = is_conv1d(linear)
    model.all_tied_weights_keys.pop(f"{name}.weight", None)  # a head of its own, whatever `tie_word_embeddings` says
    if tied := [other for other, source in model.all_tied_weights_keys.items() if source == f"{name}.weight"]:
        raise ValueError(f"{where}: {tied[0]} is tied to its weight, so it cannot be packed")
    shape = tuple(linear.weight.shape)
    if layer.shape != (shape[::-1] if conv1d else shape):
        expected = list(shape[::-1] if conv1d else shape)
        raise ValueError(f"{where}.shape: expected that of the model's layer, {expected}, got {list(layer.shape)}")
    parent._modules[child] = layer.empty(linear.bias, conv1d=conv1d)


def _make_place_of_embedding(model: PreTrainedModel, name: str, layer: PackedLayer, place: tuple[nn.Module, str]) -> None:
    """Replace embeddings by empty packed ones, and the head that is tied to them by one that reads theirs.

    Raises:
        ValueError: the embeddings have another shape, or more than a linear is tied to them.
    """
    where = f"config.json: quantization_config.layers[{name!r}]"
    dense = cast("nn.Embedding", place[0]._modules[place[1]])
    if layer.shape != tuple(dense.weight.shape):
        raise ValueError(
            f"{where}.shape: expected that of the model's embeddings, {list(dense.weight.shape)}, got {list(layer.shape)}"
        )
    packed = layer.empty_embedding(dense)
    own_names = {f"{own}.weight" for own in names_of(name, model.base_model_prefix)}
    tied = [other for other, source in model.all_tied_weights_keys.items() if source in own_names]
    heads = [other.removesuffix(".weight") for other in tied]
    for head in heads:
        if type(model.get_submodule(head)) is not nn.Linear:
            raise ValueError(f"{where}: expected a linear to be tied to it, got {head}")
    place[0]._modules[place[1]] = packed
    for head in heads:
        tie(model, head, packed, [place])


def _make_place_of_experts(model: PreTrainedModel, name: str, layer: PackedLayer, known: Mapping[str, Packable]) -> None:
    """Replace a parameter of experts by an empty packed one.

    Args:
        model: the model.
        name: name of the packed weights.
        layer: their description.
        known: what the dense model has that can be packed, by name.

    Raises:
        ValueError: the model has no such parameter, or it has another shape.
    """
    where = f"config.json: quantization_config.layers[{name!r}]"
    split = (candidate.rpartition(".") for candidate in names_of(name, model.base_model_prefix))
    names = [f"{path}{dot}{child.removeprefix(PREFIX)}" for path, dot, child in split if child.startswith(PREFIX)]
    found = next((one for name in names if isinstance(one := known.get(name), PackableExperts)), None)
    if found is None:
        if type(model).__name__ in (model.config.architectures or ()):
            raise ValueError(f"{where}: {type(model).__name__} has no such experts")
        return  # another class of the family, without this layer
    shape = tuple(found.dense.shape)
    if layer.shape != shape:
        raise ValueError(f"{where}.shape: expected that of the model's experts, {list(shape)}, got {list(layer.shape)}")
    stored = found.holder.get_parameter(found.child).shape
    pack_experts(found.experts, found.holder, found.child, layer.empty_experts(stored, transposed=found.transposed))


def _submodule(model: PreTrainedModel, name: str) -> tuple[nn.Module, str, nn.Module] | None:
    """Return the parent, own name and module of a layer, or None if there is none.

    The model may be the saved one, its base, or a model with the saved one as base.
    """
    for candidate in names_of(name, model.base_model_prefix):
        parent_name, _, child = candidate.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError:
            continue
        if (module := parent._modules.get(child)) is not None:
            return parent, child, module
    return None
