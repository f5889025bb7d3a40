"""The block-by-block pipeline: calibration batches in, a pruned model and a report out."""

from .pipeline import check_seed, prune
from .report import LayerReport, Report

__all__ = ["LayerReport", "Report", "check_seed", "prune"]
