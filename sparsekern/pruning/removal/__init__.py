"""Removal of whole heads and neurons of an encoder, one sub-layer after another."""
