"""Reports of runs: their classes, their page and its plots."""

from .base import BaseReport
from .continual import ContinualReport, ContinualStep
from .mixtures import ExpertReport, MixtureReport
from .removal import RemovalReport, SubLayerReport
from .report import LayerReport, Report

__all__ = [
    "BaseReport",
    "ContinualReport",
    "ContinualStep",
    "ExpertReport",
    "LayerReport",
    "MixtureReport",
    "RemovalReport",
    "Report",
    "SubLayerReport",
]
