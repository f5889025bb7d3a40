"""Conversion of dense models to mixtures of experts."""

from .moefy import moefy

__all__ = ["moefy"]
