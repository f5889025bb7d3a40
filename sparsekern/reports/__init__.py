"""What a run tells: the reports, their page and its plots."""

from .continual import ContinualReport, Step
from .removal import StructuredReport, UnitsReport
from .report import LayerReport, Report

__all__ = ["ContinualReport", "LayerReport", "Report", "Step", "StructuredReport", "UnitsReport"]
