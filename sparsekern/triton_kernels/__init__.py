"""Triton kernels, one file per op. They are imported only to be run: `import sparsekern` does not need Triton."""
