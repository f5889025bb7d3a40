"""The block-by-block pipeline: calibration batches in, a pruned model and a report out."""

from .continual import prune_continually
from .continual_report import ContinualReport, Step
from .pipeline import prune
from .preparation import check_seed
from .report import LayerReport, Report
from .units_report import StructuredReport, UnitsReport

__all__ = [
    "ContinualReport",
    "LayerReport",
    "Report",
    "Step",
    "StructuredReport",
    "UnitsReport",
    "check_seed",
    "prune",
    "prune_continually",
]
