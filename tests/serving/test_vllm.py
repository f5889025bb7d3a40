"""The vLLM plugin on vLLM's interfaces: fused parts, slices of ranks, and everything that is refused."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from sparsekern import SparseLinear
from sparsekern.runtime.formats import format_of
from sparsekern.runtime.hf_config import METHOD, PackedLayer
from sparsekern.serving.served import VARIABLE
from sparsekern.serving.vllm import register
from tests.serving import interfaces
from tests.serving.interfaces import Columns, Mapper, Rows

ROOT = Path(__file__).resolve().parents[2]
IN = 64
PARTS = {"q_proj": (32, "2:4"), "k_proj": (16, "2:4"), "v_proj": (16, "bitmask")}
MAPPING = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


@pytest.fixture
def plugin(monkeypatch):
    """The config class that the plugin registers."""
    registered = interfaces.install(monkeypatch)
    register()
    register()
    yield registered[METHOD]
    sys.modules.pop("sparsekern.serving.vllm_linear", None)


def pruned(rows: int, columns: int, format: str, dtype: torch.dtype = torch.float32) -> torch.nn.Linear:
    """A linear whose weight fits a format and no smaller one."""
    linear = torch.nn.Linear(columns, rows, bias=False, dtype=dtype)
    with torch.no_grad():
        if format == "2:4":
            linear.weight.view(rows, -1, 4)[..., ::2] = 0
        elif format == "2:4-q4":
            codes = torch.randint(-8, 8, (rows, columns)).view(rows, -1, 4)
            codes[..., 0] = 7  # so that the scales are found again
            codes[..., [1, 3]] = 0
            linear.weight.copy_(codes.view(rows, columns) * torch.rand(rows, 1).half().float())
        elif format == "bitmask":
            linear.weight[torch.rand(rows, columns) < 0.6] = 0
    return linear


class Checkpoint:
    """Linears of a checkpoint by name, packed unless their format is dense."""

    def __init__(self, formats: dict[str, tuple[int, str]], columns: int = IN, dtype: torch.dtype = torch.float32) -> None:
        self.weights, self.tensors, self.entries = {}, {}, {}
        for name, (rows, format) in formats.items():
            linear = pruned(rows, columns, format, dtype)
            self.weights[name] = linear.weight.detach()
            if format == "dense":
                self.tensors[f"{name}.weight"] = linear.weight.detach()
            else:
                layer = SparseLinear.from_linear(linear, format)
                self.entries[name] = PackedLayer.of(layer).to_dict()
                self.tensors |= {f"{name}.{part}": tensor for part, tensor in layer.tensors.items()}

    def config(self, plugin, **entries):
        config = plugin.from_config({"quant_method": METHOD, "version": 1, "layers": self.entries, **entries})
        config.packed_modules_mapping = MAPPING
        return config

    def load_into(self, layer, shards: dict[str, object], leave_out: str = "") -> None:
        for name, tensor in self.tensors.items():
            own, _, part = name.rpartition(".")
            if own in shards and name != leave_out:
                place = getattr(layer, part)
                place.weight_loader(place, tensor, *([] if shards[own] is None else [shards[own]]))


def attention(plugin, checkpoint: Checkpoint, rank: int = 0, ranks: int = 1, dtype: torch.dtype = torch.float32, **options):
    """A fused q/k/v of one rank, loaded and ready."""
    config = checkpoint.config(plugin)
    sizes = [checkpoint.weights[f"a.{part}"].shape[0] for part in MAPPING["qkv_proj"]]
    layer = Columns(config, "a.qkv_proj", IN, sizes, rank, ranks, dtype, shards=("q", "k", "v"))
    checkpoint.load_into(layer, {"a.q_proj": "q", "a.k_proj": "k", "a.v_proj": "v"}, **options)
    return layer


def rows_of(weight: torch.Tensor, rank: int, ranks: int) -> torch.Tensor:
    return weight.chunk(ranks)[rank]


@pytest.mark.parametrize(
    "formats", ["2:4 2:4 2:4", "2:4 2:4 bitmask", "bitmask 2:4 dense", "dense bitmask dense", "2:4-q4 2:4-q4 2:4-q4"]
)
@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (0, 2), (1, 2)])
def test_fused_parts_are_those_of_the_checkpoint(plugin, formats, rank, ranks):
    kinds = dict(zip(MAPPING["qkv_proj"], formats.split(), strict=True))
    checkpoint = Checkpoint({f"a.{part}": (rows, kinds[part]) for part, (rows, _) in PARTS.items()})
    layer = attention(plugin, checkpoint, rank, ranks)
    layer.quant_method.process_weights_after_loading(layer)
    expected = torch.cat([rows_of(weight, rank, ranks) for weight in checkpoint.weights.values()])
    assert torch.equal(layer.sparse.dense_weight(), expected)
    assert layer.state_dict().keys() == {f"sparse.{name}" for name in layer.sparse.tensors}
    assert ("q4" in layer.sparse.format) == ("q4" in formats)
    x, bias = torch.randn(3, IN), torch.randn(len(expected))
    if "q4" in formats:  # its products round their input to 8 bits
        assert torch.equal(layer(x, bias), format_of("2:4-q4").linear(x, layer.sparse.tensors, expected.shape, bias))
        return
    torch.testing.assert_close(layer(x, bias), F.linear(x.double(), expected.double(), bias.double()).float())


def test_parts_of_one_format_keep_it(plugin):
    checkpoint = Checkpoint({f"a.{part}": (rows, "bitmask") for part, (rows, _) in PARTS.items()})
    for name, weight in checkpoint.weights.items():  # they would fit 2:4, too
        weight.view(len(weight), -1, 4)[..., ::2] = 0
        linear = torch.nn.Linear(IN, len(weight), bias=False)
        linear.weight = torch.nn.Parameter(weight)
        layer = SparseLinear.from_linear(linear, "bitmask")
        checkpoint.entries[name] = PackedLayer.of(layer).to_dict()
        checkpoint.tensors |= {f"{name}.{part}": tensor for part, tensor in layer.tensors.items()}
    layer = attention(plugin, checkpoint)
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.sparse.format == "bitmask"


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (3, 4)])
@pytest.mark.parametrize("format", ["2:4", "bitmask"])
def test_a_rank_takes_its_columns(plugin, format, rank, ranks):
    checkpoint = Checkpoint({"m.down_proj": (16, format)}, columns=72)
    layer = Rows(checkpoint.config(plugin), "m.down_proj", 72, [16], rank, ranks)
    checkpoint.load_into(layer, {"m.down_proj": None})
    layer.quant_method.process_weights_after_loading(layer)
    assert torch.equal(layer.sparse.dense_weight(), checkpoint.weights["m.down_proj"].chunk(ranks, dim=1)[rank])


def test_the_dtype_is_that_of_the_server(plugin):
    checkpoint = Checkpoint({"m.down_proj": (16, "2:4")})
    layer = Rows(checkpoint.config(plugin), "m.down_proj", IN, [16], dtype=torch.bfloat16)
    checkpoint.load_into(layer, {"m.down_proj": None})
    layer.quant_method.process_weights_after_loading(layer)
    assert layer.sparse.dtype == torch.bfloat16
    assert torch.equal(layer.sparse.dense_weight(), checkpoint.weights["m.down_proj"].bfloat16())


def test_only_one_linear_is_dense_at_a_time(plugin):
    checkpoint = Checkpoint({f"a.{part}": rows for part, rows in PARTS.items()})
    layer = attention(plugin, checkpoint)
    held = sum(tensor.numel() for tensor in layer.parameters())
    assert held == 0 and layer.quant_method._whole is None


def test_names_of_the_server(plugin):
    checkpoint = Checkpoint({"model.m.down_proj": (16, "2:4")})
    config = checkpoint.config(plugin)
    config.apply_vllm_mapper(Mapper({"model.": "language_model.model."}))
    layer = Rows(config, "language_model.model.m.down_proj", IN, [16])
    checkpoint.load_into(layer, {"model.m.down_proj": None})
    layer.quant_method.process_weights_after_loading(layer)
    assert isinstance(layer.sparse, SparseLinear)


@pytest.mark.parametrize("lost", ["a.k_proj.values", "a.v_proj.order"])
def test_a_part_that_did_not_arrive_is_named(plugin, lost):
    checkpoint = Checkpoint({f"a.{part}": rows for part, rows in PARTS.items()})
    layer = attention(plugin, checkpoint, leave_out=lost)
    with pytest.raises(
        ValueError, match=f"quantization: 1 layers of the checkpoint did not arrive, {lost.rpartition('.')[0]} among"
    ):
        layer.quant_method.process_weights_after_loading(layer)


@pytest.mark.parametrize("stages", [1, 2])
def test_a_layer_that_the_server_does_not_have_is_named(plugin, monkeypatch, stages):
    monkeypatch.setattr(sys.modules["vllm.distributed"].get_pp_group, "world_size", stages)
    checkpoint = Checkpoint({"m.down_proj": (16, "2:4"), "m.other_proj": (16, "2:4")})
    layer = Rows(checkpoint.config(plugin), "m.down_proj", IN, [16])
    checkpoint.load_into(layer, {"m.down_proj": None})
    if stages == 1:
        with pytest.raises(ValueError, match=r"1 layers of the checkpoint did not arrive, m\.other_proj among them"):
            layer.quant_method.process_weights_after_loading(layer)
    else:  # it is of another stage
        layer.quant_method.process_weights_after_loading(layer)


def test_a_damaged_tensor_is_named(plugin):
    checkpoint = Checkpoint({"m.down_proj": (16, "bitmask")})
    checkpoint.tensors["m.down_proj.order"] = torch.zeros(16, dtype=torch.int32)
    layer = Rows(checkpoint.config(plugin), "m.down_proj", IN, [16])
    with pytest.raises(ValueError, match=r"m\.down_proj\.order: expected each row from 0 to 15 once"):
        checkpoint.load_into(layer, {"m.down_proj": None})


@pytest.mark.parametrize("shard", ["x", 3, None, (0, 1)])
def test_an_unknown_part_is_refused(plugin, shard):
    checkpoint = Checkpoint({f"a.{part}": rows for part, rows in PARTS.items()})
    layer = Columns(checkpoint.config(plugin), "a.qkv_proj", IN, [32, 16, 16], shards=("q", "k", "v"))
    with pytest.raises(ValueError, match=r"quantization: expected one of the 3 parts of a\.qkv_proj, got"):
        layer.codes.weight_loader(layer.codes, torch.zeros(1), shard)


def dense_layers(plugin, *formats: str):
    """Linears of a dense checkpoint, loaded."""
    config = plugin()
    layers = []
    for number, format in enumerate(formats):
        layer = Rows(config, f"m.{number}.down_proj", IN, [16])
        layer.weight.weight_loader(layer.weight, pruned(16, IN, format).weight.detach())
        layers.append(layer)
    return layers


def test_zeros_of_a_dense_checkpoint_are_packed(plugin):
    layers = dense_layers(plugin, "2:4", "dense", "bitmask")
    expected = [layer.weight.detach().clone() for layer in layers]
    x = torch.randn(2, IN)
    for layer, weight, format in zip(layers, expected, ("2:4", None, "bitmask"), strict=True):
        layer.quant_method.process_weights_after_loading(layer)
        assert (layer.sparse.format if layer.sparse is not None else None) == format
        assert hasattr(layer, "weight") == (format is None) == hasattr(layer, "prepared")
        torch.testing.assert_close(layer(x), F.linear(x.double(), weight.double()).float())


def test_the_cache_of_compiled_models_goes_by_the_formats(plugin):
    for layer in dense_layers(plugin, "2:4", "dense"):
        layer.quant_method.process_weights_after_loading(layer)
    noted = sys.modules["vllm.config"].get_current_vllm_config().additional_config
    assert noted == {METHOD: {"m.0.down_proj": "2:4", "m.1.down_proj": None}}


def test_a_model_without_zeros_is_refused(plugin):
    first, last = dense_layers(plugin, "dense", "dense")
    first.quant_method.process_weights_after_loading(first)
    with pytest.raises(ValueError, match="expected a model with zeros, got one in which none of 2 linears gets smaller packed"):
        last.quant_method.process_weights_after_loading(last)


def test_a_weight_that_attention_reads_stays_dense(plugin):
    config = plugin()
    layer, other = Rows(config, "a.kv_b_proj", IN, [16]), Rows(config, "a.o_proj", IN, [16])
    for each in (layer, other):
        each.weight.weight_loader(each.weight, pruned(16, IN, "2:4").weight.detach())
        each.quant_method.process_weights_after_loading(each)
    assert layer.weight is not None and layer.sparse is None and other.sparse.format == "2:4"


def test_other_layers_are_left_to_the_server(plugin):
    checkpoint = Checkpoint({"lm_head": (16, "2:4"), "embed": (16, "2:4")})
    config = checkpoint.config(plugin)
    assert config.get_quant_method(torch.nn.Module(), "experts") is None
    assert config.get_quant_method(interfaces.ParallelLMHead(), "lm_head").parts == ["lm_head"]
    with pytest.raises(ValueError, match="quantization: expected a linear or a head, got embed, a packed Embedding"):
        config.get_quant_method(torch.nn.Embedding(2, 2), "embed")


def test_what_the_config_refuses(plugin):
    checkpoint = Checkpoint({"m.down_proj": (16, "2:4")})
    with pytest.raises(ValueError, match=r"quantization_config\.version: this sparsekern reads 1 to \d+, got 99"):
        checkpoint.config(plugin, version=99)
    experts = {"format": "2:4", "shape": [2, 16, 64], "dtype": "float32"}
    with pytest.raises(ValueError, match="expected packed linears, got packed experts .m.packed_down_proj."):
        checkpoint.config(plugin, layers={"m.packed_down_proj": experts})

    class Cut:
        sparsekern_units = {"heads": [[0]], "neurons": [[0]]}

    with pytest.raises(ValueError, match="expected a model whose layers have equal sizes, got 'cut', whose heads"):
        plugin().maybe_update_config("cut", Cut())
    plugin().maybe_update_config("whole", object())


def test_a_dense_model_may_name_the_method_itself(plugin):
    assert plugin.from_config({"quant_method": METHOD}).layers == {}
    assert plugin.get_name() == METHOD and plugin.get_config_filenames() == [] and plugin.get_min_capability() == 80
    assert torch.bfloat16 in plugin.get_supported_act_dtypes()


@pytest.mark.parametrize("version", ["0.31.2", "0.33.0", "1.32", "dev"])
def test_other_versions_are_refused_once_a_model_asks(monkeypatch, version):
    registered = interfaces.install(monkeypatch, version=version)
    register()  # vLLM itself must start
    with pytest.raises(
        ValueError, match=f"vllm: expected version 0.32, with which sparsekern was tested, got {version}; {VARIABLE}=1"
    ):
        registered[METHOD]()
    monkeypatch.setenv(VARIABLE, "1")
    registered[METHOD]()
    monkeypatch.setenv(VARIABLE, "yes")
    with pytest.raises(ValueError, match=f"{VARIABLE}: expected 0 or 1, got 'yes'"):
        registered[METHOD]()
    sys.modules.pop("sparsekern.serving.vllm_linear", None)


def test_the_entry_point_is_the_function():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    group = '[project.entry-points."vllm.general_plugins"]'
    assert f'{group}\nsparsekern = "{register.__module__}:{register.__name__}"\n' in project
