"""Block-wise pruning: gather statistics of a block's inputs, solve its linears, and run it to make the next block's inputs."""
