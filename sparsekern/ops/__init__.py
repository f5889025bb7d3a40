"""Drop-in torch ops, one file per op. The compiled library is loaded after the definitions, so that it can only implement them."""

from ..backends import libraries, serve_environment
from ._registry import OPS
from .admm_step import admm_step_
from .bitmask_experts_linear import bitmask_experts_linear
from .bitmask_linear import bitmask_linear
from .bitmask_pack import bitmask_pack
from .bitmask_unpack import bitmask_unpack
from .cross_gram import cross_gram_
from .cusparselt_linear import cusparselt_linear
from .feature_norm import feature_norm_
from .gated_split import gated_split
from .gram import gram_
from .gram_inverse import gram_inverse
from .gram_solve import gram_solve
from .gram_symmetrize import gram_symmetrize_
from .head_neuron_scores import head_neuron_scores
from .int8_linear import int8_linear
from .linear_kl import linear_kl
from .masked_adamw import masked_adamw_
from .masked_lstsq import masked_lstsq
from .nm_experts_linear import nm_experts_linear
from .nm_linear import nm_linear
from .nm_mask import nm_mask
from .nm_pack import nm_pack
from .nm_q4_linear import nm_q4_linear
from .nm_q4_pack import nm_q4_pack
from .nm_q4_unpack import nm_q4_unpack
from .nm_unpack import nm_unpack
from .obs_quantize import obs_quantize
from .obs_sweep import obs_sweep
from .plain_split import plain_split
from .q4_scales import q4_scales
from .quantize_descent import quantize_descent_
from .reverse_cholesky import reverse_cholesky
from .semi_structured_pack import semi_structured_pack
from .semi_structured_prune_pack import semi_structured_prune_pack
from .semi_structured_unpack import semi_structured_unpack
from .sensitivity import sensitivity_
from .topk_mask import topk_mask

libraries.load()
serve_environment()

__all__ = [
    "OPS",
    "admm_step_",
    "bitmask_experts_linear",
    "bitmask_linear",
    "bitmask_pack",
    "bitmask_unpack",
    "cross_gram_",
    "cusparselt_linear",
    "feature_norm_",
    "gated_split",
    "gram_",
    "gram_inverse",
    "gram_solve",
    "gram_symmetrize_",
    "head_neuron_scores",
    "int8_linear",
    "linear_kl",
    "masked_adamw_",
    "masked_lstsq",
    "nm_experts_linear",
    "nm_linear",
    "nm_mask",
    "nm_pack",
    "nm_q4_linear",
    "nm_q4_pack",
    "nm_q4_unpack",
    "nm_unpack",
    "obs_quantize",
    "obs_sweep",
    "plain_split",
    "q4_scales",
    "quantize_descent_",
    "reverse_cholesky",
    "semi_structured_pack",
    "semi_structured_prune_pack",
    "semi_structured_unpack",
    "sensitivity_",
    "topk_mask",
]
