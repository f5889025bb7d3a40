"""The memory that streamed runs take, which the system limits: what is counted suffices, and a model in memory dies."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

import sparsekern
from tests.pruning.memory_bound import BATCH, LENGTH, SAMPLES

WATCHDOG = 600  # seconds: Python waits for ever for a thread that finds no memory to begin
ROOT = Path(sparsekern.__file__).parents[1]
BLOCKS, HIDDEN, INNER = 24, 256, 512
NOT_COUNTED = 10_000_000  # what Python, transformers and threads take beside tensors: twice what is needed


def saved(path, blocks):
    sizes = {"hidden_size": HIDDEN, "intermediate_size": INNER, "num_hidden_layers": blocks, "num_attention_heads": 4}
    torch.manual_seed(0)
    tf.LlamaForCausalLM(tf.LlamaConfig(vocab_size=96, max_position_embeddings=LENGTH, **sizes)).save_pretrained(path)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits the data of a process, mappings included")
def test_runs_keep_to_what_is_counted_where_ten_of_24_blocks_do_not_fit(tmp_path):
    model, small = saved(tmp_path / "model", BLOCKS), saved(tmp_path / "small", 4)
    block = 4 * (4 * HIDDEN**2 + 3 * HIDDEN * INNER + 2 * HIDDEN)
    hidden_states = 4 * SAMPLES * LENGTH * HIDDEN
    norms = 4 * (3 * HIDDEN + INNER)  # of the inputs of a block's linears
    batch = 4 * BATCH * LENGTH * (4 * 2 * HIDDEN + 3 * (HIDDEN + INNER))  # what linears take and return
    bound = 2 * block + hidden_states + norms + batch
    assert bound + NOT_COUNTED < (BLOCKS - 10) * block < (model / "model.safetensors").stat().st_size
    arguments = [str(value) for value in (model, small, tmp_path / "out", bound, NOT_COUNTED)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pruning.memory_bound", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=WATCHDOG)
    assert not done.returncode, done.stderr[-3000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert "memory" in told["died"], "a model in memory lives under the limit, so the limit shows nothing"
    assert told["counted"] < (BLOCKS - 10) * block
