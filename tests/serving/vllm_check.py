"""The vLLM plugin with the real vLLM and SmolLM2-135M: `make test-vllm`.

`python -m tests.serving.vllm_check prepare DIR` prunes the model and notes what transformers generates from the packed folder.
`python -m tests.serving.vllm_check serve DIR`, in an environment with vLLM, serves both folders, compares the tokens of an OpenAI-style
request, and compares the memory of the weights. Nothing is fetched from a network.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

PROMPTS = ("The capital of France is", "def fibonacci(n):", "Water boils when")
TOKENS = 24
NOTES = "expected.json"
PACKED_SHARE = 0.58  # of the dense weights: 9/16 at 2:4 in bfloat16, and the ends of rows
START = 600  # seconds for a server to answer, on a slow machine
COUNT = """
import json, sys
from vllm import LLM

def count(model):
    from sparsekern import SparseLinear
    layers = [layer for layer in model.modules() if isinstance(layer, SparseLinear)]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (*model.parameters(), *model.buffers())}
    return {
        "layers": len(layers),
        "packed": sum(t.numel() * t.element_size() for layer in layers for t in layer.tensors.values()),
        "dense": sum(layer.out_features * layer.in_features * layer.dtype.itemsize for layer in layers),
        "all": sum(storages.values()),
    }

if __name__ == "__main__":
    options = json.loads(sys.argv[2])
    print("COUNTED", json.dumps(LLM(sys.argv[1], max_model_len=128, max_num_seqs=1, enforce_eager=True, **options).apply_model(count)[0]))
"""


def prepare(folder: Path) -> None:
    """Write SmolLM2-135M with 2:4 zeros, dense and packed, and the tokens that transformers generates."""
    import torch
    from transformers import AutoModelForCausalLM

    import sparsekern

    if folder.exists():
        shutil.rmtree(folder)
    name = "builtin:smollm2-135m"
    model, words = sparsekern.load(name, dtype="bfloat16", device="cpu"), sparsekern.load_tokenizer(name)
    ids = sparsekern.data.as_calibration("builtin:python-docs", tokenizer=words, samples=16, length=256).read(model)
    sparsekern.prune(model, "sparsegpt", "2:4", ids)
    sparsekern.save(model, folder / "dense", tokenizer=words)
    sparsekern.save(model, folder / "packed", format="packed", tokenizer=words)
    packed = AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32)  # in which no two tokens are as good
    expected = []
    for prompt in PROMPTS:
        given = words(prompt, return_tensors="pt")
        with torch.no_grad():
            found = packed.generate(**given, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)
        expected.append(found[0, given["input_ids"].shape[1] :].tolist())
    (folder / NOTES).write_text(json.dumps(expected))


def serve(folder: Path) -> None:
    """Serve both folders by vLLM, and compare."""
    expected = json.loads((folder / NOTES).read_text())
    for kind, options in (("packed", []), ("dense", ["--quantization", "sparsekern"])):
        found = answers(folder / kind, options)
        same = [sum(a == b for a, b in zip(one, other, strict=True)) for one, other in zip(found, expected, strict=True)]
        print(f"{kind}: {same} of {TOKENS} greedy tokens are those of transformers' packed model")
        assert found == expected, (found, expected)
        counted = count(folder / kind, {"quantization": "sparsekern"} if kind == "dense" else {})
        whole = count(folder / "dense", {})["all"]
        print(f"{kind}: {counted['layers']} packed linears take {counted['packed'] / counted['dense']:.3f} of the dense ones,")
        print(f"  and the whole model {counted['all'] / whole:.3f}: {counted['all'] / 1e6:.1f} MB for {whole / 1e6:.1f} MB")
        assert counted["layers"] == 4 * 30 and counted["packed"] <= PACKED_SHARE * counted["dense"]


def environment() -> dict[str, str]:
    small = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    return os.environ | small | {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # for the function that counts


def answers(folder: Path, options: list[str]) -> list[list[int]]:
    """Return the tokens that `vllm serve` completes the prompts with."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("vllm")), "serve", str(folder), *options, "--port", str(port)]
    limits = [
        "--host",
        "127.0.0.1",
        "--max-model-len",
        "128",
        "--max-num-seqs",
        "4",
        "--dtype",
        "float32",
        "--served-model-name",
        "pruned",
    ]
    server = subprocess.Popen([*command, *limits, *EXTRA], env=environment(), start_new_session=True)
    try:
        wait_for(server, f"http://127.0.0.1:{port}/health")
        return [completion(port, prompt) for prompt in PROMPTS]
    finally:
        server.terminate()
        server.wait(60)


EXTRA = os.environ.get("VLLM_CHECK_OPTIONS", "").split()  # such as --enforce-eager


def wait_for(server: subprocess.Popen, address: str) -> None:
    deadline = time.monotonic() + START
    while time.monotonic() < deadline:
        assert server.poll() is None, f"vllm serve ended with {server.returncode}"
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(1)
    raise TimeoutError(f"vllm serve does not answer within {START} s")


def completion(port: int, prompt: str) -> list[int]:
    asked = {
        "model": "pruned",
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.loads(answer.read())["choices"][0]["token_ids"]


def count(folder: Path, options: dict[str, str]) -> dict[str, int]:
    """Return the packed layers of a model in vLLM, and the bytes of its weights."""
    script = folder.parent / "count.py"
    script.write_text(COUNT)
    done = subprocess.run(
        [sys.executable, str(script), str(folder), json.dumps(options)],
        env=environment() | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
        stdout=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("COUNTED")]
    return json.loads(line.removeprefix("COUNTED"))


if __name__ == "__main__":
    {"prepare": prepare, "serve": serve}[sys.argv[1]](Path(sys.argv[2]).resolve())
