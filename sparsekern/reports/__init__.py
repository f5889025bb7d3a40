"""Reports of runs: their classes, their page and its plots."""

from .base import BaseReport
from .continual import ContinualReport, ContinualStep
from .removal import RemovalReport, SubLayerReport
from .report import LayerReport, Report

__all__ = ["BaseReport", "ContinualReport", "ContinualStep", "LayerReport", "RemovalReport", "Report", "SubLayerReport"]
