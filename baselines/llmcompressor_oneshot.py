"""Prune by llm-compressor's `oneshot` and save the result: `PYTHON baselines/llmcompressor_oneshot.py MODEL IDS OUT`.

PYTHON is that of an environment with llm-compressor 0.14. MODEL is a folder, IDS a safetensors file with `ids` `[samples, length]`.
OUT receives `result.json` and the pruned weights. Only the call of `oneshot` is timed. The ids are passed as a data loader, so nothing
is tokenised, padded or shuffled. `lm_head`, which llm-compressor prunes by default, is ignored.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from importlib.metadata import version
from pathlib import Path

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("ids", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    ids = load_file(arguments.ids)["ids"]
    samples = [{"input_ids": row, "attention_mask": torch.ones_like(row)} for row in ids]
    modifier = SparseGPTModifier(
        sparsity=0.5, mask_structure="2:4", block_size=128, dampening_frac=0.01, targets=["Linear"], ignore=["re:.*lm_head"]
    )
    start = time.perf_counter()
    oneshot(
        model=model,
        dataset=DataLoader(samples, batch_size=arguments.batch_size),
        recipe=[modifier],
        num_calibration_samples=len(ids),
        max_seq_length=ids.shape[1],
        shuffle_calibration_samples=False,
    )
    seconds = time.perf_counter() - start
    result = {
        "seconds": seconds,
        "batch_size": arguments.batch_size,
        "threads": torch.get_num_threads(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "versions": {name: version(name) for name in ("llmcompressor", "torch", "transformers")},
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "result.json").write_text(json.dumps(result, indent=1))
    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, arguments.out / "weights.safetensors")


if __name__ == "__main__":
    main()
