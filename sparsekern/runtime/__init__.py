"""What becomes of a pruned model: the folder it is saved to."""

from .card import model_card, versions
from .save import check_format, check_output_folder, check_space, save

__all__ = ["check_format", "check_output_folder", "check_space", "model_card", "save", "versions"]
