"""The benchmarks of the solvers and of what they work from: sweeps, factors, Gram matrices, feature norms."""

from __future__ import annotations

import functools

import torch

from baselines.textbook import textbook_sparsegpt, textbook_sweep
from sparsekern import ops
from sparsekern.ops.topk_mask import reference as topk_by_sort

from ..problems import DAMPING
from .cases import Faster, NotHere, Place, Problem, Within, case

TEXTBOOK = {"2:4": {"n_zeros": 2, "m": 4}, 0.5: {"sparsity": 0.5}}
CHECKED = 64  # columns or rows whose products are computed in float64 too


def activations(place: Place, tokens: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    """A few features much larger than the rest, as language models have them."""
    scale = torch.rand(features, device=place.device) ** 4 * 10 + 0.1
    x = torch.empty(tokens, features, dtype=dtype, device=place.device)
    for part in x.split(2**14):
        part.copy_(torch.randn(part.shape, device=place.device) * scale)
    return x


def correlated_gram(place: Place, features: int) -> torch.Tensor:
    mixing = torch.eye(features, device=place.device) + place.randn(features, features) * (0.5 / features**0.5)
    x = activations(place, 2 * features, features, torch.float32) @ mixing
    return x.T @ x


def output_error(weight: torch.Tensor, new_weight: torch.Tensor, gram: torch.Tensor) -> float:
    delta = (new_weight.float() - weight.float()).double()
    return float(((delta @ gram.double()) * delta).sum())


def assert_as_good_as(weight, gram, ours, theirs) -> None:
    """The masks of two sweeps agree but for near ties, and ours costs no more."""
    (new_weight, mask), (their_weight, their_mask) = ours, theirs
    agreement = float((mask == their_mask).float().mean())
    assert agreement > 0.999, f"only {agreement:.4%} of the mask is the textbook's"
    error, their_error = output_error(weight, new_weight, gram), output_error(weight, their_weight, gram)
    assert error < 1.002 * their_error, f"output error {error:.4g}, the textbook's is {their_error:.4g}"
    assert not new_weight[~mask].any(), "a pruned weight is not zero"


def sweep(place: Place, rows: int, columns: int, pattern, *, scope: str = "block", textbook: bool = False, goals=()) -> Problem:
    gram = correlated_gram(place, columns)
    factor = ops.reverse_cholesky(gram, DAMPING)
    weight = place.randn(rows, columns)
    if textbook:
        # `V^-1` is the upper factor of the inverse Hessian, so both loops start from the same numbers.
        upper = torch.linalg.solve_triangular(factor, torch.eye(columns, device=place.device), upper=True)

    def loop():
        return textbook_sweep(weight, upper, **TEXTBOOK[pattern])

    expected_of_loop = functools.cache(loop)

    def check(result) -> None:
        new_weight, mask, _ = result
        assert int(mask.sum()) == mask.numel() // 2, "not half of the weights are kept"
        if textbook:
            assert_as_good_as(weight, gram, (new_weight, mask), expected_of_loop())
        elif scope == "matrix":  # chosen from the starting weights
            score = weight.abs() * factor.diagonal()
            assert torch.equal(mask, topk_by_sort(score, mask.numel() // 2, scope="matrix")), "not the mask of the best weights"
        else:  # rows do not know of each other
            few = slice(0, CHECKED)
            expected = ops.obs_sweep(weight[few].cpu(), factor.cpu(), pattern, scope=scope)[1]
            agreement = float((mask[few].cpu() == expected).float().mean())
            assert agreement > 0.999, f"only {agreement:.4%} of the mask is that of the CPU kernel"

    return Problem(
        calls=[lambda: ops.obs_sweep(weight, factor, pattern, scope=scope)],
        check=check,
        baselines={"textbook loop": [loop]} if textbook else {},
        flops=rows * columns**2,
        bytes=2 * weight.nbytes + weight.numel() + factor.nbytes // 2,
        goals=goals,
    )


SWEEP_GOALS = (Faster(100, "textbook loop"), Within(3e-3))


@case("obs_sweep 4096x4096 2:4", "obs_sweep", 8)
def sweep_24(place: Place) -> Problem:
    size = place.size(4096, 256)
    return sweep(place, size, size, "2:4", textbook=True, goals=SWEEP_GOALS)


@case("obs_sweep 4096x4096 50 %", "obs_sweep", 8)
def sweep_half(place: Place) -> Problem:
    size = place.size(4096, 256)
    return sweep(place, size, size, 0.5, textbook=True, goals=SWEEP_GOALS)


@case("q, k and v of 4096x4096 to 2:4 from one Gram matrix", None, 15)
def shared_factor(place: Place) -> Problem:
    size = place.size(4096, 256)
    gram = correlated_gram(place, size)
    weights = [place.randn(size, size) for _ in range(3)]

    def ours():
        factor = ops.reverse_cholesky(gram, DAMPING)
        return [ops.obs_sweep(weight, factor, "2:4")[:2] for weight in weights]

    def textbook():
        return [textbook_sparsegpt(weight, gram, percdamp=DAMPING, **TEXTBOOK["2:4"]) for weight in weights]

    def check(results) -> None:
        assert_as_good_as(weights[0], gram, results[0], textbook_sparsegpt(weights[0], gram, percdamp=DAMPING, **TEXTBOOK["2:4"]))

    return Problem(
        calls=[ours],
        check=check,
        baselines={"textbook": [textbook]},
        flops=size**3 // 3 + 3 * size**3,
        bytes=3 * (2 * weights[0].nbytes + weights[0].numel()) + gram.nbytes,
        goals=(Faster(40, "textbook"),),
        captured=False,
    )


def gram(place: Place, tokens: int, features: int, dtype: torch.dtype, unit: str, goals=()) -> Problem:
    x = activations(place, tokens, features, dtype)
    ours = torch.zeros(features, features, device=place.device)
    half_on_device = dtype != torch.float32 and place.device.type == "cuda"

    def full():
        return torch.mm(x.T, x, out_dtype=torch.float32) if half_on_device else x.T.float() @ x.float()

    def columns_in_float64() -> torch.Tensor:
        exact = torch.zeros(features, CHECKED, dtype=torch.float64, device=place.device)
        for part in x.split(2**14):
            exact += part.double().T @ part[:, :CHECKED].double()
        return exact

    def check(_) -> None:
        exact = columns_in_float64()
        below = torch.ones_like(exact, dtype=torch.bool).tril()

        def error(result: torch.Tensor) -> float:
            return float((result[:, :CHECKED] - exact)[below].norm() / exact[below].norm())

        fresh = ops.gram_(torch.zeros_like(ours), x)
        assert error(fresh) <= max(2 * error(full()), 1e-6), f"error {error(fresh):.2e}, the library's is {error(full()):.2e}"

    baseline = "torch.mm(x.T, x, out_dtype=float32)" if half_on_device else "x.T @ x"
    return Problem(
        calls=[lambda: ops.gram_(ours, x)],
        check=check,
        baselines={baseline: [full]},
        flops=tokens * features * (features + 1),
        bytes=x.nbytes + ours.nbytes,
        unit=unit,
        goals=tuple(Faster(times, baseline) for times in goals),
    )


@case("gram_ bf16 [262144, 4096]", "gram_")
def gram_bf16(place: Place) -> Problem:
    return gram(place, place.size(262144, 512), place.size(4096, 128), torch.bfloat16, "bf16", goals=(1.6,))


@case("gram_ bf16 [32768, 11008]", "gram_")
def gram_of_one_batch(place: Place) -> Problem:
    """What `prune` calls once a batch for the widest linear of LLaMA-7B."""
    return gram(place, place.size(32768, 512), place.size(11008, 160), torch.bfloat16, "bf16")


@case("gram_ fp32 [65536, 4096]", "gram_")
def gram_fp32(place: Place) -> Problem:
    return gram(place, place.size(65536, 512), place.size(4096, 128), torch.float32, "fp32")


@case("feature_norm_ bf16 [262144, 4096]", "feature_norm_")
def feature_norm(place: Place) -> Problem:
    tokens, features = place.size(262144, 512), place.size(4096, 128)
    x = activations(place, tokens, features, torch.bfloat16)
    sums = torch.zeros(features, device=place.device)

    def check(_) -> None:
        exact = sum(part.double().square().sum(0) for part in x.split(2**14))
        fresh = ops.feature_norm_(torch.zeros_like(sums), x)
        assert torch.allclose(fresh.double(), exact, rtol=1e-5, atol=0), "wrong sums of squares"

    return Problem(
        calls=[lambda: ops.feature_norm_(sums, x)],
        check=check,
        baselines={"vector_norm(x, dim=0, dtype=float32)": [lambda: torch.linalg.vector_norm(x, dim=0, dtype=torch.float32)]},
        flops=2 * x.numel(),
        bytes=x.nbytes,
    )


@case("reverse_cholesky 4096", "reverse_cholesky", 5)
def factor_4096(place: Place) -> Problem:
    return factor(place, place.size(4096, 256))


@case("reverse_cholesky 11008", "reverse_cholesky", 8)
def factor_11008(place: Place) -> Problem:
    return factor(place, place.size(11008, 320))


def factor(place: Place, features: int) -> Problem:
    gram = correlated_gram(place, features)

    def damped(dtype: torch.dtype) -> torch.Tensor:
        shift = DAMPING * gram.diagonal().double().mean().to(dtype)
        return gram.to(dtype) + shift * torch.eye(features, dtype=dtype, device=place.device)

    def three():
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(torch.float32)))
        return torch.linalg.cholesky(inverse, upper=True)

    def check(result: torch.Tensor) -> None:
        target = damped(torch.float64)
        error = float((result.double() @ result.double().T - target).norm() / target.norm())
        assert error < 1e-5, f"V V^T is off by {error:.2e}"

    return Problem(
        calls=[lambda: ops.reverse_cholesky(gram, DAMPING)],
        check=check,
        baselines={"Cholesky, inverse, Cholesky": [three]},
        flops=features**3 // 3,
        bytes=2 * gram.nbytes,
        captured=False,
    )


@case("obs_sweep 11008x4096 2:4", "obs_sweep")
def sweep_wide(place: Place) -> Problem:
    return sweep(place, place.size(11008, 320), place.size(4096, 256), "2:4")


@case("obs_sweep 4096x11008 2:4", "obs_sweep")
def sweep_long(place: Place) -> Problem:
    return sweep(place, place.size(4096, 256), place.size(11008, 320), "2:4")


@case("obs_sweep 4096x4096 50 % by row", "obs_sweep")
def sweep_by_row(place: Place) -> Problem:
    return sweep(place, place.size(4096, 256), place.size(4096, 256), 0.5, scope="row")


@case("obs_sweep 4096x4096 50 % of all", "obs_sweep")
def sweep_of_all(place: Place) -> Problem:
    return sweep(place, place.size(4096, 256), place.size(4096, 256), 0.5, scope="matrix")


@case("float32 product 4096x4096x4096 in Triton")
def product(place: Place) -> Problem:
    """What the sweep multiplies with between its blocks, where that is not cuBLAS."""
    if place.device.type != "cuda":
        raise NotHere("Triton's kernels need a GPU")
    from sparsekern.triton_kernels.matmul import add_product

    a, b = place.randn(4096, 4096), place.randn(4096, 4096)
    ours, theirs = torch.zeros_like(a), torch.zeros_like(a)

    def error(result: torch.Tensor) -> float:
        exact = a[:CHECKED].double() @ b.double()
        return float((result[:CHECKED].double() - exact).norm() / exact.norm())

    def check(_) -> None:
        fresh = torch.zeros_like(a)
        add_product(fresh, a, b)
        assert error(fresh) <= 2 * error(a @ b), f"error {error(fresh):.2e}, cuBLAS's is {error(a @ b):.2e}"

    return Problem(
        calls=[lambda: add_product(ours, a, b)],
        check=check,
        baselines={"addmm in float32": [lambda: torch.addmm(theirs, a, b, out=theirs)]},
        flops=2 * 4096**3,
        bytes=4 * a.nbytes,
    )
