from __future__ import annotations

import torch

from sparsekern.ops import gram_

from ..inputs import CHECKED, activations, exact_product, short
from ..problem import Case, Place, Problem

PUBLIC, LIBRARY = "H += x.float().T @ x.float()", "torch.mm(x.T, x) into float32"


def gram(place: Place, tokens: int, features: int, dtype: torch.dtype, error_ratio: float = 2.0) -> Problem:
    """`error_ratio` is the most that ours may err, relative to the library's product of the same inputs in float32."""
    small = activations(place, 300, 200, dtype)
    x = activations(place, tokens, features, dtype)
    ours = torch.zeros(features, features, device=place.device)
    half_on_device = dtype != torch.float32 and place.device.type == "cuda"

    def library() -> torch.Tensor:
        return torch.mm(x.T, x, out_dtype=torch.float32) if half_on_device else x.T.float() @ x.float()

    def check(_) -> None:
        whole = exact_product(small, small)
        found = gram_(torch.zeros(200, 200, device=place.device), small).double()
        torch.testing.assert_close(found, whole.tril(), rtol=1e-5, atol=1e-6 * float(whole.max()))

        exact = exact_product(x, x[:, :CHECKED])
        below = torch.ones_like(exact, dtype=torch.bool).tril()
        errors = [
            float((result[:, :CHECKED] - exact)[below].norm() / exact[below].norm())
            for result in (gram_(torch.zeros_like(ours), x), library())
        ]
        assert errors[0] <= max(error_ratio * errors[1], 1e-7), f"error {errors[0]:.2e}, the library's is {errors[1]:.2e}"

    return Problem(
        calls=[lambda: gram_(ours, x)],
        check=check,
        baselines={PUBLIC: [lambda: ours.add_(x.float().T @ x.float())], LIBRARY: [library]},
        flops=tokens * features * (features + 1),
        read=x.nbytes + ours.nbytes // 2,
        written=ours.nbytes // 2,
        unit="bf16" if dtype == torch.bfloat16 else "fp32",
    )


def case(tokens: int, features: int, dtype: torch.dtype, rounds: int = 3, error_ratio: float = 2.0, **where) -> Case:
    sizes = {"tokens": tokens, "features": features, "dtype": dtype, "error_ratio": error_ratio}
    toy = {"tokens": 512, "features": 128, "error_ratio": 2.0}
    return Case(f"gram_ {short(dtype)} [{tokens}, {features}]", gram, sizes, toy, op="gram_", rounds=rounds, **where)


CASES = [
    case(262144, 4096, torch.bfloat16, cuda={LIBRARY: 1.6}),
    case(32768, 11008, torch.bfloat16, cuda={LIBRARY: None}),  # a batch of the widest linear of LLaMA-7B
    case(65536, 4096, torch.float32, cuda={LIBRARY: None}),
    case(16384, 4096, torch.bfloat16, error_ratio=1.0, cpu={PUBLIC: 5.0}),
    case(16384, 4096, torch.float32, error_ratio=1.0, cpu={PUBLIC: 1.6}),
    *(case(2048, features, torch.float32, rounds=9, cpu={PUBLIC: None}) for features in (576, 1536)),  # those of SmolLM2-135M
]


def test_gram(timed, case):
    timed(case)
