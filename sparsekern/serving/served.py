"""What can be served: the versions of vLLM that were tested, and the packed layers of a model."""

from __future__ import annotations

import os
from typing import Any

from ..runtime.formats import INT8
from ..runtime.hf_config import VERSION, PackedLayer, check_entries, parse_layers

TESTED = ("0.32",)  # the minor versions that the tests ran with
VARIABLE = "SPARSEKERN_VLLM_UNTESTED"
CONTEXT = "quantization"  # which both `--quantization` and config.json choose


def check_version(version: str) -> None:
    """Raise `ValueError` unless this version of vLLM is one that the plugin was tested with.

    Args:
        version: as in `vllm.__version__`. `SPARSEKERN_VLLM_UNTESTED=1` takes any.

    Raises:
        ValueError: another version, or `SPARSEKERN_VLLM_UNTESTED` is neither `0` nor `1`.
    """
    anyway = os.environ.get(VARIABLE, "0")
    if anyway not in ("0", "1"):
        raise ValueError(f"{VARIABLE}: expected 0 or 1, got {anyway!r}")
    if ".".join(version.split(".")[:2]) not in TESTED and anyway == "0":
        raise ValueError(
            f"vllm: expected version {' or '.join(TESTED)}, with which sparsekern was tested, got {version}; "
            f"{VARIABLE}=1 tries it anyway"
        )


def layers_of(entries: dict[str, Any]) -> dict[str, PackedLayer]:
    """Return the packed layers by name that `quantization_config` of a model describes; none of a dense model.

    Raises:
        ValueError: another version of the layouts, an entry that cannot be read safely, packed experts, or a head in 8 bits.
    """
    check_entries(entries.get("version", VERSION), entries.keys() - {"quant_method", "version", "layers"})
    layers = parse_layers(entries.get("layers", {}))
    for name, layer in layers.items():
        if len(layer.shape) != 2:
            raise ValueError(
                f"{CONTEXT}: expected packed linears, got packed experts ({name}), which sparsekern does not serve; "
                "save the model with format='dense'"
            )
        if layer.format == INT8:
            raise ValueError(
                f"{CONTEXT}: expected packed linears, got 8-bit values of a head ({name}), which sparsekern does not serve; "
                "pack the model without head='int8'"
            )
    return layers
