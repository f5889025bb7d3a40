"""The benchmarks of 2:4 linears at run time."""
