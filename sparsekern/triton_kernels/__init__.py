"""Triton kernels, one file an op. Imported only when one is to run: `import sparsekern` does not need triton."""
