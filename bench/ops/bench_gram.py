from __future__ import annotations

import pytest
import torch

from sparsekern.ops import gram_

TOKENS, FEATURES = 16384, 4096
GOALS = {torch.bfloat16: 5.0, torch.float32: 1.6}
CHECKED = 48  # columns whose products are computed in float64 too


def public(gram: torch.Tensor, x: torch.Tensor) -> None:
    """What the public programs do (the scale of the activations aside)."""
    gram += x.float().T @ x.float()


IMPLEMENTATIONS = {"sparsekern": gram_, "float().T @ float()": public}


def error(gram: torch.Tensor, x: torch.Tensor) -> float:
    """Relative error against float64 of the first columns, over the lower triangle that both fill."""
    exact = x.double().T @ x[:, :CHECKED].double()
    below = torch.ones_like(exact, dtype=torch.bool).tril()
    return float((gram[:, :CHECKED] - exact)[below].norm() / exact[below].norm())


def activations(generator: torch.Generator, dtype: torch.dtype, tokens: int, features: int) -> torch.Tensor:
    """A few features much larger than the rest, as language models have them."""
    scale = torch.rand(features, generator=generator) ** 4 * 10 + 0.1
    return (torch.randn(tokens, features, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("dtype", GOALS, ids=lambda dtype: str(dtype).removeprefix("torch."))
def test_gram(measure, generator, dtype):
    small = activations(generator, dtype, 300, 200)
    exact = small.double().T @ small.double()
    assert torch.allclose(gram_(torch.zeros(200, 200), small).double(), exact.tril(), rtol=1e-5, atol=1e-6 * float(exact.max()))

    x = activations(generator, dtype, TOKENS, FEATURES)
    errors = {}
    for name, implementation in IMPLEMENTATIONS.items():
        gram = torch.zeros(FEATURES, FEATURES)
        implementation(gram, x)
        errors[name] = error(gram, x)
    assert errors["sparsekern"] <= errors["float().T @ float()"]

    ours, theirs = torch.zeros(FEATURES, FEATURES), torch.zeros(FEATURES, FEATURES)
    measure(
        lambda: gram_(ours, x),
        against=lambda: public(theirs, x),
        baseline="H += x.float().T @ x.float()",
        goal=GOALS[dtype],
        group=f"gram_ {str(dtype).removeprefix('torch.')} [{TOKENS}, {FEATURES}]",
        flops=TOKENS * FEATURES * (FEATURES + 1),
        bytes=x.nbytes + ours.nbytes // 2,
        rounds=3,
        error=errors["sparsekern"],
        baseline_error=errors["float().T @ float()"],
    )


@pytest.mark.parametrize("features", [576, 1536])
def test_gram_of_smollm2(measure, generator, features):
    """The shapes and the dtype that pruning SmolLM2-135M runs on a CPU, a batch of 2048 tokens at a time."""
    x = activations(generator, torch.float32, 2048, features)
    ours, theirs = torch.zeros(features, features), torch.zeros(features, features)
    gram_(ours, x)
    public(theirs, x)
    assert error(ours, x) <= 2 * error(theirs, x)
    measure(
        lambda: gram_(ours, x),
        against=lambda: public(theirs, x),
        baseline="H += x.T @ x",
        group=f"gram_ float32 [2048, {features}]",
        flops=2048 * features * (features + 1),
        rounds=9,
    )
