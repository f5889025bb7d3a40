"""Prune for one text after another without keeping any of them."""

import argparse

import sparsekern
from sparsekern.data import encode, read_documents

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="builtin:smollm2-135m")
parser.add_argument("--texts", nargs="+", default=["builtin:python-docs", "builtin:python-source"])
parser.add_argument("--state", default="state")
parser.add_argument("--out", default="pruned-for-all")
parser.add_argument("--samples", type=int, default=8)
parser.add_argument("--length", type=int, default=512)
arguments = parser.parse_args()

model, tokenizer = sparsekern.load(arguments.model), sparsekern.load_tokenizer(arguments.model)
windows = {text: encode(read_documents(text, "held-out"), tokenizer)[: 2 * arguments.length] for text in arguments.texts}
report = sparsekern.prune_continually(
    model,
    {text: text for text in arguments.texts},
    sparsekern.Wanda(),
    0.5,
    tokenizer=tokenizer,
    samples=arguments.samples,
    length=arguments.length,
    evaluate=windows,
    state=arguments.state,
    out=arguments.out,
)
print(report)  # the matrix of perplexities, and the backward transfer: negative where texts were forgotten
