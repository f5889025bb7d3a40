"""`sparsekern` under torchrun, whose rank 1 is killed in front of block 1."""

import os
import signal
import sys

from sparsekern.cli.main import main
from sparsekern.pruning.blockwise import loop

original = loop.BlockLoop._prune_block


def prune_block(run, index, linears):
    if index == 1 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    original(run, index, linears)


loop.BlockLoop._prune_block = prune_block
sys.exit(main())
