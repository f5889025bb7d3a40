"""sparsekern: prune pretrained transformers fast, and make the zeros pay."""

__version__ = "0.1.0"
