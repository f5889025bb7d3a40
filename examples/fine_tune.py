"""Prune by magnitude, then train while the zeros stay zero."""

import argparse

import torch

import sparsekern
from sparsekern.data import calibration_ids

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("model", nargs="?", default="builtin:smollm2-135m")
parser.add_argument("--text", default="builtin:python-docs")
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--length", type=int, default=256)
parser.add_argument("--out", default="fine-tuned")
arguments = parser.parse_args()

model, tokenizer = sparsekern.load(arguments.model), sparsekern.load_tokenizer(arguments.model)
ids = calibration_ids(arguments.text, tokenizer, samples=arguments.samples, length=arguments.length, seed=0)
report = sparsekern.prune(model, "magnitude", 0.5)

optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)
model.train()
with sparsekern.keep_sparsity(model):
    for step, batch in enumerate(ids.to(model.device).split(2)):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step}: loss {loss:.3f}")
sparsekern.save(model.eval(), arguments.out, tokenizer=tokenizer)
