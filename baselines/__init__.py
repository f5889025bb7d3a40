"""Algorithms that tests check against and benchmarks measure against; none of it is part of the package.

* `textbook`: the published pruning algorithms as their public programs run them.
* `plain`: single steps of the methods in plain PyTorch, without what a public program wastes.
* `sparsellm`: the public program of SparseLLM on one feed-forward network.
* `dense_gemv`: a hand-written product of one token with a dense bfloat16 weight.
* `llmcompressor_oneshot`: a script that prunes by llm-compressor, for the Python of an environment of its own.
"""
