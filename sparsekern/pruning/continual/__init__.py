"""Continual pruning: one dataset after another. Statistics add up, and no data are kept."""
