"""Gradual pruning: the whole model in steps, with training after each."""
