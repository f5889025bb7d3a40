"""Whole heads and neurons of an encoder: each sub-layer is decided, fitted and left behind."""
