"""The interfaces of vLLM 0.32 that the plugin uses, with loaders that place parts and slices as those of vLLM do."""

from __future__ import annotations

import sys
from types import ModuleType

import torch
from torch import nn

VERSION = "0.32.0"


class QuantizationConfig:
    def __init__(self):
        self.packed_modules_mapping: dict[str, list[str]] = {}


class LinearMethodBase:
    pass


class UnquantizedLinearMethod(LinearMethodBase):
    def create_weights(self, layer, columns, sizes, input_size, output_size, params_dtype, weight_loader):
        layer.weight = place_for(torch.zeros(sum(sizes), columns, dtype=params_dtype), weight_loader)

    def process_weights_after_loading(self, layer):
        layer.prepared = True

    def apply(self, layer, x, bias=None):
        return nn.functional.linear(x, layer.weight, bias)


def place_for(tensor: torch.Tensor, loader) -> nn.Parameter:
    parameter = nn.Parameter(tensor, requires_grad=False)
    parameter.output_dim, parameter.input_dim, parameter.weight_loader = 0, 1, loader
    return parameter


class LinearBase(nn.Module):
    """A linear of one or several parts, of which each rank holds its rows (`Columns`) or its columns (`Rows`)."""

    shards: tuple = ()

    def __init__(self, config, prefix, columns, sizes, rank=0, ranks=1, dtype=torch.float32):
        super().__init__()
        self.rank, self.ranks, self.whole = rank, ranks, list(sizes)
        self.quant_method = config.get_quant_method(self, prefix)
        held, rows = self.held(columns, list(sizes))
        method = self.quant_method
        method.create_weights(self, held, rows, columns, sum(sizes), params_dtype=dtype, weight_loader=self.weight_loader)

    def forward(self, x, bias=None):
        return self.quant_method.apply(self, x, bias)


class Columns(LinearBase):
    """`MergedColumnParallelLinear` and `QKVParallelLinear`: fused parts, each divided by rows."""

    def __init__(self, *arguments, shards=(None,), **options):
        self.__dict__["shards"] = shards
        super().__init__(*arguments, **options)

    def held(self, columns, sizes):
        return columns, [size // self.ranks for size in sizes]

    def weight_loader(self, parameter, loaded, shard=None):
        place = self.shards.index(shard)
        rows = [size // self.ranks for size in self.whole]
        target = parameter.data.narrow(parameter.output_dim, sum(rows[:place]), rows[place])
        target.copy_(loaded.narrow(parameter.output_dim, self.rank * rows[place], rows[place]))


class Rows(LinearBase):
    """`RowParallelLinear`: one part, divided by columns."""

    def held(self, columns, sizes):
        return columns // self.ranks, sizes

    def weight_loader(self, parameter, loaded):
        size = parameter.shape[parameter.input_dim]
        parameter.data.copy_(loaded.narrow(parameter.input_dim, self.rank * size, size))


class ParallelLMHead(nn.Module):
    pass


class Mapper:
    """Prefixes that a model of vLLM has in the place of those of the checkpoint."""

    def __init__(self, prefixes: dict[str, str]) -> None:
        self.prefixes = prefixes

    def apply_dict(self, values):
        def renamed(name):
            return next((new + name.removeprefix(old) for old, new in self.prefixes.items() if name.startswith(old)), name)

        return {renamed(name): value for name, value in values.items()}


def install(monkeypatch, *, version: str = VERSION, stages: int = 1) -> dict[str, type]:
    """Put the interfaces in the place of vLLM, and return what is registered, by name."""
    registered: dict[str, type] = {}

    def register_quantization_config(name):
        return lambda kind: registered.setdefault(name, kind)

    class served:
        additional_config: dict = {}

    class Group:
        world_size = stages

    layers = "vllm.model_executor.layers"
    content = {
        "vllm": {"__version__": version},
        "vllm.config": {"get_current_vllm_config": lambda: served},
        "vllm.distributed": {"get_pp_group": Group},
        "vllm.model_executor": {},
        layers: {},
        f"{layers}.linear": {
            "LinearBase": LinearBase,
            "LinearMethodBase": LinearMethodBase,
            "UnquantizedLinearMethod": UnquantizedLinearMethod,
        },
        f"{layers}.quantization": {"register_quantization_config": register_quantization_config},
        f"{layers}.quantization.base_config": {"QuantizationConfig": QuantizationConfig},
        f"{layers}.vocab_parallel_embedding": {"ParallelLMHead": ParallelLMHead},
    }
    for name, names in content.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "sparsekern.serving.vllm_linear", raising=False)
    return registered
