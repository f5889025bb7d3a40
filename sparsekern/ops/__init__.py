"""Drop-in torch ops, one file each. The compiled library is loaded after the definitions, so that it can only implement them."""

from . import _library
from .feature_norm import feature_norm_
from .gram import gram_
from .gram_symmetrize import gram_symmetrize_
from .obs_sweep import obs_sweep
from .reverse_cholesky import reverse_cholesky

_library.load()

__all__ = ["feature_norm_", "gram_", "gram_symmetrize_", "obs_sweep", "reverse_cholesky"]
