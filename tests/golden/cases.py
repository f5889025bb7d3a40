"""Every method on a tiny Llama, GPT-2 and BERT, three on a mixture, and a packed model: what of each is kept as golden results."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping

import torch
import transformers as tf

import sparsekern

from .. import encoders, tiny
from ..models.test_experts import tiny_mixture

SEED = 0
DECODERS = {
    "llama": lambda: tiny.llama(96),
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=96, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None)
    ),
}
METHODS = {
    "magnitude": (sparsekern.Magnitude(), 0.5),
    "magnitude global": (sparsekern.Magnitude(scope="global"), 0.5),
    "random": (sparsekern.Random(), 0.5),
    "structured": (sparsekern.Structured(), 0.5),
    "wanda": (sparsekern.Wanda(), "2:4"),
    "wanda 50%": (sparsekern.Wanda(), 0.5),
    "sparsegpt": (sparsekern.SparseGPT(), "2:4"),
    "sparsegpt 60%": (sparsekern.SparseGPT(block_size=16, scope="row"), 0.6),
    "alps": (sparsekern.ALPS(), "2:4"),
    "sparsellm": (sparsekern.SparseLLM(), "2:4"),
    "copal": (sparsekern.COPAL(), "2:4"),
    "copal gram": (sparsekern.COPAL(form="gram"), 0.5),
    "gradual": (sparsekern.Gradual(steps=2, train_steps=2), 0.5),
}
ON_BERT = ("magnitude", "random", "wanda", "sparsegpt", "alps", "copal")


def calibration(seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 90, (8, 32), generator=torch.Generator().manual_seed(seed))


def decoder(name: str) -> tf.PreTrainedModel:
    torch.manual_seed(SEED)
    return DECODERS[name]().eval()


def _pruned(make: Callable[[], tf.PreTrainedModel], method: str) -> Mapping[str, torch.Tensor]:
    model, (config, pattern) = make(), METHODS[method]
    sparsekern.prune(model, config, pattern, calibration(), seed=SEED, progress=False)
    return model.state_dict()


def _continually() -> Mapping[str, torch.Tensor]:
    model = decoder("llama")
    texts = {"first": calibration(1), "second": calibration(2)}
    sparsekern.prune_continually(model, texts, "copal", "2:4", seed=SEED, progress=False)
    return model.state_dict()


def _mixture(method: str, weighting: str) -> Mapping[str, torch.Tensor]:
    model, (config, pattern) = tiny_mixture("qwen3_moe"), METHODS[method]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", sparsekern.SparsekernWarning)  # experts with few tokens
        sparsekern.prune(model, config, pattern, calibration(), seed=SEED, progress=False, weighting=weighting)
    return model.state_dict()


def _experts() -> Mapping[str, torch.Tensor]:
    model = tiny_mixture("qwen3_moe")
    sparsekern.prune(model, sparsekern.ExpertPruning(remove=0.5), calibration=calibration(), seed=SEED, progress=False)
    return model.state_dict()


def _kprune() -> Mapping[str, torch.Tensor]:
    model = encoders.tiny("bert_classifier")
    batches = encoders.one_by_one(encoders.padded_ids())
    sparsekern.prune(model, sparsekern.KPrune(remove=0.5), None, batches, seed=SEED, progress=False)
    return model.state_dict()


def _packed(dtype: torch.dtype) -> Mapping[str, torch.Tensor]:
    model = decoder("llama").to(dtype)
    patterns = {"*.mlp.*": "2:4"}
    sparsekern.prune(model, "magnitude", 0.5, seed=SEED, progress=False, patterns=patterns)
    return sparsekern.pack(model).state_dict()


CASES: dict[str, Callable[[], Mapping[str, torch.Tensor]]] = {
    **{
        f"{model}: {method}": lambda model=model, method=method: _pruned(lambda: decoder(model), method)
        for model in DECODERS
        for method in METHODS
    },
    **{f"bert: {method}": lambda method=method: _pruned(lambda: encoders.tiny("bert_classifier"), method) for method in ON_BERT},
    "mixture: sparsegpt": lambda: _mixture("sparsegpt", "equal"),
    "mixture: wanda by routing": lambda: _mixture("wanda", "routing"),
    "mixture: experts": _experts,
    "bert: kprune": _kprune,
    "llama: copal, two texts": _continually,
    "llama: packed, float32": lambda: _packed(torch.float32),
    "llama: packed, bfloat16": lambda: _packed(torch.bfloat16),
}


def machine() -> str:
    """Return what the bits of a float result depend on besides this package: another of these rounds otherwise."""
    return f"torch {torch.__version__.split('+')[0]}, {torch.backends.cpu.get_cpu_capability()}, {_vendor()}"


def _vendor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            return next(line.split(":")[1].strip() for line in file if line.startswith("vendor_id"))
    except (OSError, StopIteration):
        return "unknown vendor"


def digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return a digest of names, shapes, dtypes and bits."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
        found.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def outline(tensors: Mapping[str, torch.Tensor]) -> dict[str, list[float]]:
    """Return, for each float tensor, its share of zeros and its norm: what another machine's rounding leaves alike."""
    return {
        name: [round(float((tensor == 0).double().mean()), 4), round(float(tensor.double().norm()), 4)]
        for name, tensor in sorted(tensors.items())
        if tensor.is_floating_point() and tensor.dim() > 1
    }
