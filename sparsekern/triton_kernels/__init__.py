"""Triton kernels, one file per op. They are imported only to be run: `import sparsekern` does not need Triton.

Times and rates in these files are computed from bytes, FLOPs and machine code, as csrc/README.md says: none was measured.
"""
