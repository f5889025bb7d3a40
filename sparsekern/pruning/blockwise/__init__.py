"""One block at a time: gather statistics of its inputs, solve its linears, go on with what it makes."""
