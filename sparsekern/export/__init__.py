"""Models in the files of other programs."""

from .gguf_file import export_gguf

__all__ = ["export_gguf"]
