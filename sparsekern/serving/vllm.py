"""Entry point of the vLLM plugin, which serves packed models and packs dense ones with zeros.

vLLM calls `register` in each of its processes, whatever model it serves. So nothing is refused before a model asks for sparsekern.
"""

from __future__ import annotations

from ..runtime.hf_config import METHOD


def register() -> None:
    """Register the quantization method `"sparsekern"` with vLLM. More calls change nothing.

    Example:
        >>> from sparsekern.serving.vllm import register  # what vLLM calls by the entry point `vllm.general_plugins`
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .vllm_linear import PackedConfig

    register_quantization_config(METHOD)(PackedConfig)
