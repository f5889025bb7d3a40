"""The block-by-block pipeline: calibration batches in, a pruned model and a report out."""

from .pipeline import prune
from .report import LayerReport, Report

__all__ = ["LayerReport", "Report", "prune"]
