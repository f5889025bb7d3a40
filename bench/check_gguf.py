"""Whether llama.cpp computes with exported files what transformers does: `python -m bench.check_gguf [FOLDER ...] --llama-cpp BUILD`.

FOLDER is a saved model, dense or packed, with its tokenizer, or `builtin:smollm2-135m`. Without one, tiny random models of each family are
checked, with the rotary embeddings and heads that they may have. BUILD is a folder in which llama.cpp was built with the targets
`llama-perplexity`, `llama-tokenize` and `llama-simple`.

Each model is exported, and llama.cpp is given the file. Its tokens of several texts must be the tokenizer's. Its probabilities of what
follows each token of a text are compared with those of the same numbers in float32 in transformers. So are those of a packed model, whose
linears may round their input to 8 bits as llama.cpp does. Greedy continuations of a FOLDER's model are compared token by token. The exit
code is 1 where tokens of texts differ or the divergence is above what the rounding of inputs explains.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader
from torch import nn

import sparsekern
from sparsekern.data import read_documents
from sparsekern.measure.fidelity import Fidelity
from sparsekern.models.load import load_tokenizer
from sparsekern.runtime.packing import is_packed

from . import smollm2
from .llama_cpp import greedy_text, probabilities_of, tokens_of

TEXTS = (
    "It's 2,345 words; don't WE'LL über 我想 naïve\tTabs\n\n\n  and   spaces \r\n1234567 x=y**2 # end",
    " begins with a space, and ends with one ",
    "<|im_start|>user\nHello<|im_end|>\n",
)
PROMPTS = ("The capital of France is", "def fibonacci(n):\n", "Once upon a time, there was a")
LENGTH, WINDOWS, NEW_TOKENS = 256, 4, 32
HALF = "\ufffd"  # what is shown of a character whose last bytes are in the next token
EXACT, ROUNDED = 1e-4, 0.03  # the most divergence of files in float32, and of those whose products round their input
SCALED = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied head": ("llama", {"tie_word_embeddings": True}),
    "llama, biases": ("llama", {"attention_bias": True}),
    "llama, linear rotary": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "llama, llama3 rotary": ("llama", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, **SCALED}}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral, wide heads": ("mistral", {"sliding_window": None, "head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2, tied head": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 64}),
}


def fidelity_of(expected: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor) -> Fidelity:
    """Return how near two computations of a model are, the first of which is the reference.

    Args:
        expected: `[windows, places, vocabulary]` logarithms of probabilities.
        found: the same of the other.
        tokens: `[windows, length]`; the places are those of the second half but the last.
    """
    following = tokens[:, -expected.shape[1] :, None]
    reference, own = (math.exp(-float(log.gather(2, following).double().mean())) for log in (expected, found))
    divergence = float((expected.exp() * (expected - found)).sum(-1).double().mean())
    return Fidelity(divergence, float((expected.argmax(-1) == found.argmax(-1)).double().mean()), own, reference)


@torch.no_grad()
def own_probabilities(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logarithms of the probabilities that a model of transformers has where `Probabilities.log` has them, float32."""
    first, last = tokens.shape[1] // 2, tokens.shape[1] - 1
    found = [model(input_ids=window[None], use_cache=False).logits[0, first:last].float().log_softmax(-1) for window in tokens]
    return torch.stack(found)


def with_first_token(tokens: torch.Tensor, tokenizer: Any) -> torch.Tensor:
    """Return windows whose first token is BOS where the tokenizer puts it in front of a text, as `llama-perplexity` does."""
    begun = tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    return torch.cat((torch.full_like(tokens[:, :1], tokenizer.bos_token_id), tokens[:, 1:]), 1) if begun else tokens


@torch.no_grad()
def greedy_agreement(model: Any, tokenizer: Any, prompt: str, found: str) -> int:
    """Return how many greedy tokens of a model make up the beginning of a text that another program found."""
    given = tokenizer(prompt, return_tensors="pt")
    settings = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    own = model.generate(given["input_ids"], attention_mask=given["attention_mask"], **settings)[0, given["input_ids"].shape[1] :]
    texts = [tokenizer.decode(own[: count + 1]).rstrip(HALF) for count in range(len(own))]
    return next((count for count, text in enumerate(texts) if not found.startswith(text)), len(texts))


def check(name: str, model: Any, tokenizer: Any, text: str, build: Path, prompts: Sequence[str] = ()) -> bool:
    """Export a model, run llama.cpp on the file, print how both agree, and return whether they do. The model is unpacked in place."""
    with tempfile.TemporaryDirectory(prefix="sparsekern-bench-") as folder:
        file = sparsekern.export_gguf(model, Path(folder) / "model.gguf", tokenizer=tokenizer)
        kinds = {tensor.tensor_type.name for tensor in GGUFReader(file).tensors}
        differing = [own for own in TEXTS if tokens_of(build, file, own) != tokenizer(own)["input_ids"]]
        theirs = probabilities_of(build, file, text, LENGTH, WINDOWS)
        continued = {prompt: greedy_text(build, file, prompt, NEW_TOKENS) for prompt in prompts}
    tokens = with_first_token(theirs.tokens, tokenizer)
    if tokenizer(text)["input_ids"][: tokens.numel()] != theirs.tokens.flatten().tolist():
        differing.append(text)
    model = model.to(torch.float32)
    packed = own_probabilities(model, tokens) if is_packed(model) else None
    exact = sparsekern.unpack(model)
    expected = own_probabilities(exact, tokens)
    found, most = fidelity_of(expected, theirs.log, tokens), EXACT if kinds == {"F32"} else ROUNDED
    print(f"{name} ({', '.join(sorted(kinds))}): perplexity {found.dense_perplexity:.3f} in float32, llama.cpp {_described(found)}")
    if packed is not None:
        print(f"  the packed model {_described(fidelity_of(expected, packed, tokens))}")
    for prompt, other in continued.items():
        same = greedy_agreement(exact, tokenizer, prompt, other)
        print(f"  {same} of {NEW_TOKENS} greedy tokens behind {prompt!r} are the same: {other!r}")
    for own in differing:
        print(f"  expected the tokens of the tokenizer, got others: {own[:60]!r}")
    if not found.divergence <= most:
        print(f"  expected a divergence of at most {most}")
    sys.stdout.flush()
    return not differing and found.divergence <= most


def tiny(kind: str, **settings: Any) -> nn.Module:
    """Return a small random model whose predictions depend on each of its weights, with the vocabulary of SmolLM2."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(smollm2.tokenizer())}
    common = {"max_position_embeddings": 2 * LENGTH, "initializer_range": 0.15}
    config = AutoConfig.for_model(kind, **{**sizes, **common, **settings})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:  # norms and biases begin as ones and zeros
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
    return model


def _described(found: Fidelity) -> str:
    return f"{found.perplexity:.3f}; divergence {found.divergence:.2g} nats, the same top token in {found.agreement:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="tiny random models where none is given")
    parser.add_argument("--llama-cpp", type=Path, required=True, metavar="BUILD")
    parser.add_argument("--text", type=Path, metavar="FILE", help="built-in documentation of Python by default")
    arguments = parser.parse_args()
    documents = arguments.text or "builtin:python-docs"
    text = "\n".join(read_documents(documents))[: 16 * LENGTH * WINDOWS].replace("\r", "")
    agree = True
    if not arguments.folders:
        for name, (kind, settings) in TINY.items():
            agree &= check(name, tiny(kind, **settings), smollm2.tokenizer(), text, arguments.llama_cpp)
    for folder in arguments.folders:
        agree &= check(folder, sparsekern.load(folder, device="cpu"), load_tokenizer(folder), text, arguments.llama_cpp, PROMPTS)
    sys.exit(not agree)


if __name__ == "__main__":
    main()
