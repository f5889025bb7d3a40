"""Run one `sparsekern.prune` as a rank of `torchrun`: `torchrun ... -m bench.ranks_worker MODEL IDS RESULT METHOD`.

IDS is a safetensors file with `ids` `[samples, length]`. The first rank writes RESULT: the seconds of the call, a digest of the weights
and what each rank did.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed

import sparsekern


def main(name: str, ids_file: str, result: str, method: str) -> None:
    torch.set_num_threads(1)
    if int(os.environ["WORLD_SIZE"]) > 1:
        distributed.init_process_group("gloo")
    model = sparsekern.load(name, dtype="float32", device="cpu")
    ids = load_file(ids_file)["ids"]
    if distributed.is_initialized():
        distributed.barrier()
    start = time.perf_counter()
    report = sparsekern.prune(model, method, "2:4", ids, progress=False, leaves=8)
    seconds = time.perf_counter() - start
    if os.environ["RANK"] == "0":
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().tobytes())
        ranks = {key: value for key, value in report.measured.items() if key.startswith("rank ")}
        found = {"seconds": seconds, "phases": report.seconds, "digest": digest.hexdigest(), "ranks": ranks}
        Path(result).write_text(json.dumps(found))
    if distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
