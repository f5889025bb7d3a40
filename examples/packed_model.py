"""Save a pruned folder packed, load it with plain transformers, and generate."""

import argparse

from transformers import AutoModelForCausalLM

import sparsekern

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("pruned", help="a folder that sparsekern.prune made")
parser.add_argument("--out", default="packed")
parser.add_argument("--prompt", default="The capital of France is")
parser.add_argument("--tokens", type=int, default=20)
arguments = parser.parse_args()

tokenizer = sparsekern.load_tokenizer(arguments.pruned)
sparsekern.save(sparsekern.load(arguments.pruned), arguments.out, format="packed", tokenizer=tokenizer)

model = AutoModelForCausalLM.from_pretrained(arguments.out)  # `import sparsekern` is all it needs
packed = [layer for layer in model.modules() if isinstance(layer, sparsekern.SparseLinear)]
print(f"{len(packed)} linears are packed as {', '.join(sorted({layer.format for layer in packed}))}")

prompt = tokenizer(arguments.prompt, return_tensors="pt")
output = model.generate(input_ids=prompt["input_ids"], max_new_tokens=arguments.tokens, do_sample=False)
print(tokenizer.decode(output[0]))
