"""Everything that is checked and measured on one GPU, in one command: `python -m bench.gpu`, which is what `make gpu` runs."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    raise SystemExit("bench.gpu: this Python has no torch; run with one whose torch has CUDA (make gpu PYTHON=...)")
