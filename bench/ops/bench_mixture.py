"""A mixture of experts that generates one token at a time, packed, against transformers' own dense run."""

from __future__ import annotations

import copy
import functools
import tempfile
import time
from pathlib import Path

import torch

import sparsekern
from sparsekern.measure.generate import generate
from sparsekern.models.expert_layouts import find_experts
from sparsekern.models.linears import find_linears
from sparsekern.runtime.packing import is_packed, weight_bytes

from ..problem import Case, Place, Problem

FASTEST = "the dense model, with the fastest of transformers' experts"
IMPLEMENTATIONS = ("eager", "batched_mm", "grouped_mm")
POOL = 2**20 - 3  # random numbers that are repeated: a billion of them take a minute
LARGEST = 0.6  # of the dense bytes
SHAPE = {"layers": 3, "hidden": 2048, "intermediate": 768, "experts": 64, "choices": 8, "heads": 32, "new": 16}
TOY = {"layers": 1, "hidden": 128, "intermediate": 64, "experts": 8, "choices": 2, "heads": 4, "new": 2}


@functools.lru_cache(maxsize=1)
def models(
    layers: int, hidden: int, intermediate: int, experts: int, choices: int, heads: int
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Return a model of Qwen3-MoE's shape with random weights, half of them zero: dense, and packed."""
    import transformers as tf
    from transformers.initialization import no_init_weights

    config = tf.Qwen3MoeConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=intermediate,
        moe_intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 8),
        head_dim=64,
        num_experts=experts,
        num_experts_per_tok=choices,
        decoder_sparse_step=1,
        norm_topk_prob=True,
        eos_token_id=None,
    )
    with no_init_weights():
        dense = tf.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(0)
    some = torch.randn(POOL, generator=generator)
    half = (some * (torch.rand(POOL, generator=generator) >= 0.5)).bfloat16()
    pruned = {id(linear.parameter) for linear in find_linears(dense.model.layers)}
    for parameter in dense.parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1)
            continue
        numbers = half if id(parameter) in pruned else some.bfloat16()
        for part in parameter.data.view(-1).split(POOL):
            torch.mul(numbers[: len(part)], hidden**-0.5, out=part)
    packed = sparsekern.pack(copy.deepcopy(dense))
    assert not find_experts(packed), "experts that are not packed"
    return dense, packed


def run(model: torch.nn.Module, prompt: torch.Tensor, new: int) -> torch.Tensor:
    with torch.inference_mode():
        return generate(model, prompt, new)


def fastest(model: torch.nn.Module, prompt: torch.Tensor, new: int) -> str:
    """Return transformers' implementation of experts that takes least time here."""
    seconds = {}
    for name in IMPLEMENTATIONS:
        model.set_experts_implementation(name)
        run(model, prompt, 2)
        start = time.perf_counter()
        run(model, prompt, new)
        seconds[name] = time.perf_counter() - start
    return min(seconds, key=lambda name: seconds[name])


def saved_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of all files of a model's folder."""
    with tempfile.TemporaryDirectory(prefix="sparsekern-mixture-") as folder:
        sparsekern.save(model, Path(folder) / "model", format="packed" if is_packed(model) else "dense")
        return sum(file.stat().st_size for file in (Path(folder) / "model").iterdir())


def decoding(place: Place, new: int, **shape: int) -> Problem:
    """Generation of `new` tokens after a prompt of one."""
    dense, packed = models(**shape)
    prompt = torch.tensor([[5]])
    best = fastest(dense, prompt, new)
    dense.set_experts_implementation(best)

    of_dense: dict[str, float] = {}

    def check(result: torch.Tensor) -> None:
        """Tokens and logits of the dense model, and its size at most in part. Sizes of toys are those of their embeddings.

        Where bfloat16 makes two tokens equally likely, either may be generated.
        """
        text = torch.cat((prompt[0], result))[None]
        assert text.max() < dense.config.vocab_size, "tokens outside the vocabulary"
        with torch.inference_mode():
            exact, found = (model(input_ids=text).logits[0, :-1].float() for model in (dense, packed))
        assert (found - exact).norm() < 0.05 * exact.norm()
        chosen = exact.gather(1, result[:, None])[:, 0]
        assert (chosen > exact.amax(1) - 0.1 * exact.std(1)).all(), "not the most likely tokens"
        of_dense.update({"memory": weight_bytes(packed) / weight_bytes(dense), "files": saved_bytes(packed) / saved_bytes(dense)})
        if not place.toy:
            assert max(of_dense.values()) <= LARGEST, of_dense

    active = shape["layers"] * shape["choices"] * 3 * shape["hidden"] * shape["intermediate"]
    return Problem(
        calls=[lambda: run(packed, prompt, new)],
        check=check,
        baselines={FASTEST: [lambda: run(dense, prompt, new)]},
        flops=new * active,
        read=new * active * (1 + 1 / 8),
        captured=False,
        of_dense=of_dense,
    )


CASES = [
    Case(
        "a mixture of 1 B weights, 8 of 64 experts, 50% zeros: generate(), one token at a time",
        decoding,
        SHAPE,
        TOY,
        cpu={FASTEST: 1.7},
        rounds=7,
    )
]


def test_mixture(timed, case):
    timed(case)
