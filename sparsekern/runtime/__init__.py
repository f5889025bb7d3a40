"""What becomes of a pruned model: the folder it is saved to, and 2:4 weights that multiply."""

from .card import model_card, versions
from .save import check_format, check_output_folder, check_space, save
from .semi_structured import semi_structured_linear, to_semi_structured

__all__ = [
    "check_format",
    "check_output_folder",
    "check_space",
    "model_card",
    "save",
    "semi_structured_linear",
    "to_semi_structured",
    "versions",
]
