"""Remove heads and neurons of an encoder: half of its FLOPs, without retraining."""

import argparse

import sparsekern

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", help="a folder or hub id of an encoder such as BERT or MiniLM")
parser.add_argument("--out", default="smaller")
parser.add_argument("--remove", type=float, default=0.5)
parser.add_argument("--text", default="builtin:python-docs")
parser.add_argument("--sentences", type=int, default=512)
arguments = parser.parse_args()

model, tokenizer = sparsekern.load(arguments.model), sparsekern.load_tokenizer(arguments.model)
report = sparsekern.prune(
    model,
    sparsekern.KPrune(remove=arguments.remove),
    calibration=arguments.text,
    tokenizer=tokenizer,
    samples=arguments.sentences,
    out=arguments.out,
)
print(report)
smaller = sparsekern.load(arguments.out)  # an ordinary transformers module with smaller matrices
print(f"{sum(p.numel() for p in smaller.parameters()) / 1e6:.2f} M parameters in {arguments.out}")
