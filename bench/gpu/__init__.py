"""Everything that is checked and measured on one GPU, in one command: `python -m bench.gpu`, which is what `make gpu` runs."""
