"""Packed models against dense ones, through transformers' `generate`: `python -m bench.bench_packed --wikitext FOLDER`.

* `llama`: size and tokens a second of a LLaMA-shaped model of a billion random bf16 weights, half of each linear's weights zero. It has
  hidden size 2048, 16 blocks, 8 key-value heads, and a vocabulary of 32,000 tied to the head.
* `smollm2`: the same of SmolLM2-135M in bf16, pruned to 50 % by SparseGPT on windows of `valid.txt`; and perplexity on `test.txt`.

Both sides hold the same numbers, the dense one with zeros among them. Their logits are compared before anything is timed.
FOLDER holds `valid.txt` and `test.txt` of WikiText-2, which do not come with this repository.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn

import sparsekern
from sparsekern.data import calibration_ids, encode, read_documents
from sparsekern.measure.compare import Comparison, compare
from sparsekern.reports.plots import Bar, bars
from sparsekern.runtime import SparseLinear, weight_bytes
from sparsekern.runtime.packing import packed_copy

from . import results, smollm2
from .results import Row

SECTION = "packed models, bf16"
SIZE_GOAL = 0.57
PARTS = ("llama", "smollm2")


def llama(pattern: str | float) -> nn.Module:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    sparsekern.prune(model, "magnitude", pattern, progress=False)
    return model


def run_llama(tokens: int) -> list[Row]:
    dense = llama(0.5)
    packed = packed_copy(dense)
    name = f"LLaMA-shaped, {dense.num_parameters() / 1e9:.2f} B random weights, 50 %"
    rows = [size_row(name, dense, packed)]
    comparison = compare(dense, packed, prompt_length=32, tokens=tokens, rounds=3)
    return rows + speed_rows(name, comparison, goal=1.7)


def run_smollm2(wikitext: Path, tokens: int, samples: int, windows: int) -> list[Row]:
    words = smollm2.tokenizer()
    exact = smollm2.dense_model()
    ids = calibration_ids(wikitext / "valid.txt", words, samples=samples, length=smollm2.LENGTH, seed=0)
    sparsekern.prune(exact, "sparsegpt", 0.5, ids, progress=False)
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        dense = sparsekern.load(sparsekern.save(exact, Path(folder) / "pruned"), dtype="bfloat16", device="cpu")
    packed = packed_copy(dense)
    name = "SmolLM2-135M, 50 % by SparseGPT"
    comparison = compare(dense, packed, prompt_length=32, tokens=tokens, rounds=5)
    rows = [size_row(name, dense, packed), *speed_rows(name, comparison, goal=1.25)]
    rows.append(logits_row(name, exact, dense, packed, ids[:1, :128]))
    text = encode(read_documents(wikitext / "test.txt"), words)[: windows * smollm2.WINDOW]
    models = (packed, dense, exact, packed_copy(exact))
    found = [sparsekern.perplexity(model, text, length=smollm2.WINDOW) for model in models]
    same = f"{found[0]:.3g}" == f"{found[1]:.3g}"
    what = f"{name}: perplexity of {windows} x {smollm2.WINDOW} tokens of WikiText-2"
    against = f"dense with zeros {found[1]:.5g} (in float32 {found[2]:.5g}, packed {found[3]:.5g})"
    figures = dict(zip(("packed", "dense", "float32", "packed float32"), found, strict=True))
    return [*rows, Row(SECTION, what, f"{found[0]:.5g}", against, "equal to three digits", same, figures)]


@torch.no_grad()
def logits_row(name: str, exact: nn.Module, dense: nn.Module, packed: nn.Module, ids: torch.Tensor) -> Row:
    """Return how far either is from the same weights in float32; the rounding of the dense one is the measure of the packed one."""
    for weight, rounded in zip(exact.parameters(), dense.parameters(), strict=True):
        weight.copy_(rounded)
    logits = [model(input_ids=ids, use_cache=False).logits.float() for model in (exact, packed, dense)]
    errors = [float((found - logits[0]).norm() / logits[0].norm()) for found in logits[1:]]
    what = f"{name}: logits of {ids.shape[1]} tokens, distance from float32 with the same weights, relative to their norm"
    figures = dict(zip(("packed", "dense"), errors, strict=True))
    return Row(
        SECTION,
        what,
        f"{errors[0]:.2e}",
        f"dense with zeros {errors[1]:.2e}",
        "<= 1.1x dense's",
        errors[0] <= 1.1 * errors[1],
        figures,
    )


def size_row(name: str, dense: nn.Module, packed: nn.Module) -> Row:
    """Return the size of the packed linears, by their tensors, and of the whole model, by the weight files."""
    layers = {name for name, module in packed.named_modules() if isinstance(module, SparseLinear)}
    resident = [sum(weight_bytes(model.get_submodule(layer)) for layer in layers) for model in (packed, dense)]
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        files = []
        for format, model in (("packed", packed), ("dense", dense)):
            path = sparsekern.save(model, Path(folder) / format, format)
            files.append(sum(file.stat().st_size for file in path.glob("*.safetensors")))
    ratio, whole = resident[0] / resident[1], files[0] / files[1]
    reached = f"{ratio:.3f} of dense for the {len(layers)} linears ({resident[0] / 1e6:,.1f} MB), on disk as in memory; {whole:.3f} for the whole file"
    against = f"{resident[1] / 1e6:,.1f} MB; whole file {files[1] / 1e6:,.1f} MB"
    details = {"linears": resident, "files": files, "memory": [weight_bytes(packed), weight_bytes(dense)]}
    return Row(SECTION, f"{name}: size", reached, against, f"<= {SIZE_GOAL} of dense", ratio <= SIZE_GOAL, details)


def speed_rows(name: str, comparison: Comparison, goal: float) -> list[Row]:
    ratio, prefill = comparison.ratios["decode"], comparison.ratios["prefill"]
    logits = f"logits differ by {comparison.logits:.1e} of their norm, the first {comparison.same_tokens} tokens are the same"
    return [
        Row(
            SECTION,
            f"{name}: generate(), one token at a time",
            f"{ratio:.2f}x ({comparison.packed.decode:.1f} tokens/s over {comparison.tokens} tokens; {logits})",
            f"dense with zeros {comparison.dense.decode:.1f} tokens/s",
            f">= {goal}x",
            ratio >= goal,
            comparison.to_dict(),
        ),
        Row(
            SECTION,
            f"{name}: prefill of {comparison.prompt_length} tokens",
            f"{prefill:.2f}x ({comparison.packed.prefill:.1f} tokens/s)",
            f"dense with zeros {comparison.dense.prefill:.1f} tokens/s",
        ),
    ]


def write_picture(folder: Path) -> Path:
    """Plot this machine's figures of packed models: tokens a second over the dense model's. Return the picture's path."""
    path = results.path_of(results.this_run(), folder)
    rows = [Bar("dense", 1.0, "1", "#9aa4ae")]
    for row in results.stored(path):
        of = row.details
        if row.section == SECTION and "tokens" in of:
            ratio = of["packed"]["decode"] / of["dense"]["decode"]
            rows.append(Bar(row.what.partition(":")[0], ratio, f"{ratio:.2f} times the tokens a second"))
    picture = path.with_name("packed.svg")
    picture.write_text(bars(rows, width=820) + "\n", encoding="utf-8")
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wikitext", type=Path, metavar="FOLDER", help="with valid.txt and test.txt of WikiText-2")
    parser.add_argument("--only", action="append", choices=PARTS, help="may be given more than once")
    parser.add_argument("--tokens", type=int, default=32, help="to generate")
    parser.add_argument("--samples", type=int, default=8, help=f"windows of {smollm2.LENGTH} tokens to calibrate on")
    parser.add_argument("--windows", type=int, default=smollm2.WINDOWS, help=f"of {smollm2.WINDOW} tokens to evaluate on")
    parser.add_argument("--out", type=Path, default=results.FOLDER, metavar="FOLDER", help="where the figures go")
    arguments = parser.parse_args()
    parts, run = arguments.only or PARTS, results.this_run()
    rows = run_llama(arguments.tokens) if "llama" in parts else []
    if "smollm2" in parts and arguments.wikitext is None:
        print("smollm2: not measured, --wikitext was not given")
    elif "smollm2" in parts:
        rows += run_smollm2(arguments.wikitext, arguments.tokens, arguments.samples, arguments.windows)
    print(results.record(rows, arguments.out, run).read_text())
    print(write_picture(arguments.out))


if __name__ == "__main__":
    main()
