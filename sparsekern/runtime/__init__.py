"""Packed models: `pack`, `save`, and products with packed and 2:4 weights."""

from .card import model_card, versions
from .compression import compress, drop_compressed
from .output import check_output_folder
from .packing import count_zeros, is_packed, pack, unpack, weight_bytes
from .registration import register_with_transformers
from .save import check_format, check_space, save
from .semi_structured import semi_structured_linear, to_semi_structured
from .sparse_linear import SparseLinear

register_with_transformers()

__all__ = [
    "SparseLinear",
    "check_format",
    "check_output_folder",
    "check_space",
    "compress",
    "count_zeros",
    "drop_compressed",
    "is_packed",
    "model_card",
    "pack",
    "save",
    "semi_structured_linear",
    "to_semi_structured",
    "unpack",
    "versions",
    "weight_bytes",
]
