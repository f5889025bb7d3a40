"""Prune a decoder to 2:4 and compare its perplexity with the dense model's."""

import argparse

import sparsekern
from sparsekern.data import encode, read_documents

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="builtin:smollm2-135m")
parser.add_argument("--out", default="pruned")
parser.add_argument("--text", default="builtin:python-docs")
parser.add_argument("--samples", type=int, default=32)
parser.add_argument("--length", type=int, default=512)
arguments = parser.parse_args()

model, tokenizer = sparsekern.load(arguments.model), sparsekern.load_tokenizer(arguments.model)
held_out = encode(read_documents(arguments.text, "held-out"), tokenizer)[: 4 * arguments.length]
dense = sparsekern.perplexity(model, held_out, arguments.length)

report = sparsekern.prune(
    model,
    sparsekern.SparseGPT(damping=0.01),
    "2:4",
    calibration=arguments.text,
    tokenizer=tokenizer,
    samples=arguments.samples,
    length=arguments.length,
    out=arguments.out,
)
pruned = sparsekern.perplexity(model, held_out, arguments.length)
print(f"{report.sparsity:.0%} zeros; perplexity {dense:.2f} dense, {pruned:.2f} pruned; saved to {arguments.out}")
