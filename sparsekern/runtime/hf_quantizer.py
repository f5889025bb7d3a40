"""transformers' side of packed models: how `from_pretrained` makes one and `save_pretrained` writes it.

Imported once transformers is, by `registration` and by what handles a model of transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..models.linears import is_conv1d, is_plain_linear
from ..models.units import check_units, cut_to_size, is_sized, recorded_units
from .hf_config import METHOD, VERSION, PackedLayer, check_headers, describe, names_of, parse_layers
from .sparse_linear import DTYPES, SparseLinear

if TYPE_CHECKING:  # it is this module's importer that is about to define it
    from transformers import PreTrainedModel


class SparsekernConfig(QuantizationConfigMixin):
    """`quantization_config` in `config.json`: the packed layers by name."""

    def __init__(self, layers: dict | None = None, version: int = VERSION, quant_method: str = METHOD, **unknown) -> None:
        if type(version) is not int or version != VERSION:
            raise ValueError(f"config.json: quantization_config.version: this sparsekern reads {VERSION}, got {version!r}")
        if unknown:
            raise ValueError(f"config.json: quantization_config: unknown entry {sorted(unknown)[0]!r}")
        parse_layers(layers)
        self.quant_method, self.version, self.layers = METHOD, version, layers


class SparsekernQuantizer(HfQuantizer):
    """Loader of packed and of cut models.

    It cuts a model to the sizes in its config, puts empty packed layers on the meta device, lets transformers load into them, and
    checks what it loaded.
    """

    unpack: ClassVar[Callable[[nn.Module], nn.Module]]  # of `packing`, which imports this module; `registration` sets it
    quantization_config: SparsekernConfig
    dtype: torch.dtype | None = None  # that the model is loaded in
    renamed: bool = False  # whether tensors may have other names in the files than in the model

    def validate_environment(self, *args, **kwargs) -> None:
        if not self.pre_quantized:
            raise ValueError("quantization_config: a model is packed by sparsekern.pack once it is loaded and pruned")

    def update_dtype(self, dtype: torch.dtype | None) -> torch.dtype | None:
        if dtype is not None and dtype not in DTYPES:
            found = str(dtype).removeprefix("torch.")
            raise ValueError(f"dtype: expected float32, bfloat16 or float16 for a packed model, got {found}; unpack it for another")
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        from transformers.conversion_mapping import get_model_conversion_mapping

        layers, files = parse_layers(self.quantization_config.layers), kwargs.get("checkpoint_files") or []
        self.renamed = not files or bool(get_model_conversion_mapping(model, add_legacy=False))
        self.files = check_headers(files, layers, prefix=model.base_model_prefix, renamed=self.renamed)
        if (units := recorded_units(model.config)) is not None and not is_sized(model):
            check_units(model.config, getattr(model.config, "name_or_path", "") or "config.json")
            cut_to_size(model, units)
        for name, layer in layers.items():
            _make_place(model, name, layer)
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs) -> PreTrainedModel:
        for name, layer in model.named_modules():
            if isinstance(layer, SparseLinear):
                del layer.weight
                if layer.device.type == "meta":
                    raise ValueError(
                        f"device_map: expected one without offloading, which packed models do not support; {name} is offloaded"
                    )
                self._check_loaded(name, layer)
                self._check(model, name, layer)
                layer.freeze()
                if self.dtype is not None:
                    layer.to(self.dtype)
        if not self.quantization_config.layers:  # a model that was only cut to size is an ordinary one
            self.remove_quantization_config(model)
        return model

    def _check_loaded(self, name: str, layer: SparseLinear) -> None:
        """Raise `ValueError` if a tensor is not from a file, but memory that transformers allocated for it.

        Where tensors may be renamed on the way in, headers do not tell which are missing.
        """
        missing = [part for part, tensor in layer.tensors.items() if not getattr(tensor, "_is_hf_initialized", False)]
        if self.renamed and missing:
            files = ", ".join(sorted(set(self.files.values()))) or "state_dict"
            raise ValueError(f"{files}: {name}.{missing[0]}: is missing")

    def _check(self, model: PreTrainedModel, name: str, layer: SparseLinear) -> None:
        try:
            layer.check()
        except (TypeError, ValueError) as error:
            file = self.files.get(f"{name}.{str(error).partition(':')[0]}") or next(iter(self.files.values()), "state_dict")
            raise ValueError(f"{file}: {name}.{error}") from error

    def get_state_dict_and_metadata(self, model: PreTrainedModel, *args) -> tuple[None, dict]:
        """Of `save_pretrained`: the state dict as it is, beside a description of the layers as they are by now."""
        self.quantization_config.layers = describe(model)
        model.config.quantization_config = self.quantization_config
        return None, {}

    def _dequantize(self, model: PreTrainedModel, dtype: str | torch.dtype | None = None) -> PreTrainedModel:
        return self.unpack(model).to(dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype)

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        return True


def mark(model: PreTrainedModel) -> None:
    """Let transformers know that a model is packed."""
    model.hf_quantizer = SparsekernQuantizer(SparsekernConfig(describe(model)))
    model.config.quantization_config = model.hf_quantizer.quantization_config
    model.is_quantized, model.quantization_method = True, METHOD


def unmark(model: PreTrainedModel) -> None:
    if isinstance(getattr(model, "hf_quantizer", None), SparsekernQuantizer):
        model.hf_quantizer.remove_quantization_config(model)


def check_unmarked(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that something else has quantised."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None and not isinstance(quantizer, SparsekernQuantizer):
        method = quantizer.quantization_config.quant_method
        raise ValueError(f"model: expected one in floating point, got one quantised by {getattr(method, 'value', method)}")


def _make_place(model: PreTrainedModel, name: str, layer: PackedLayer) -> None:
    where = f"config.json: quantization_config.layers[{name!r}]"
    found = _submodule(model, name)
    if found is None:
        if type(model).__name__ in (model.config.architectures or ()):
            raise ValueError(f"{where}: {type(model).__name__} has no such layer")
        return  # another class of the family, which does without this layer
    parent, child, linear = found
    conv1d = is_conv1d(linear)
    if not is_plain_linear(linear):
        raise ValueError(f"{where}: expected the name of a linear layer, got that of a {type(linear).__name__}")
    if f"{name}.weight" in model.all_tied_weights_keys:
        raise ValueError(f"{where}: its weight is tied to {model.all_tied_weights_keys[f'{name}.weight']}, so it cannot be packed")
    shape = tuple(linear.weight.shape)
    if layer.shape != (shape[::-1] if conv1d else shape):
        expected = list(shape[::-1] if conv1d else shape)
        raise ValueError(f"{where}.shape: expected that of the model's layer, {expected}, got {list(layer.shape)}")
    parent._modules[child] = layer.empty(linear.bias, conv1d=conv1d)
    # Some models (GPT-2) initialise their children's weights by name, unless those say that they are.
    parent._modules[child].weight = torch.empty(layer.shape, device="meta")
    parent._modules[child].weight._is_hf_initialized = True


def _submodule(model: PreTrainedModel, name: str) -> tuple[nn.Module, str, nn.Module] | None:
    """The layer of that name, whether the model is the whole one that was saved, or its base, or the other way round."""
    for candidate in names_of(name, model.base_model_prefix):
        parent_name, _, child = candidate.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
        except AttributeError:
            continue
        if (module := parent._modules.get(child)) is not None:
            return parent, child, module
    return None
