"""Packed models in servers: a plugin of vLLM."""
